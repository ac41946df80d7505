"""The `lfm` command: everything but training itself, which is `deepspeed train.py`.

Imports stand inside the commands: `lfm --help` must not wait for torch.
"""

from __future__ import annotations

import argparse
import os
import sys

from launcher.commands.evaluate import add_evaluate
from launcher.commands.export import add_export
from launcher.commands.fetch import add_fetch
from launcher.commands.generate import add_generate
from launcher.commands.prepare import add_prepare
from launcher.commands.report import add_report
from launcher.commands.serve import add_serve
from launcher.commands.shard_folders import add_inspect, add_verify
from launcher.commands.submit import add_submit
from launcher.errors import one_sentence_errors

COMMANDS = (
    add_fetch,
    add_prepare,
    add_verify,
    add_inspect,
    add_export,
    add_generate,
    add_evaluate,
    add_report,
    add_submit,
    add_serve,
)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command != "fetch":
        # transformers draws a bar for every file that it reads or writes, here over in an instant.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with one_sentence_errors():
        return options.run(options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfm",
        description="Prepare data for, and use, a Liquid Foundation Model.",
        epilog="Training: deepspeed train.py --deepspeed_config ds_configs/zero3.json [--config run.yaml] [key=value ...]",
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
