"""`lfm verify` and `lfm inspect`: check a shard folder and show its contents.

Slow imports are inside the commands, so that `lfm --help` does not wait for numpy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.commands.parsing import Subcommands, command


def add_verify(commands: Subcommands) -> None:
    """Add `lfm verify DIR` to the commands."""
    parser = command(
        commands,
        "verify",
        _verify,
        "Check the counts and hashes of a shard folder with all processors, and name every bad file.",
        "lfm verify data/sample",
    )
    parser.add_argument("folder", metavar="DIR", help="folder made by lfm prepare")
    parser.add_argument(
        "--workers",
        type=int,
        default=argparse.SUPPRESS,
        help="number of processes, each with one shard in memory (default: one per available processor)",
    )


def add_inspect(commands: Subcommands) -> None:
    """Add `lfm inspect DIR` to the commands."""
    parser = command(
        commands,
        "inspect",
        _inspect,
        "Show a shard folder's counts, lengths, fill and sources, and some rows as text.",
        "lfm inspect data/sample --rows 3 --png histograms.png",
    )
    parser.add_argument("folder", metavar="DIR", help="folder made by lfm prepare")
    parser.add_argument("--rows", type=int, default=2, help="number of random rows to show as text")
    parser.add_argument(
        "--row",
        type=int,
        action="append",
        default=argparse.SUPPRESS,
        metavar="K",
        help="show row K instead of random ones; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed that chooses the rows of --rows")
    parser.add_argument("--full", action="store_true", help="show texts and the list of sources unshortened")
    parser.add_argument(
        "--png",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="also draw histograms: a file name that ends in .png, or a folder",
    )


def _verify(options: argparse.Namespace) -> None:
    from data_pipeline.checking.verification import bytes_to_verify, verify

    total = bytes_to_verify(options.folder)
    with _bytes_bar(total, "verifying") as progress:
        index = verify(options.folder, progress, workers=getattr(options, "workers", None))
    counts = index["counts"]
    held_out = counts.get("validation_documents")
    print(
        f"{options.folder} is intact: {len(index['files']):,} shards and the tokenizer, {total / 1e6:,.1f} MB; "
        f"{counts['packed_rows']:,} rows with {counts['documents']:,} documents and {counts['tokens']:,} tokens"
        + (f"; {held_out:,} documents for validation" if held_out else "")
    )


def _inspect(options: argparse.Namespace) -> None:
    from data_pipeline.checking.inspection import choose_rows, collect_statistics, report, rows_as_text
    from data_pipeline.shards.format import read_index
    from launcher.errors import ConfigurationError

    if options.rows < 0:
        raise ConfigurationError(f"--rows is {options.rows}; it must be at least 0")
    rows = getattr(options, "row", None) or choose_rows(options.folder, options.rows, options.seed)
    texts = list(rows_as_text(options.folder, rows, options.full))  # first, since it refuses a wrong --row at once
    total = sum(entry["bytes"] for entry in read_index(Path(options.folder))["files"])
    with _bytes_bar(total, "reading") as progress:
        statistics = collect_statistics(options.folder, progress)
    print("\n\n".join([report(statistics, options.full), *texts]))
    if hasattr(options, "png"):
        from data_pipeline.checking.inspection_plots import save_histograms

        print(f"\nhistograms: {save_histograms(statistics, options.png)}")


@contextmanager
def _bytes_bar(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Show progress in bytes on stderr if it is a terminal."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=description, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        yield bar.update
