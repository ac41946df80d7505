"""`lfm export`: write a run as a Hugging Face folder."""

from __future__ import annotations

import argparse
import signal
import sys

from launcher.commands.parsing import Subcommands, command, size


def add_export(commands: Subcommands) -> None:
    """Add `lfm export` to the commands."""
    parser = command(
        commands,
        "export",
        _export,
        "Write a run's checkpoint as a Hugging Face folder: weights, configuration, tokenizer and a model card.",
        "lfm export runs/sample --out runs/sample/export --dtype bf16",
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", required=True, default=argparse.SUPPRESS, help="folder to write; an earlier export there is replaced"
    )
    parser.add_argument(
        "--tag", default="auto", help="checkpoint: a tag, 'auto' for the newest whole one, or 'best' by validation"
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        choices=("bf16", "fp16", "fp32"),
        help="data type of the weights; fp32 is what the optimizer keeps, bf16 and fp16 take half the space",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default="2GB",
        metavar="SIZE",
        help="maximum size of a weights file, such as 500MB",
    )
    parser.add_argument(
        "--custom-code",
        action="store_true",
        help="add the model's code, for loading with trust_remote_code=True without this project installed",
    )


def _export(options: argparse.Namespace) -> None:
    from launcher.tools.export.export import export

    # Turn SIGTERM into an exit, so that partial output is removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        out = export(
            options.run_folder, options.out, options.tag, options.dtype, options.max_shard_size, options.custom_code
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"the model is in {out}")
