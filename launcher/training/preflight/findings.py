"""What a check found, and the table that shows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from data_pipeline.errors import DataError
from launcher.errors import ConfigurationError

GREEN, YELLOW, RED = "green", "yellow", "red"
OF_MACHINES = ("GPUs", "clocks", "links")  # checks that no setting turns red


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


def suspects(findings: Iterable[Finding], nodes: list[str]) -> list[str] | None:
    """The nodes without which the run would start, where that alone is wrong; None where settings have to change.

    What most nodes find wrong is a matter of settings, such as data on one node's own disk; what a few do, of theirs. The
    list is empty where machines are at fault and it is not known which.
    """
    found = []
    for finding in (finding for finding in findings if finding.level == RED):
        few = 0 < len(finding.nodes) < len(nodes) / 2
        if finding.check not in OF_MACHINES and not few:
            return None
        found += finding.nodes or (nodes if len(nodes) == 1 else ())
    return list(dict.fromkeys(found))


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
        unnamed = [node for node in finding.nodes if node not in finding.message]
        where = f"on {', '.join(unnamed)}: " if unnamed else ""
        table.add_row(
            Text(finding.level, style=f"bold {finding.level}"), Text(finding.check), Text(where + finding.message),
            Text(finding.fix),
        )  # fmt: skip
    console.print(table)


def as_json(findings: list[Finding], nodes: list[str]) -> dict:
    """The findings as plain values, the worst of their levels, and where it is red, whom `suspects` names."""
    blamed = suspects(findings, nodes) if worst(findings) == RED else []
    return {"level": worst(findings), "suspects": blamed, "checks": [asdict(finding) for finding in findings]}
