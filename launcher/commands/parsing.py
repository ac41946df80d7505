"""Command-line parsing that the commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TypeAlias

Subcommands: TypeAlias = argparse._SubParsersAction
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def command(
    commands: Subcommands, name: str, run: Callable[[argparse.Namespace], int | None], help: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a command that calls `run(options)`, with an example below its options."""
    parser = commands.add_parser(
        name, help=help, description=help, epilog=f"example: {epilog}", formatter_class=_Defaults
    )
    parser.set_defaults(run=run)
    return parser


def size(text: str) -> int:
    """Parse a size such as `500MB` or `2.5GB` into bytes, as `type=` of an argument."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]B)", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 500MB or 2GB")
    return int(float(found[1]) * UNITS[found[2].upper()])
