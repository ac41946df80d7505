"""The result of a check, and the table of results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TypeVar

from data_pipeline.errors import DataError
from launcher.errors import ConfigurationError

Result = TypeVar("Result")
GREEN, YELLOW, RED = "green", "yellow", "red"
OF_MACHINES = ("GPUs", "clocks", "links")  # checks that turn red because of a machine, never because of a setting


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    level: green; yellow (the run would work, but something needs attention); or red (the run would fail).
    fix: what to do about it.
    nodes: the nodes with this result; empty for all.
    """

    check: str
    level: str
    message: str
    fix: str = ""
    nodes: tuple[str, ...] = ()


def refused(check: str, attempt: Callable[[], Result]) -> tuple[Result | None, list[Finding]]:
    """Return the result of `attempt()`, or None and a red finding made from its error: what is wrong, and the fix."""
    try:
        return attempt(), []
    except (ConfigurationError, DataError) as error:
        sentence = str(error)
        # Error messages end with the fix, after a semicolon; those of data_pipeline after a colon.
        wrong, separator, fix = sentence.rpartition("; ") if "; " in sentence else sentence.rpartition(": ")
        return None, [Finding(check, RED, wrong, fix) if separator else Finding(check, RED, sentence)]


def merge(by_node: dict[str, list[Finding]]) -> list[Finding]:
    """Merge the findings of all nodes, in the order of the checks. Those that not all nodes share name their nodes."""
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
    """Return the level of the worst finding."""
    levels = {finding.level for finding in findings}
    return next((level for level in (RED, YELLOW) if level in levels), GREEN)


def suspects(findings: Iterable[Finding], nodes: list[str]) -> list[str] | None:
    """Return the nodes to exclude so that the run can start; None if settings have to change instead.

    If most nodes have the same red finding, the settings are to blame (for example, data on one node's local disk). If only a
    few have it, these nodes are. The list is empty if some machine is at fault but it is not known which.
    """
    found: list[str] = []
    for finding in (finding for finding in findings if finding.level == RED):
        few = 0 < len(finding.nodes) < len(nodes) / 2
        if finding.check not in OF_MACHINES and not few:
            return None
        found += finding.nodes or (nodes if len(nodes) == 1 else ())
    return list(dict.fromkeys(found))


def print_table(findings: list[Finding]) -> None:
    """Print the findings as a table; without a terminal it is 160 columns wide, so that a log can be searched."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    # Open MPI gives its ranks a pseudo-terminal even if its output goes to a file.
    if not console.is_terminal or "OMPI_COMM_WORLD_SIZE" in os.environ:
        console = Console(highlight=False, width=160, force_terminal=False)
    table = Table(title="preflight")
    for column in ("", "check", "result", "how to fix it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        unnamed = [node for node in finding.nodes if node not in finding.message]
        where = f"on {', '.join(unnamed)}: " if unnamed else ""
        table.add_row(
            Text(finding.level, style=f"bold {finding.level}"),
            Text(finding.check),
            Text(where + finding.message),
            Text(finding.fix),
        )
    console.print(table)


def as_json(findings: list[Finding], nodes: list[str]) -> dict:
    """Return the findings as plain values, their worst level and, if that is red, the result of `suspects`."""
    blamed = suspects(findings, nodes) if worst(findings) == RED else []
    return {"level": worst(findings), "suspects": blamed, "checks": [asdict(finding) for finding in findings]}
