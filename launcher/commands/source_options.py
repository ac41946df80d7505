"""The options of commands that read rows: which files, and which columns become which texts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.sources.files import FileChoice
    from data_pipeline.sources.layout_choice import LayoutChoice


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE, and the options that choose its files and its columns."""
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="'sample', a hub dataset, or files, folders and patterns: parquet, arrow, jsonl, json, csv, tar",
    )
    add = parser.add_argument_group("files").add_argument
    add("--split", default="train", help="the split of a hub dataset or of a folder to read (default: %(default)s)")
    add(
        "--exclude-files",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="files of a folder to leave out, by name or by path, such as '*.txt' 'raw/*'",
    )
    columns = parser.add_argument_group("columns", "Without these options, the names of the columns tell the layout.")
    add = columns.add_argument
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


def file_choice(options: argparse.Namespace) -> FileChoice:
    """Return what the options say about files."""
    from data_pipeline.sources.files import FileChoice

    return FileChoice(options.split, tuple(options.exclude_files))


def layout_choice(options: argparse.Namespace) -> LayoutChoice:
    """Return what the options say about columns."""
    from data_pipeline.sources.layout_choice import LayoutChoice

    return LayoutChoice(options.layout, options.columns, options.prompt_template, options.answer_template, options.task)


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parse `NAME=COLUMN,…`."""
    pairs = []
    for pair in text.split(","):
        name, _, column = pair.partition("=")
        if not name or not column:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form question=COLUMN,answer=COLUMN")
        pairs.append((name, column))
    return tuple(pairs)
