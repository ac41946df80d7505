"""What a check found, and the table that shows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from data_pipeline.errors import DataError
from launcher.errors import ConfigurationError

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True)
class Finding:
    """One line of the table: `level` is green, yellow (it will run, look at it) or red (it will not); how to mend it."""

    check: str
    level: str
    message: str
    fix: str = ""
    nodes: tuple[str, ...] = ()  # that it is about, where it is not about all


def refused(check: str, attempt: Callable) -> tuple[object, list[Finding]]:
    """What `attempt()` returns, or None and the red line that its one sentence makes: what is wrong, then the fix."""
    try:
        return attempt(), []
    except (ConfigurationError, DataError) as error:
        sentence = str(error)
        # The house's sentences end with the fix, after a semicolon; those of the data after a colon.
        wrong, separator, fix = sentence.rpartition("; ") if "; " in sentence else sentence.rpartition(": ")
        return None, [Finding(check, RED, wrong, fix) if separator else Finding(check, RED, sentence)]


def merge(by_node: dict[str, list[Finding]]) -> list[Finding]:
    """The findings of all nodes in the order of the checks: what all share is one line, the rest names its nodes."""
    nodes_of: dict[Finding, list[str]] = {}
    for node, findings in by_node.items():
        for finding in findings:
            nodes_of.setdefault(finding, []).append(node)
    order = list(dict.fromkeys(finding.check for findings in by_node.values() for finding in findings))
    merged = [
        Finding(f.check, f.level, f.message, f.fix, () if len(nodes) == len(by_node) else tuple(nodes))
        for f, nodes in nodes_of.items()
    ]
    return sorted(merged, key=lambda finding: order.index(finding.check))


def worst(findings: Iterable[Finding]) -> str:
    """The level of the worst finding."""
    levels = {finding.level for finding in findings}
    return next((level for level in (RED, YELLOW) if level in levels), GREEN)


def print_table(findings: list[Finding]) -> None:
    """One table on stdout; without a terminal as wide as its longest line needs, so that a log can be searched."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    # Open MPI gives its ranks a terminal of their own, wherever its output goes.
    if not console.is_terminal or "OMPI_COMM_WORLD_SIZE" in os.environ:
        console = Console(highlight=False, width=160, force_terminal=False)
    table = Table(title="preflight")
    for column in ("", "check", "what was found", "how to mend it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        where = f"on {', '.join(finding.nodes)}: " if finding.nodes else ""
        table.add_row(
            Text(finding.level, style=f"bold {finding.level}"), Text(finding.check), Text(where + finding.message),
            Text(finding.fix),
        )  # fmt: skip
    console.print(table)


def as_json(findings: list[Finding]) -> dict:
    """The findings as plain values, and the worst of their levels."""
    return {"level": worst(findings), "checks": [asdict(finding) for finding in findings]}
