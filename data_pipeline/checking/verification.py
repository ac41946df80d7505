"""Verify that a shard folder matches its index: hash every byte, and count every row, document and token."""

import hashlib
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.checking.columns import ShardColumns, broken, parse_shard, require
from data_pipeline.checking.piece_ledger import PieceLedger, ShardPieces, shard_pieces
from data_pipeline.errors import DataError
from data_pipeline.loading.integrity import check_index
from data_pipeline.loading.remote import is_remote
from data_pipeline.preparation.team import available_cores
from data_pipeline.shards.format import (
    INDEX_NAME,
    TOKENIZER_FOLDER,
    VALIDATION_FOLDER,
    files_of,
    read_index,
    token_dtype,
)
from data_pipeline.shards.packing import FIRST_COPY
from data_pipeline.tokens.tokenization import special_token_ids

# Starting a process takes as long as checking this many bytes.
BYTES_WORTH_A_PROCESS = 2**26
# The tokens of this many rows stay in the processor's cache while they are checked.
ROWS_AT_ONCE = 256
NAMED_PROBLEMS = 50


@dataclass(frozen=True)
class _Rules:
    """What the index and the tokenizer require of every shard: sizes, counts and the ids of special tokens."""

    seq_len: int
    vocab_size: int
    num_sources: int
    rows_in: int | None
    pad: int
    bos: int
    sep: int
    eos: int


@dataclass(frozen=True)
class _ShardReport:
    """The result for one shard: its problems. There are none if it was only hashed, or if it is a `_SoundShard`."""

    folder: Path
    entry: dict
    problems: list[str]


@dataclass(frozen=True)
class _SoundShard(_ShardReport):
    """The result for a shard that was checked and has no problems: its contents."""

    tokens: int
    pieces: ShardPieces


def verify(
    path: str | os.PathLike, progress: Callable[[int], None] | None = None, *, workers: int | None = None
) -> dict:
    """Hash every file of a shard folder, check and count its contents, and return its index.

    The folder's `validation` folder, if there is one, is also verified.
    progress: called with the size in bytes of each file once it is checked.
    workers: processes that check whole shards; each needs memory for one shard. The default is one per core that this
    process may use, and fewer for small folders.
    Raises DataError with the names of all bad files.
    """
    path = _local(path)
    indexes = _indexes(path)
    problems, shards = [], []
    for folder, index in indexes.items():
        for entry in index["tokenizer"]["files"]:
            problems += _problems_of(folder, entry, _no_contents)
            _report(progress, entry)
        problems += _strangers(folder, index)
        if index["tokenizer"]["fingerprint"] != indexes[path]["tokenizer"]["fingerprint"]:
            problems.append(
                f"{folder / INDEX_NAME} has a different tokenizer than {path / INDEX_NAME}: prepare both again"
            )
    for folder, index in indexes.items():
        # Checking rows takes the special tokens. If the tokenizer files are bad, the shards are only hashed.
        rules = None if problems else _rules(path, indexes[path], index)
        shards += [(folder, entry, rules) for entry in index["files"]]
    sound = []
    for report in _check_shards(shards, _process_count(workers, indexes)):
        if isinstance(report, _SoundShard):
            sound.append(report)
        problems += report.problems
        _report(progress, report.entry, report.entry["offsets"])
    if not problems:  # then all shards are sound
        problems += _count_problems(path, indexes, sound) or _document_problems(sound)
    if problems:
        raise DataError(_message(path, problems))
    return indexes[path]


def bytes_to_verify(path: str | os.PathLike) -> int:
    """Return the sum of the sizes that `verify` reports to `progress`."""
    return sum(entry["bytes"] for index in _indexes(_local(path)).values() for entry in files_of(index))


def _local(path: str | os.PathLike) -> Path:
    if is_remote(path):
        raise DataError(f"{path} is not on this machine: copy the folder and verify the copy")
    return Path(path)


def _indexes(path: Path) -> dict[Path, dict]:
    folders = [path, path / VALIDATION_FOLDER] if (path / VALIDATION_FOLDER).is_dir() else [path]
    indexes = {folder: read_index(folder) for folder in folders}
    for folder, index in indexes.items():
        check_index(str(folder), index)
    return indexes


def _report(progress: Callable[[int], None] | None, *entries: dict) -> None:
    if progress:
        for entry in entries:
            progress(entry["bytes"])


def _message(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    named = "".join(f"\n  {problem}" for problem in problems[:NAMED_PROBLEMS])
    rest = len(problems) - NAMED_PROBLEMS
    return f"{path} has {len(problems)} faults:{named}" + (f"\n  and {rest} more" if rest > 0 else "")


# Files


def _problems_of(folder: Path, entry: dict, keep: Callable[[np.ndarray], None]) -> list[str]:
    """Compare a file with its index entry. If it is unchanged, pass its bytes, uint8 `[bytes]`, to `keep`."""
    path = folder / entry["name"]
    try:
        # Read instead of memory-mapped: with a map, a bad sector would kill the process without naming the file.
        data = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        return [f"{path} is missing, but the index lists it: copy or prepare the folder again"]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror or error}): copy or prepare it again"]
    if len(data) != entry["bytes"]:
        return [f"{path} has {len(data)} bytes, but the index says {entry['bytes']}: copy or prepare it again"]
    if hashlib.sha256(data.data).hexdigest() != entry["sha256"]:
        return [f"{path} has changed since it was written: copy or prepare it again"]
    keep(data)
    return []


def _no_contents(_: np.ndarray) -> None:
    """Ignore the bytes of a file that is only hashed."""


def _strangers(folder: Path, index: dict) -> list[str]:
    """Find tars that are not in the index: a WebDataset reader that opens `*.tar` would read them."""
    known = {entry["name"] for entry in index["files"]}
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    return [f"{folder / name} is not in the index: move it away" for name in strangers]


def _rules(path: Path, main_index: dict, index: dict) -> _Rules:
    """Combine a folder's index, the main index and the special tokens into rules."""
    ids = special_token_ids(path / TOKENIZER_FOLDER)
    return _Rules(
        seq_len=index["seq_len"],
        vocab_size=index["vocab_size"],
        num_sources=len(index["sources"]),
        rows_in=main_index["counts"].get("rows_in"),  # None for a validation folder verified by itself
        pad=index["tokenizer"]["pad_token_id"],
        bos=ids["bos"],
        sep=ids["sep"],
        eos=ids["eos"],
    )


# Shards


def _process_count(workers: int | None, indexes: dict[Path, dict]) -> int:
    entries = [entry for index in indexes.values() for entry in index["files"]]
    if workers is None:
        worth = -(-sum(entry["bytes"] for entry in entries) // BYTES_WORTH_A_PROCESS)
        workers = min(available_cores(), worth)
    elif workers < 1:
        raise DataError(f"workers is {workers}: give at least 1")
    return min(workers, len(entries))


def _check_shards(shards: list[tuple[Path, dict, _Rules | None]], processes: int) -> Iterator[_ShardReport]:
    """Yield the report of each shard as soon as it is done."""
    if processes <= 1:
        yield from (_check_shard(*shard) for shard in shards)
        return
    # Fork would copy the threads and locks of the caller.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_check_shard, *shard) for shard in shards]):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that verified shards was killed, probably for lack of memory: run again with fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _check_shard(folder: Path, entry: dict, rules: _Rules | None) -> _ShardReport:
    contents: list[np.ndarray] = []
    problems = _problems_of(folder, entry, contents.append)
    problems += _problems_of(folder, entry["offsets"], contents.append)
    if problems or rules is None:
        return _ShardReport(folder, entry, problems)
    tar, offsets_file = contents
    try:
        offsets = np.load(io.BytesIO(offsets_file.data), allow_pickle=False)
    except ValueError as error:
        return _ShardReport(
            folder, entry, [f"{folder / entry['offsets']['name']} is not a numpy array: prepare it again ({error})"]
        )
    try:
        shard = parse_shard(entry["name"], tar, offsets, rules.seq_len, token_dtype(rules.vocab_size))
        if len(shard.row_ends) != entry["rows"]:
            broken(entry["name"], f"it has {len(shard.row_ends)} rows, but the index says {entry['rows']}")
        opened, closed = _check_tokens(entry["name"], shard, rules)
    except DataError as error:
        return _ShardReport(folder, entry, [f"{folder}/{error}"])
    pieces = shard_pieces(shard.spans, opened, closed, rules.seq_len)
    return _SoundShard(folder, entry, [], int(shard.row_ends.sum()), pieces)


def _check_tokens(name: str, shard: ShardColumns, rules: _Rules) -> tuple[np.ndarray, np.ndarray]:
    """Check ids, padding and special tokens against the spans; return which pieces begin, and which end, a turn, bool."""
    starts, answer_starts, ends, sources, input_rows, offsets = shard.spans.T
    require(name, sources < rules.num_sources, "a source has no name in the index", shard.piece_rows)
    if rules.rows_in is not None:
        require(
            name,
            input_rows % FIRST_COPY < rules.rows_in,
            "an input row is beyond the number of rows read",
            shard.piece_rows,
        )
    columns = np.arange(rules.seq_len)
    for first in range(0, len(shard.row_ends), ROWS_AT_ONCE):
        tokens = shard.tokens(first, first + ROWS_AT_ONCE)
        rows = first + np.arange(len(tokens))
        require(name, tokens.max(axis=1) < rules.vocab_size, "a token is beyond the vocabulary", rows)
        padded = np.flatnonzero(shard.row_ends[rows] < rules.seq_len)
        is_text = columns < shard.row_ends[rows[padded], None]
        require(
            name, (is_text | (tokens[padded] == rules.pad)).all(axis=1), "its padding contains tokens", rows[padded]
        )
    opened, closed = shard.tokens_at(starts) == rules.bos, shard.tokens_at(ends - 1) == rules.eos
    require(name, opened | (offsets > 0), "a document does not begin with <s>", shard.piece_rows)
    begins_inside = (starts < answer_starts) & (answer_starts < ends)
    is_plain_text = opened & (answer_starts == starts + 1)
    follows = (shard.tokens_at(np.maximum(answer_starts - 1, 0)) == rules.sep) | is_plain_text | ~begins_inside
    require(name, follows, "an answer does not follow <sep>", shard.piece_rows)
    require(name, (answer_starts < ends) | ~closed, "a document ends without an answer", shard.piece_rows)
    return opened, closed


# The whole folder


def _count_problems(path: Path, indexes: dict[Path, dict], shards: list[_SoundShard]) -> list[str]:
    problems = []
    for folder, index in indexes.items():
        of_folder = [shard for shard in shards if shard.folder == folder]
        counted = {
            "packed_rows": sum(shard.entry["rows"] for shard in of_folder),
            "documents": sum(shard.pieces.documents for shard in of_folder),
            "tokens": sum(shard.tokens for shard in of_folder),
        }
        problems += [
            f"{folder} has {number} {name}, but its index says {index['counts'][name]}: prepare it again"
            for name, number in counted.items()
            if index["counts"][name] != number
        ]
    counts = indexes[path]["counts"]
    validation = counts.get("validation_documents", 0)
    held_out = sum(index["counts"]["documents"] for folder, index in indexes.items() if folder != path)
    if held_out != validation:
        problems.append(
            f"{path / INDEX_NAME} says {validation} validation documents, but there are {held_out}: prepare it again"
        )
    if "rows_in" not in counts:
        return problems
    dropped = sum(counts["rows_dropped"].values())
    rows = counts["rows_in"] + counts.get("rows_copied", 0)
    if dropped + counts["documents"] + validation != rows:
        problems.append(
            f"{path / INDEX_NAME} says {rows} rows were read or copied, {dropped} dropped and "
            f"{counts['documents'] + validation} kept, which does not add up: prepare the folder again"
        )
    return problems


def _document_problems(shards: list[_SoundShard]) -> list[str]:
    folders = sorted({shard.folder for shard in shards})
    ledger = PieceLedger([shard.pieces for shard in shards], [folders.index(shard.folder) for shard in shards])
    problems = []
    for numbers, what in ledger.problems():
        names = sorted(str(shards[number].folder / shards[number].entry["name"]) for number in numbers)
        problems.append(f"{' and '.join(names)}: {what}: prepare the folder again")
    return problems
