"""Imported first by train.py: without garbage collection its modules load in two thirds of the time."""

import gc

gc.disable()


def loaded() -> None:
    """Collect garbage again, but leave alone what has been loaded: DeepSpeed collects at each layer."""
    gc.freeze()
    gc.enable()
