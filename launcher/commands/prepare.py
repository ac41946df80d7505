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
    add = parser.add_argument
    add(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="'sample', a hub dataset, or files, folders and patterns: parquet, arrow, jsonl, json, csv, tar",
    )
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
    files = parser.add_argument_group("files")
    add = files.add_argument
    add("--split", default="train", help="the split of a hub dataset or of a folder to read (default: %(default)s)")
    add(
        "--exclude-files",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="files of a folder to leave out, by name or by path, such as '*.txt' 'raw/*'",
    )
    add(
        "--on-bad-row",
        default="refuse",
        choices=("refuse", "skip"),
        help="end at a row that cannot be read, or skip it and count it by reason (default: %(default)s)",
    )
    layout = parser.add_argument_group(
        "columns", "Without these options, the layout follows from the names of the columns."
    )
    add = layout.add_argument
    add(
        "--layout",
        default="auto",
        metavar="NAME",
        help="question-answer, instruction (instruction, input, output), prompt-response (or completion), chat (messages or "
        "conversations), or text (default: %(default)s)",
    )
    add(
        "--columns",
        type=_pairs,
        default=(),
        metavar="NAME=COLUMN,…",
        help="the columns that stand for those of the layout, such as question=title,answer=body,source=site",
    )
    add(
        "--prompt-template",
        metavar="TEXT",
        help="make the prompt of any columns, such as 'Translate into German: {translation.en}'",
    )
    add(
        "--answer-template",
        metavar="TEXT",
        help="make the answer of any columns; without a prompt template, it is a plain text",
    )
    add(
        "--task",
        metavar="NAME",
        help="put a task around the columns: summarization (document, summary) or translation:FROM-TO, such as "
        "translation:en-de (translation.en, translation.de)",
    )
    which = parser.add_argument_group("row selection")
    add = which.add_argument
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
    from data_pipeline.sources.files import FileChoice
    from data_pipeline.sources.layout_choice import LayoutChoice

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
        files=FileChoice(options.split, tuple(options.exclude_files)),
        on_bad_row=options.on_bad_row,
        layout=LayoutChoice(
            options.layout, options.columns, options.prompt_template, options.answer_template, options.task
        ),
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


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parse `NAME=COLUMN,…`."""
    pairs = []
    for pair in text.split(","):
        name, _, column = pair.partition("=")
        if not name or not column:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form question=COLUMN,answer=COLUMN")
        pairs.append((name, column))
    return tuple(pairs)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
