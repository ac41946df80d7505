"""`lfm prepare`: clean, tokenize and pack rows into shards."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from launcher.commands.clean import add_cleaning_options, cleaning_options
from launcher.commands.parsing import Subcommands
from launcher.commands.source_options import add_source_options, file_choice, layout_choice
from launcher.team_member import detect_member

LED = "allenai/led-base-16384"
EPILOG = """\
examples:
  lfm prepare sample --out data/sample
  lfm prepare data/hub/dataset --tokenizer data/hub/tokenizer --out data/webinstruct --exclude-sources socratic
  lfm prepare rows.jsonl --out data/rows --rules no_remove_urls        (first: lfm clean rows.jsonl --show)
  lfm prepare TIGER-Lab/WebInstructSub --out data/webinstruct --near-duplicates --decontaminate gsm8k/test.jsonl
  lfm prepare chats.jsonl --columns messages=dialogue --out data/chats
  lfm prepare books/ --layout text --out data/books

Several processes or jobs can share the work on one folder; the result is byte-identical to that of one process:
  mpirun -n 4 lfm prepare ...          srun -n 4 lfm prepare ...          sbatch --array=0-7 slurm/prepare.sbatch ...
To resume an interrupted preparation, run the same command again.
"""


def add_prepare(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "prepare",
        help="Clean, tokenize and pack texts into WebDataset shards.",
        description="Clean, tokenize and pack texts into WebDataset shards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=prepare)
    add_source_options(parser)
    add = parser.add_argument_group("shards").add_argument
    add("--out", required=True, help="folder for the shards, the tokenizer and index.json")
    add(
        "--tokenizer",
        help="folder or hub name of an LED tokenizer, or 'train' to train one on the source (default: "
        f"'train' for the sample, otherwise {LED})",
    )
    add("--seq-len", type=int, help="tokens per packed row (default: 256 for the sample, otherwise 2048)")
    add("--workers", type=int, help="number of processes (default: one per available core, 1 under mpirun)")
    add("--rows-per-shard", type=int, default=4096, help="maximum packed rows per tar file (default: %(default)s)")
    add(
        "--validation-share",
        type=float,
        metavar="SHARE",
        help="share of the questions to hold out in OUT/validation (default: 0 for the sample, otherwise 0.005)",
    )
    which = parser.add_argument_group("row selection")
    add = which.add_argument
    add(
        "--on-bad-row",
        default="refuse",
        choices=("refuse", "skip"),
        help="end at a row that cannot be read, or skip it and count it by reason (default: %(default)s)",
    )
    add("--sources", nargs="+", default=(), metavar="NAME", help="keep only the rows of these sources")
    add("--exclude-sources", nargs="+", default=(), metavar="NAME", help="drop the rows of these sources")
    add(
        "--minimum-tokens",
        type=int,
        default=1,
        metavar="N",
        help="drop documents with fewer tokens (default: %(default)s)",
    )
    add(
        "--long-documents",
        default="split",
        choices=("split", "drop"),
        help="split documents that are longer than a row across several rows, or drop them (default: %(default)s)",
    )
    add(
        "--near-duplicates",
        nargs="?",
        type=float,
        const=0.8,
        metavar="SIMILARITY",
        help="drop rows whose three-word sequences have at least this Jaccard similarity to an earlier row (0.8 if no "
        "value is given); exact duplicates are always dropped",
    )
    add(
        "--decontaminate",
        nargs="+",
        default=(),
        metavar="FILE",
        help="drop rows that share a 13-word sequence with these evaluation texts (jsonl, parquet, txt)",
    )
    add(
        "--augment",
        nargs="+",
        default=(),
        metavar="NAME",
        help="add a copy of each training row in other words, for each of these that applies to it: request, number-words, "
        "swapped-operands, reversed-fact, without-courtesy (see data_pipeline/README.md)",
    )
    add_cleaning_options(parser)


def prepare(options: argparse.Namespace) -> None:
    from data_pipeline.preparation.prepare import prepare
    from data_pipeline.preparation.settings import Settings

    is_sample = options.source == ["sample"]
    settings = Settings(
        tokenizer=options.tokenizer or ("train" if is_sample else LED),
        seq_len=_given(options.seq_len, 256 if is_sample else 2048),
        rows_per_shard=options.rows_per_shard,
        sources=tuple(options.sources),
        exclude_sources=tuple(options.exclude_sources),
        minimum_tokens=options.minimum_tokens,
        long_documents=options.long_documents,
        validation_share=_given(options.validation_share, 0.0 if is_sample else 0.005),
        near_duplicates=options.near_duplicates,
        decontaminate=tuple(options.decontaminate),
        augment=tuple(options.augment),
        files=file_choice(options),
        on_bad_row=options.on_bad_row,
        layout=layout_choice(options),
        cleaning=cleaning_options(options),
    )
    member, by_mpirun = detect_member()
    workers = options.workers or (1 if by_mpirun else None)
    # Only one member of a team shows progress, for the whole team.
    with _ending_at_signals():
        index = prepare(
            options.source, options.out, settings, workers=workers, member=member, progress=member.index == 0
        )
    if member.index == 0:
        print_counts(options.out, index)


@contextmanager
def _ending_at_signals() -> Iterator[None]:
    """Exit at SIGTERM or SIGUSR1, which batch scripts send to ask for a stop; restore the handlers afterwards."""
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """On a signal, exit the same way as on an error, so that the worker processes are ended as well."""
    for again in (signal.SIGTERM, signal.SIGUSR1):  # a second signal must not interrupt the cleanup
        signal.signal(again, signal.SIG_IGN)
    print("stopped; run the same command again to resume", file=sys.stderr)
    sys.exit(128 + number)


def print_counts(folder: str, index: dict) -> None:
    """Print one line about a folder: rows read, packed and dropped (by reason), tokens, and how full the rows are."""
    counts = index["counts"]
    dropped = counts.get("rows_dropped", {})
    reasons = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in dropped.items() if number)
    validation = counts.get("validation_documents", 0)
    filled = counts["tokens"] / (counts["packed_rows"] * index["seq_len"])
    print(
        f"{folder}: {counts['rows_in']:,} rows"
        + (f" + {counts['rows_copied']:,} copies" if counts.get("rows_copied") else "")
        + f" = {counts['documents']:,} packed"
        + (f" + {validation:,} for validation" if validation else "")
        + f" + {sum(dropped.values()):,} dropped"
        + (f" ({reasons})" if reasons else "")
        + f"; {counts['tokens']:,} tokens in {counts['packed_rows']:,} packed rows of {index['seq_len']} ({filled:.1%} filled)"
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
