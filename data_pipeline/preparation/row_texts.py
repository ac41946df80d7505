"""The texts of a frame of rows, turn by turn, whatever the layout of the rows is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from data_pipeline.augmentation.augmentations import copies_of
from data_pipeline.cleaning.clean import CleaningOptions, clean_series

SEPARATOR = "\0"  # between the texts of a conversation; cleaning removes it from texts


@dataclass(frozen=True)
class RowTexts:
    """The texts of rows.

    prompts: `[turns]`; None if the rows are plain texts, which are answers without a prompt.
    answers: `[turns]`.
    turns: int64 `[rows]`, the turns of each row; None if every row has one.
    """

    prompts: pl.Series | None
    answers: pl.Series
    turns: np.ndarray | None = None

    @classmethod
    def of(cls, frame: pl.DataFrame) -> RowTexts:
        """Take the texts from a frame as sources yield it: prompt and answer, each a text or a list with one per turn."""
        answers = frame["answer"]
        if isinstance(answers.dtype, pl.List):
            turns = answers.list.len().cast(pl.Int64).to_numpy()
            return cls(frame["prompt"].explode(), answers.explode(), turns)
        return cls(frame["prompt"] if "prompt" in frame.columns else None, answers)

    def columns(self) -> list[pl.Series]:
        """Return the columns of texts."""
        return [self.answers] if self.prompts is None else [self.prompts, self.answers]

    def cleaned(self, options: CleaningOptions) -> RowTexts:
        """Clean every text."""
        if self.prompts is None:
            return RowTexts(None, clean_series(self.answers, options), self.turns)
        # One series, because polars builds the automata of its patterns anew for each search.
        texts = clean_series(pl.concat([self.prompts.rename("text"), self.answers.rename("text")]), options)
        turns = len(self.prompts)
        return RowTexts(texts[:turns].rename("prompt"), texts[turns:].rename("answer"), self.turns)

    def rows(self, kept: np.ndarray) -> RowTexts:
        """Return the texts of the rows with these numbers, in ascending order."""
        if len(kept) == len(self):
            return self
        places = kept
        if self.turns is not None:
            chosen = np.zeros(len(self), dtype=bool)
            chosen[kept] = True
            places = np.flatnonzero(np.repeat(chosen, self.turns))
        prompts = None if self.prompts is None else self.prompts[places]
        return RowTexts(prompts, self.answers[places], None if self.turns is None else self.turns[kept])

    def augmented(self, names: Sequence[str]) -> tuple[RowTexts, np.ndarray, np.ndarray]:
        """Append the copies that augmentations make of rows of one turn.

        Returns the texts, and for each copy its row, int64, and the number of its augmentation from 1, uint8 `[copies]`.
        """
        assert self.prompts is not None  # `prepare` refuses to augment plain texts
        copies = copies_of(self.prompts, self.answers, names)
        prompts, answers = (
            pl.concat([column.rename("text"), copied.rename("text")])
            for column, copied in ((self.prompts, copies.prompts), (self.answers, copies.answers))
        )
        return RowTexts(prompts, answers), copies.rows, copies.numbers

    def __len__(self) -> int:
        return len(self.answers) if self.turns is None else len(self.turns)

    @property
    def turns_per_row(self) -> np.ndarray:
        """Return the number of turns of each row, int64 `[rows]`."""
        return np.ones(len(self), dtype=np.int64) if self.turns is None else self.turns

    def sums_per_row(self, values: np.ndarray) -> np.ndarray:
        """Sum values of turns, `[turns]`, over each row, `[rows]`."""
        if self.turns is None:
            return values
        ends = np.concatenate([[0], np.cumsum(values)])
        return np.diff(ends[np.concatenate([[0], np.cumsum(self.turns)])])

    def are_bad(self) -> np.ndarray:
        """Tell which rows could not be read, bool `[rows]`: their texts are null."""
        first = self.answers if self.turns is None else self.answers.gather(self._first_turns)
        return first.is_null().to_numpy()

    def have_empty_text(self) -> np.ndarray:
        """Tell which rows have a turn with an empty prompt or answer, bool `[rows]`."""
        empty = np.zeros(len(self.answers), dtype=bool)
        for column in self.columns():
            empty |= (column == "").fill_null(True).to_numpy()
        return self.sums_per_row(empty.astype(np.int64)) > 0

    @property
    def opening(self) -> pl.Series:
        """The first prompt of each row, or the plain text, `[rows]`. It decides which split a row belongs to."""
        if self.prompts is None:
            return self.answers
        return self.prompts if self.turns is None else self.prompts[self._first_turns]

    @cached_property
    def rest(self) -> pl.Series:
        """Everything after the opening of each row, `[rows]`."""
        if self.prompts is None:
            return pl.repeat("", len(self), dtype=pl.String, eager=True)
        if self.turns is None:
            return self.answers
        exchange = pl.select(pl.concat_str(self.prompts, self.answers, separator=SEPARATOR)).to_series()
        further = exchange.scatter(self._first_turns, self.answers[self._first_turns])
        of_rows = pl.DataFrame({"row": np.repeat(np.arange(len(self)), self.turns), "text": further})
        return of_rows.group_by("row", maintain_order=True).agg(pl.col("text").str.join(SEPARATOR))["text"]

    @property
    def _first_turns(self) -> np.ndarray:
        return np.cumsum(self.turns_per_row) - self.turns_per_row
