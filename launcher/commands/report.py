"""`lfm report`: write an HTML report of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands.parsing import Subcommands, command


def add_report(commands: Subcommands) -> None:
    """Add `lfm report` to the commands."""
    parser = command(
        commands,
        "report",
        _report,
        "Write a run's curves, expert load, sampled answers and environment as one HTML page.",
        "lfm report runs/sample",
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument("--out", default=argparse.SUPPRESS, help="file to write (default: report.html in RUN)")


def _report(options: argparse.Namespace) -> None:
    from launcher.tools.report import write_report

    run = Path(options.run_folder)
    print(f"the report is in {write_report(run, Path(getattr(options, 'out', run / 'report.html')))}")
