"""The fate of copies that augmentations made: only copies of training rows stay, and only new ones."""

from __future__ import annotations

import numpy as np

from data_pipeline.deduplication.keys import repeated
from data_pipeline.preparation.job import FATE, FIRST_REASON


def select_copies(
    fate: np.ndarray, copies: np.ndarray, origins: np.ndarray, held_out: np.ndarray, keys: np.ndarray
) -> None:
    """Set the fate of every copy; the fates of all other rows are final.

    fate: uint8 `[rows]`, changed in place.
    copies: int64 `[copies]`, which rows are copies. origins: int64 `[copies]`, the rows that they were made from.
    held_out: bool `[rows]`, whether a row's first prompt belongs to the validation split.
    keys: uint64 `[rows, 2]`, equal for equal rows.
    """
    # Neither the copy nor the row that it was made from may be a question of the validation split.
    hidden = (fate[origins] == FATE["validation"]) | held_out[copies]
    dropped = fate[origins] >= FIRST_REASON
    undecided = fate[copies] == 0
    fate[copies[undecided & hidden]] = FATE["held_out_copy"]
    fate[copies[undecided & dropped]] = fate[origins[undecided & dropped]]
    # Rows count as earlier than all copies, so that a copy never displaces a row.
    rows = np.setdiff1d(np.arange(len(fate)), copies, assume_unique=True)
    in_order = np.concatenate([rows, copies])
    eligible = fate[in_order] < FIRST_REASON
    again = in_order[repeated(keys[in_order], eligible)]
    fate[again] = FATE["duplicate"]
