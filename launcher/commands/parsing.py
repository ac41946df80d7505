"""What the commands' `--help` have in common."""

from __future__ import annotations

import argparse


def command(commands, name: str, run, help: str, epilog: str) -> argparse.ArgumentParser:
    """Add a command that `run(options)` carries out, with one example below its options."""
    parser = commands.add_parser(
        name, help=help, description=help, epilog=f"example: {epilog}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser
