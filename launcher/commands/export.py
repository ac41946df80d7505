"""`lfm export`: a run as a Hugging Face folder."""

from __future__ import annotations

import argparse
import signal
import sys

from launcher.commands.parsing import command, size


def add_export(commands) -> None:
    """Add `lfm export` to the commands."""
    parser = command(
        commands, "export", _export,
        "Write a run's checkpoint as a Hugging Face folder: weights, configuration, tokenizer and a model card.",
        "lfm export runs/sample --out runs/sample/export --dtype bf16",
    )  # fmt: skip
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out", required=True, default=argparse.SUPPRESS, help="folder to write; an earlier export there is replaced"
    )
    parser.add_argument(
        "--tag", default="auto", help="which checkpoint; auto is the newest whole one, best the best by validation"
    )
    parser.add_argument(
        "--dtype", default="fp32", choices=("bf16", "fp16", "fp32"),
        help="of the weights; fp32 is what the optimizer keeps, bf16 takes half the space",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", type=size, default="2GB", metavar="SIZE", help="of one file of weights, such as 500MB"
    )
    parser.add_argument(
        "--custom-code", action="store_true",
        help="put the model's code beside the weights, for trust_remote_code=True where this project is not installed",
    )  # fmt: skip


def _export(options) -> None:
    from launcher.tools.export.export import export

    # An exit, so that what is half written is cleared away.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        out = export(
            options.run_folder, options.out, options.tag, options.dtype, options.max_shard_size, options.custom_code
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"the model is in {out}")
