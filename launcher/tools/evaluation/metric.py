"""One metric of an evaluation: how it is computed, named and shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Metric(Generic[Figures]):
    """A metric of what `compute` takes.

    label, form: its name and number format in the printed table. meaning: its line in README.md.
    compute: returns None if the metric does not apply; the printed table then shows `without`.
    """

    label: str
    form: str
    meaning: str
    compute: Callable[[Figures], float | None]
    without: str = ""
