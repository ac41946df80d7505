"""The run's keys in the format of TensorBoard's hparams tab, which compares runs."""

from __future__ import annotations

from torch.utils.tensorboard.summary import hparams

from launcher.config import RunConfig
from launcher.config_file import as_dict
from launcher.training.monitoring import tags
from launcher.training.monitoring.event_writer import EventWriter

METRICS = (tags.LOSS, tags.CROSS_ENTROPY, tags.HELD_OUT_CROSS_ENTROPY, tags.SEQUENCE_ACCURACY)


def write_hyperparameters(writer: EventWriter, config: RunConfig, step: int) -> None:
    """Write every key of the run (those of sections as `section.key`) and the metrics to compare runs by.

    They go into the run's own event file. `SummaryWriter.add_hparams` would create a second folder, which TensorBoard
    shows as another run.
    """
    experiment, session, _ = hparams(_flat(as_dict(config)), dict.fromkeys(METRICS, 0.0))
    for summary in (experiment, session):
        writer.add_summary(summary, step)


def _flat(values: dict, prefix: str = "") -> dict[str, bool | str | float]:
    flat: dict[str, bool | str | float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            known = isinstance(value, bool | int | float | str)
            flat[f"{prefix}{name}"] = value if known else str(value)  # lists and None
    return flat
