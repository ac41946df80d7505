"""`lfm report`: one HTML page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands.parsing import command


def add_report(commands) -> None:
    """Add `lfm report` to the commands."""
    parser = command(
        commands, "report", _report,
        "Write one HTML page of a run: its curves, expert load, sampled answers and environment.", "lfm report runs/sample",
    )  # fmt: skip
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument("--out", default=argparse.SUPPRESS, help="the file to write (default: report.html in RUN)")


def _report(options) -> None:
    from launcher.tools.report import write_report

    run = Path(options.run_folder)
    print(f"the report is in {write_report(run, Path(getattr(options, 'out', run / 'report.html')))}")
