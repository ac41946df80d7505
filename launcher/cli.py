"""Run the `lfm` command, which does everything but training itself (`deepspeed train.py`).

Heavy imports are inside the commands, so that `lfm --help` does not import torch.
"""

from __future__ import annotations

import argparse
import os
import sys

from launcher.commands.clean import add_clean
from launcher.commands.evaluate import add_evaluate
from launcher.commands.export import add_export
from launcher.commands.fetch import add_fetch
from launcher.commands.generate import add_generate
from launcher.commands.preflight import add_preflight
from launcher.commands.prepare import add_prepare
from launcher.commands.report import add_report
from launcher.commands.serve import add_serve
from launcher.commands.shard_folders import add_inspect, add_verify
from launcher.commands.submit import add_submit
from launcher.errors import one_sentence_errors

COMMANDS = (
    add_fetch,
    add_clean,
    add_prepare,
    add_verify,
    add_inspect,
    add_preflight,
    add_export,
    add_generate,
    add_evaluate,
    add_report,
    add_submit,
    add_serve,
)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.command != "fetch":
        # transformers shows a progress bar for every file; these files are read and written in an instant.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with one_sentence_errors():
        return options.run(options) or 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Accept `key=value` before and after options, as train.py does; argparse accepts only one group of them."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in text and text[0] != "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfm",
        description="Prepare data for a Liquid Foundation Model, and use the trained model.",
        epilog="Training: deepspeed train.py --deepspeed_config ds_configs/zero3.json [--config run.yaml] [key=value ...]",
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
