"""Rows that cannot be read: they end the job, or are skipped and counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from data_pipeline.errors import DataError

ON_BAD_ROW = ("refuse", "skip")
EXAMPLES = 3  # sentences kept for each reason
REASONS = 50  # after so many different ones, the others are counted together
OTHER_REASONS = "other reasons"


class BadRowError(DataError):
    """A row that cannot be read.

    reason: a few words, the same for all rows with this fault. The message says what is wrong with this row.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NoGoodRowError(DataError):
    """A file whose rows are all bad."""


class BadRows:
    """The bad rows of a chunk.

    on_bad_row: `refuse` or `skip`.
    counts: the number of rows by reason. examples: a few sentences by reason.
    """

    def __init__(self, on_bad_row: str = "refuse") -> None:
        self.on_bad_row = on_bad_row
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, error: BadRowError, where: Callable[[], str]) -> None:
        """Count a bad row. Raises DataError if bad rows are refused.

        where: returns the name of the row. It is called only if the name is needed, because finding it can take long.
        """
        if self.on_bad_row == "refuse":
            raise DataError(f"{where()}: {error}; or skip bad rows with --on-bad-row skip") from error
        known = error.reason in self.counts or len(self.counts) < REASONS
        reason = error.reason if known else OTHER_REASONS
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{where()}: {error}")

    def summary(self) -> list[tuple[str, int, list[str]]]:
        """Return reason, count and examples, as JSON values."""
        return [(reason, count, self.examples[reason]) for reason, count in self.counts.items()]


def columns_of_rows(rows: Iterable[tuple[dict | BadRowError, Callable[[], str]]]) -> list[str] | None:
    """Return the columns of the first good row, or None if there is no row.

    rows: each row, or why it cannot be read, and a function that returns its name.
    Raises NoGoodRowError, which names the first row, if all rows are bad.
    """
    first = None
    for row, where in rows:
        if not isinstance(row, BadRowError):
            return list(row)
        first = first or f"{where()}: {row}"
    if first:
        raise NoGoodRowError(first)
    return None


def merged(summaries: Iterable[list[tuple[str, int, list[str]]]]) -> list[tuple[str, int, list[str]]]:
    """Add up the summaries of several chunks, the most frequent reason first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for summary in summaries:
        for reason, count, sentences in summary:
            if reason not in counts and len(counts) >= REASONS:
                reason = OTHER_REASONS
            counts[reason] += count
            examples[reason] = [*examples.get(reason, []), *sentences][:EXAMPLES]
    return [(reason, count, examples[reason]) for reason, count in counts.most_common()]
