"""`lfm clean`: show what the cleaning rules would change in a sample of rows, before a corpus is prepared."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice
from typing import TYPE_CHECKING

from launcher.commands.parsing import Subcommands, command
from launcher.commands.source_options import add_source_options, file_choice, layout_choice

if TYPE_CHECKING:
    from data_pipeline.cleaning.clean import CleaningOptions
    from data_pipeline.cleaning.effects import Effect
    from data_pipeline.preparation.row_texts import RowTexts

RED, GREEN, BOLD, PLAIN = "\033[31m", "\033[32m", "\033[1m", "\033[0m"
CHUNKS = 16  # that the sample is taken from


def add_cleaning_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how texts are cleaned."""
    add = parser.add_argument_group("cleaning").add_argument
    add("--newlines", default="keep", choices=("keep", "space"),
        help="keep line breaks, or replace them with spaces (default: %(default)s)")  # fmt: skip
    add("--unicode-form", default="NFC", choices=("NFC", "NFKC"),
        help="Unicode normalization; NFKC also turns x² into x2 (default: %(default)s)")  # fmt: skip
    add("--rules", nargs="+", default=argparse.SUPPRESS, metavar="RULE",
        help="the only cleaning rules to apply, or, with no_ before each name, the rules to leave out, or none: "
        "fix_mojibake, remove_control_characters, normalize_unicode, unescape_html, remove_tags, remove_urls, "
        "normalize_whitespace (all are applied if the option is not given)")  # fmt: skip


def cleaning_options(options: argparse.Namespace) -> CleaningOptions:
    """Return the CleaningOptions that the options of the command line ask for."""
    from data_pipeline.cleaning.clean import CleaningOptions, without_rules

    without = without_rules(getattr(options, "rules", ()))
    return CleaningOptions(unicode_form=options.unicode_form, newlines=options.newlines, without=without)


def add_clean(commands: Subcommands) -> None:
    """Add `lfm clean SOURCE` to the commands."""
    parser = command(
        commands, "clean", _clean, "Count what each cleaning rule would change in a sample of rows, and show the changes.",
        "lfm clean data/hub/dataset --show --rows 5000 --rules no_remove_urls",
    )  # fmt: skip
    add_source_options(parser)
    parser.add_argument("--rows", type=int, default=1000, help="rows in the sample")
    parser.add_argument("--seed", type=int, default=0, help="seed that chooses the rows")
    parser.add_argument("--show", action="store_true", help="show the changes, in colour on a terminal")
    parser.add_argument("--examples", type=int, default=10, help="texts to show for each rule")
    add_cleaning_options(parser)


def _clean(options: argparse.Namespace) -> None:
    import polars as pl

    from data_pipeline.cleaning.effects import effects
    from launcher.errors import ConfigurationError

    for name in ("rows", "examples"):
        if getattr(options, name) < 1:
            raise ConfigurationError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    cleaning = cleaning_options(options)
    rows = _sample(options)
    texts = pl.concat([column.rename("text") for column in rows.columns()])
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"{len(rows):,} rows, {len(texts):,} texts; texts that each rule changes:\n")
    shown = []
    for effect in effects(texts, cleaning):
        print(f"{effect.rule:27}{len(effect.rows):8,}{len(effect.rows) / max(len(texts), 1):8.1%}")
        shown.append(effect)
    for effect in shown if options.show else ():
        if effect.rows:
            print("\n" + _coloured(f"{effect.rule} (-removed- and +added+)", BOLD, colours))
            _print_examples(effect, options.examples, options.seed, colours)


def _print_examples(effect: Effect, count: int, seed: int, colours: bool) -> None:
    import random

    from data_pipeline.cleaning.effects import changes, visible

    chosen = sorted(random.Random(seed).sample(range(len(effect.rows)), min(count, len(effect.rows))))
    for place in chosen:
        for change in islice(changes(effect.before[place], effect.after[place]), 3):
            removed = (
                visible(change.removed)
                if change.removed.isspace() or not change.removed.isprintable()
                else change.removed
            )
            added = visible(change.added) if change.added.isspace() else change.added
            removed = _coloured(removed if colours else f"[-{removed}-]", RED, colours) if removed else ""
            added = _coloured(added if colours else f"{{+{added}+}}", GREEN, colours) if added else ""
            left, right = change.left.replace("\n", "⏎"), change.right.replace("\n", "⏎")
            print(f"  {left}{removed}{added}{right}".replace("⏎\n", "⏎"))


def _coloured(text: str, colour: str, colours: bool) -> str:
    return f"{colour}{text}{PLAIN}" if colours else text


def _sample(options: argparse.Namespace) -> RowTexts:
    """Return random rows from chunks all over the source; rows that cannot be read are passed over."""
    import random

    import numpy as np
    import polars as pl

    from data_pipeline.errors import DataError
    from data_pipeline.preparation.row_texts import RowTexts
    from data_pipeline.sources.bad_rows import BadRows
    from data_pipeline.sources.source import open_source

    opened = open_source(options.source, layout_choice(options), file_choice(options))
    generator = random.Random(options.seed)
    chunks = sorted(generator.sample(range(len(opened.chunks)), min(CHUNKS, len(opened.chunks))))
    frames: list[pl.DataFrame] = []
    for number in chunks:
        frames += islice(opened.chunks[number].frames(opened.layout, BadRows("skip")), 4)
    texts = RowTexts.of(pl.concat(frames)) if frames else None
    good = np.flatnonzero(~texts.are_bad()).tolist() if texts else []
    if texts is None or not good:
        raise DataError(f"the source {opened.name} has no rows: check its files")
    return texts.rows(np.array(sorted(generator.sample(good, min(options.rows, len(good))))))
