"""`lfm export`: a run as a Hugging Face folder."""

from __future__ import annotations

import argparse

from launcher.commands.parsing import command


def add_export(commands) -> None:
    """Add `lfm export` to the commands."""
    parser = command(
        commands, "export", _export, "Write a run's checkpoint as a Hugging Face folder.",
        "lfm export runs/sample --out runs/sample/export",
    )  # fmt: skip
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out", required=True, default=argparse.SUPPRESS, help="folder to write; an earlier export there is replaced"
    )
    parser.add_argument(
        "--tag", default="auto", help="which checkpoint; auto is the newest whole one, best the best by validation"
    )


def _export(options) -> None:
    from launcher.export.export import export

    print(f"the model is in {export(options.run_folder, options.out, options.tag)}")
