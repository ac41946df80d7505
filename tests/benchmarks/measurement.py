"""The results of benchmarks: our figures beside those of a peer or a limit, measured in turns in the same run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The options of a run: its sizes, its scratch folder, and real rows instead of made-up ones.

    `scratch` is shared by all benchmarks of a run. `data` and `tokenizer` are both given, or neither.
    """

    scratch: Path
    quick: bool = False
    data: Path | None = None
    tokenizer: Path | None = None

    def repeats(self, usual: int) -> int:
        """Return how often to measure: `usual` times, or twice in a quick run."""
        return 2 if self.quick else usual

    def to_json(self) -> dict:
        """Return plain values; `from_json` reads them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict) -> Options:
        """Read what `to_json` returned."""
        paths = {name: values[name] and Path(values[name]) for name in ("scratch", "data", "tokenizer")}
        return cls(**{**values, **paths})


@dataclass(frozen=True)
class Goal:
    """A bound on ours / peer, or on ours - peer in the row's unit if `of_difference`."""

    at_least: float | None = None
    at_most: float | None = None
    of_difference: bool = False

    def is_met(self, ours: float, peer: float) -> bool:
        """Compare two medians with the bounds."""
        value = ours - peer if self.of_difference else ours / peer
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `ours` and `theirs` have the same length and the unit `unit`; figures at the same index were measured one right after
    the other. `not_run` says why there are no figures of the peer, or none of both.
    """

    what: str
    unit: str
    ours: Sequence[float]
    peer: str
    theirs: Sequence[float] = ()
    goal: Goal | None = None
    not_run: str = ""

    @property
    def ratio(self) -> float | None:
        """The median of the turns' ratios, ours / peer: a machine that slows down for a while slows down both."""
        if not self.theirs:
            return None
        return statistics.median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))

    @property
    def meets_goal(self) -> bool | None:
        """Whether the goal is met; None if there is no goal, or nothing to compare with."""
        if self.goal is None or not self.theirs:
            return None
        if self.goal.of_difference:
            return self.goal.is_met(statistics.median(self.ours), statistics.median(self.theirs))
        return self.goal.is_met(self.ratio, 1.0)

    @classmethod
    def from_json(cls, values: dict) -> Row:
        """Read what `dataclasses.asdict` made of a row."""
        return cls(**{**values, "goal": values["goal"] and Goal(**values["goal"])})


@dataclass(frozen=True)
class Result:
    """One benchmark's rows and the seconds it took; `error` says why it failed."""

    name: str
    seconds: float
    rows: Sequence[Row] = field(default_factory=list)
    error: str = ""

    def to_json(self) -> dict:
        """Return plain values, with each row's ratio for readers of the file."""
        rows = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in self.rows]
        return {"seconds": round(self.seconds, 1), "error": self.error, "rows": rows}


def take_turns(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each way in turn, `repeats` times; return the results of each, in order."""
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            figures[name].append(way())
    return figures


def seconds_of(function: Callable[[], object]) -> float:
    """Call a function and return the seconds it took by the clock."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def cpu_seconds_of(function: Callable[[], object]) -> float:
    """Call a function and return the processor time that this process spent on it."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def rates(amount: float, seconds: Sequence[float]) -> list[float]:
    """Return amounts per second."""
    return [amount / each for each in seconds]
