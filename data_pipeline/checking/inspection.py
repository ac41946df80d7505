"""The contents of a shard folder: statistics as tables, rows as text."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.checking.columns import ShardColumns, parse_shard
from data_pipeline.errors import DataError
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.loading.remote import is_remote
from data_pipeline.shards.format import TOKENIZER_FOLDER, token_dtype
from data_pipeline.shards.packing import FIRST_COPY
from data_pipeline.tokens.tokenization import special_token_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROWS_AT_ONCE = 1024
QUANTILES = (5, 25, 50, 75, 95, 100)
SOURCES_IN_TABLE = 20
NAME_WIDTH = 40
TEXT_HEAD, TEXT_TAIL = 280, 80  # characters kept at the two ends of a long text


@dataclass(frozen=True)
class Statistics:
    """The statistics of a folder. They take 32 bytes per document and 16 per row, whatever the length of the texts.

    document_tokens, prompt_tokens, answer_tokens, document_sources: int64 `[documents]`. Prompts and answers are without
    `<s>`, `<sep>` and `</s>`; a plain text is an answer without a prompt.
    turns: the number of turns in all documents.
    row_tokens, row_pieces: int64 `[rows]`.
    source_fill: float64 `[sources]`, the mean fill of the rows that a source's tokens are in.
    used_ids: bool `[vocab_size]`.
    """

    path: Path
    index: dict
    source_names: list[str]
    document_tokens: np.ndarray
    prompt_tokens: np.ndarray
    answer_tokens: np.ndarray
    document_sources: np.ndarray
    turns: int
    row_tokens: np.ndarray
    row_pieces: np.ndarray
    source_fill: np.ndarray
    used_ids: np.ndarray

    @cached_property
    def source_tokens(self) -> np.ndarray:
        """Tokens of each source, float64 `[sources]`."""
        return np.bincount(self.document_sources, self.document_tokens, len(self.source_names))


def collect_statistics(path: str | os.PathLike, progress: Callable[[int], None] | None = None) -> Statistics:
    """Read a shard folder once, shard by shard, and return its statistics.

    Needs memory for one shard and about 120 bytes per document.
    progress: called with the size in bytes of each tar once it is done.
    Raises DataError if the folder breaks the format. File hashes are not checked; `verify` does that.
    """
    if is_remote(path):
        raise DataError(f"{path} is not on this machine: copy the folder and inspect the copy")
    folder = ShardFolder(path)
    used = np.zeros(folder.vocab_size, dtype=bool)
    names = _source_names(folder)
    source_tokens, source_fill = np.zeros((2, len(names)))
    special = special_token_ids(_tokenizer_folder(folder))
    turns, pieces, row_tokens, row_pieces = 0, [], [], []
    for entry in folder.index["files"]:
        shard = _read_shard(folder, entry)
        for first in range(0, len(shard.row_ends), ROWS_AT_ONCE):
            used[shard.tokens(first, first + ROWS_AT_ONCE)] = True
        starts, answer_starts, ends, sources, input_rows, _ = shard.spans.T
        if sources.max() >= len(names):
            raise DataError(
                f"{folder.path / entry['name']} has a source without a name: run `lfm verify` on the folder"
            )
        opened, closed = shard.tokens_at(starts) == special["bos"], shard.tokens_at(ends - 1) == special["eos"]
        before_answer = shard.tokens_at(np.maximum(answer_starts - 1, starts))
        separated = (answer_starts > starts) & (before_answer == special["sep"])
        prompts, answers = answer_starts - starts - opened - separated, ends - answer_starts - closed
        parts = np.stack([ends - starts, prompts, answers, sources]).astype(np.int32)
        turns += int(opened.sum())
        pieces.append((input_rows.copy(), parts))  # a view would keep all spans in memory
        row_tokens.append(shard.row_ends)
        row_pieces.append(np.bincount(shard.piece_rows))
        lengths, fill = ends - starts, shard.row_ends[shard.piece_rows] / folder.seq_len
        source_tokens += np.bincount(sources, lengths, len(names))
        source_fill += np.bincount(sources, lengths * fill, len(names))
        if progress:
            progress(entry["bytes"])
    documents, prompts, answers, sources = _join_pieces(
        *(np.concatenate(part, axis=-1) for part in zip(*pieces, strict=True))
    )
    return Statistics(
        path=folder.path,
        index=folder.index,
        source_names=names,
        document_tokens=documents,
        prompt_tokens=prompts,
        answer_tokens=answers,
        document_sources=sources,
        turns=turns,
        row_tokens=np.concatenate(row_tokens),
        row_pieces=np.concatenate(row_pieces),
        source_fill=np.divide(source_fill, source_tokens, out=np.zeros(len(names)), where=source_tokens > 0),
        used_ids=used,
    )


def _read_shard(folder: ShardFolder, entry: dict) -> ShardColumns:
    try:
        tar = np.fromfile(folder.path / entry["name"], dtype=np.uint8)
        offsets = np.load(io.BytesIO((folder.path / entry["offsets"]["name"]).read_bytes()), allow_pickle=False)
        return parse_shard(entry["name"], tar, offsets, folder.seq_len, token_dtype(folder.vocab_size))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder.path / entry['name']} cannot be read: run `lfm verify` on the folder ({error})"
        ) from error


def _join_pieces(input_rows: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sum the pieces of each document; return all its tokens, prompt and answer tokens, and source, int64 `[documents]`.

    parts: int32 `[4, pieces]`: tokens, tokens of the prompt, tokens of the answer, source.
    """
    order = np.argsort(input_rows, kind="stable")
    input_rows = input_rows[order]
    begins = np.flatnonzero(np.diff(input_rows, prepend=-1))
    sums = (np.add.reduceat(column[order], begins, dtype=np.int64) for column in parts[:3])
    return *sums, parts[3][order][begins].astype(np.int64)


def _tokenizer_folder(folder: ShardFolder) -> Path:
    # A validation folder may use the tokenizer of its parent folder.
    homes = (folder.tokenizer_path, folder.path.parent / TOKENIZER_FOLDER)
    return next((home for home in homes if home.is_dir()), homes[0])


def _source_names(folder: ShardFolder) -> list[str]:
    return [name or "(no name)" for name in folder.sources]


# Tables


def report(statistics: Statistics, full: bool = False) -> str:
    """Return all tables of a folder as text. full: list every source, not only the largest."""
    return "\n\n".join((summary_table(statistics), length_table(statistics), source_table(statistics, full)))


def summary_table(statistics: Statistics) -> str:
    """Return rows, documents, tokens, fill, vocabulary and dropped rows as a table."""
    index, rows, pieces = statistics.index, len(statistics.row_tokens), statistics.row_pieces
    documents, tokens = len(statistics.document_tokens), int(statistics.row_tokens.sum())
    room = rows * index["seq_len"]
    continued = int(pieces.sum()) - statistics.turns
    used = int(statistics.used_ids.sum())
    lines = [
        ("packed rows", f"{rows:,} of {index['seq_len']:,} tokens, in {_count(len(index['files']), 'shard')}"),
        ("documents", f"{documents:,}"),
        ("turns", f"{statistics.turns:,} ({statistics.turns / documents:.1f} per document)"),
        ("tokens", f"{tokens:,} of {room:,} ({tokens / room:.2%} filled)"),
        ("pieces per row", f"{pieces.mean():.1f} ({pieces.min()} to {pieces.max()})"),
        ("continued pieces", f"{continued:,} of {pieces.sum():,} ({continued / pieces.sum():.2%})"),
        ("vocabulary", f"{index['vocab_size']:,} ids, {used:,} of them used ({used / index['vocab_size']:.1%})"),
    ]
    counts = index["counts"]
    if "rows_in" in counts:
        lines.append(("rows read", f"{counts['rows_in']:,}"))
    if counts.get("rows_copied"):
        lines.append(("copies made", f"{counts['rows_copied']:,}"))
    if "rows_dropped" in counts:
        dropped = {reason.replace("_", " "): number for reason, number in counts["rows_dropped"].items() if number}
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())
        lines.append(("rows dropped", f"{sum(dropped.values()):,}" + (f" ({reasons})" if dropped else "")))
    if "validation_documents" in counts:
        lines.append(("held out", f"{counts['validation_documents']:,} documents for validation"))
    width = max(len(name) for name, _ in lines)
    return "\n".join([str(statistics.path), *(f"  {name:{width}}  {value}" for name, value in lines)])


def length_table(statistics: Statistics) -> str:
    """Return quantiles of the lengths of documents, prompts and answers in tokens, as a table."""
    header = ["tokens", "mean", *(f"p{quantile}" for quantile in QUANTILES[:-1]), "max"]
    rows = []
    for name in ("document", "prompt", "answer"):
        lengths = getattr(statistics, f"{name}_tokens")
        quantiles = np.percentile(lengths, QUANTILES, method="inverted_cdf")
        rows.append([name, f"{lengths.mean():,.1f}", *(f"{quantile:,.0f}" for quantile in quantiles)])
    return _table(header, rows)


def source_table(statistics: Statistics, full: bool = False) -> str:
    """Return documents, tokens, mean lengths and fill of every source as a table, the largest first."""
    header = ["source", "documents", "tokens", "share", "mean prompt", "mean answer", "row fill"]
    tokens = statistics.source_tokens
    count = len(tokens)
    documents, prompts, answers = (
        np.bincount(statistics.document_sources, weights, count)
        for weights in (None, statistics.prompt_tokens, statistics.answer_tokens)
    )
    order = np.argsort(-tokens, kind="stable")
    named = order if full or count <= SOURCES_IN_TABLE + 1 else order[:SOURCES_IN_TABLE]
    groups = [(statistics.source_names[source], [source]) for source in named]
    if len(named) < count:
        groups.append((f"… {count - len(named)} smaller sources", order[len(named) :].tolist()))
    rows = []
    for name, sources in groups:
        its_documents, its_tokens = max(1, documents[sources].sum()), tokens[sources].sum()
        fill = statistics.source_fill[sources] @ tokens[sources] / max(1, its_tokens)
        means = (column[sources].sum() / its_documents for column in (prompts, answers))
        rows.append(
            [shorten_name(name), f"{documents[sources].sum():,.0f}", f"{its_tokens:,.0f}"]
            + [f"{its_tokens / tokens.sum():.1%}", *(f"{mean:,.1f}" for mean in means), f"{fill:.2%}"]
        )
    return _table(header, rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:{'>' if place else '<'}{widths[place]}}" for place, cell in enumerate(row)).rstrip()
        for row in (header, ["─" * width for width in widths], *rows)
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def shorten_name(name: str) -> str:
    """Replace the middle of a long source name by an ellipsis."""
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 13]}…{name[-12:]}"


def _shorten_text(text: str) -> str:
    left_out = len(text) - TEXT_HEAD - TEXT_TAIL
    if left_out <= TEXT_TAIL:  # too little to be worth shortening
        return text
    return f"{text[:TEXT_HEAD]} [… {left_out:,} characters …] {text[-TEXT_TAIL:]}"


# Rows


def choose_rows(path: str | os.PathLike, count: int, seed: int) -> list[int]:
    """Draw up to `count` different rows of a folder, in ascending order; the same seed gives the same rows."""
    num_rows = ShardFolder(path).num_rows
    return sorted(np.random.default_rng(seed).choice(num_rows, min(count, num_rows), replace=False).tolist())


def rows_as_text(path: str | os.PathLike, rows: Sequence[int], full: bool = False) -> Iterator[str]:
    """Yield each row as text, decoded by the folder's own tokenizer, with special tokens.

    full: do not shorten long texts. Raises DataError if a row does not exist.
    """
    from tokenizers import Tokenizer

    folder = ShardFolder(path)
    for row in rows:
        if not 0 <= row < folder.num_rows:
            raise DataError(f"{folder.path} has no row {row}: its rows are 0 to {folder.num_rows - 1}")
    tokenizer = Tokenizer.from_file(str(_tokenizer_folder(folder) / "tokenizer.json"))
    for row in rows:
        yield _row_as_text(folder, tokenizer, row, full)


def _name_of(input_row: int) -> str:
    copy, row = divmod(input_row, FIRST_COPY)
    return f"input row {row}" + (f", copy {copy}" if copy else "")


def _row_as_text(folder: ShardFolder, tokenizer: "Tokenizer", row: int, full: bool) -> str:
    tokens, spans = folder.read(row)
    names = _source_names(folder)
    lines = [f"row {row}: {_count(len(spans), 'piece')}, {spans[-1, 2]:,} of {folder.seq_len:,} tokens"]
    for number, (start, answer_start, end, source, input_row, offset) in enumerate(spans.tolist(), 1):
        begins = f", continues at token {offset:,} of its document" if offset else ""
        lines.append(
            f"  {number:>3}  {names[source]}, {_name_of(input_row)}, tokens {start:,} to {end - 1:,}, "
            f"{end - answer_start:,} of them in the answer{begins}"
        )
        for ids in (tokens[start:answer_start], tokens[answer_start:end]):
            if len(ids):
                text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
                text = text if full else _shorten_text(text)
                lines += [f"       {line}" for line in text.split("\n")]
    return "\n".join(lines)
