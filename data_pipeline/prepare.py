"""The job that makes a shard folder: read, clean, drop, encode, pack and write, one group of rows after another.

Packing and shards never cross a group, and the groups depend on the source and the constants below alone, so the same
input and settings give the same bytes. Memory holds one group, and a digest of 16 bytes for every kept row, about 100
bytes a row as Python keeps them.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import polars as pl

from data_pipeline.clean import RULES, clean
from data_pipeline.errors import DataError
from data_pipeline.folder import finished_index, locked, remove_unfinished
from data_pipeline.packing import Document, pack
from data_pipeline.shards import FORMAT_VERSION, TOKENIZER_FOLDER, token_dtype, write_file, write_index, write_shard
from data_pipeline.sources import Source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS_PER_CHUNK = 8192
ROWS_PER_GROUP = 65536  # a group ends with the chunk that reaches this many
DROP_REASONS = ("empty", "duplicate")
DEFAULT_VOCAB_SIZE = 2000  # of a tokenizer trained on the source


def prepare(
    source: str | list[str],
    out: str | Path,
    *,
    tokenizer: str = "train",
    seq_len: int = 1024,
    rows_per_shard: int = 4096,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    progress: bool = True,
) -> dict:
    """Makes a shard folder of a source, or leaves it alone where the same settings have made it; returns its index.

    source: as for `open_source`. tokenizer: `train`, a folder or a hub name. seq_len: tokens a row. vocab_size: the
    upper limit of a trained tokenizer's. progress: show rows and MB/s on stderr. A folder that an interrupted run left
    is begun anew; a process that finds another one at work on it waits.
    Raises DataError for bad input, a folder made with other settings, and what the disk refuses.
    """
    out = Path(out)
    if seq_len < 2:
        raise DataError(f"seq_len {seq_len} is too short: a row needs at least 2 tokens")
    if rows_per_shard < 1:
        raise DataError(f"rows_per_shard {rows_per_shard} is too small: a shard needs at least 1 row")
    opened = open_source(source)
    loaded = None if tokenizer == "train" else _load(tokenizer)
    config = _config(opened, loaded, seq_len, rows_per_shard, vocab_size)
    if index := finished_index(out, config):
        return index
    try:
        with locked(out):
            # Another process may have made it while this one waited.
            if index := finished_index(out, config):
                return index
            remove_unfinished(out)
            return _Preparation(opened, out, config, progress).run(loaded)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: make room or check the permissions, then run again ({error.strerror or error})"
        ) from error


class _Preparation:
    """One run: the source, the folder, and the counts so far."""

    def __init__(self, source: Source, out: Path, config: dict, progress: bool) -> None:
        self.source, self.out, self.config, self.progress = source, out, config, progress
        self.source_names: dict[str, int] = {}  # to its number, in the order of appearance
        self.digests: set[bytes] = set()
        self.rows_in = 0
        self.dropped: Counter[str] = Counter(dict.fromkeys(DROP_REASONS, 0))
        self.documents = self.tokens = 0

    def run(self, tokenizer: "PreTrainedTokenizerFast | None") -> dict:
        """Fits the tokenizer where none is given, writes the shards, then the index."""
        tokenizer = tokenizer or self._train_tokenizer()
        tokenizer_entry = _save_tokenizer(tokenizer, self.out)
        files = []
        for number, group in enumerate(self._groups()):
            files += self._write_group(number, group, tokenizer)
        if not files:
            raise DataError(f"the source {self.source.name} has no row with a question and an answer: check its text")
        index = {
            "format_version": FORMAT_VERSION,
            "config": self.config,
            "seq_len": self.config["seq_len"],
            "vocab_size": len(tokenizer),
            "tokenizer": tokenizer_entry,
            "sources": list(self.source_names),
            "counts": {
                "rows_in": self.rows_in,
                "rows_dropped": dict(self.dropped),
                "documents": self.documents,
                "tokens": self.tokens,
                "packed_rows": sum(entry["rows"] for entry in files),
            },
            "files": files,
        }
        write_index(self.out, index)
        return index

    def _train_tokenizer(self) -> "PreTrainedTokenizerFast":
        from data_pipeline.tokenization import train_tokenizer

        texts = (
            text
            for frame in self._clean_chunks("fitting the tokenizer")
            for column in ("question", "answer")
            for text in frame[column]
        )
        return train_tokenizer(texts, self.config["tokenizer"]["train_vocab_size"])

    def _clean_chunks(self, phase: str) -> Iterator[pl.DataFrame]:
        """Yields the source's chunks with question and answer cleaned, and shows how far it is."""
        from tqdm import tqdm

        # In a log file, a line now and then is enough.
        seconds = 0.1 if sys.stderr.isatty() else 30
        bar = tqdm(total=self.source.num_rows, desc=phase, unit=" rows", disable=not self.progress, mininterval=seconds)
        megabytes = 0.0
        with bar:
            for frame in self.source.batches(ROWS_PER_CHUNK):
                texts = ("question", "answer")
                megabytes += sum(frame.select(pl.col(text).str.len_bytes().sum() for text in texts).row(0)) / 1e6
                yield frame.with_columns(clean(pl.col(text)) for text in texts)
                bar.update(len(frame))
                elapsed = bar.format_dict["elapsed"]
                bar.set_postfix_str(f"{megabytes / elapsed:.1f} MB/s" if elapsed else "")

    def _groups(self) -> Iterator[list[pl.DataFrame]]:
        group: list[pl.DataFrame] = []
        for chunk in self._clean_chunks("packing rows"):
            group.append(chunk)
            if sum(map(len, group)) >= ROWS_PER_GROUP:
                yield group
                group = []
        if group:
            yield group

    def _write_group(self, number: int, chunks: list[pl.DataFrame], tokenizer: "PreTrainedTokenizerFast") -> list[dict]:
        documents = [document for chunk in chunks for document in self._documents(chunk, tokenizer)]
        self.documents += len(documents)
        self.tokens += sum(len(document.ids) for document in documents)
        rows = pack(documents, self.config["seq_len"], tokenizer.pad_token_id, token_dtype(len(tokenizer)))
        step = self.config["rows_per_shard"]
        return [
            write_shard(self.out, f"shard-{number:05d}-{first // step:03d}", rows[first : first + step])
            for first in range(0, len(rows), step)
        ]

    def _documents(self, chunk: pl.DataFrame, tokenizer: "PreTrainedTokenizerFast") -> Iterator[Document]:
        """Drops rows by reason, counting them, and encodes the others."""
        from data_pipeline.tokenization import encode_documents

        kept = []
        for row, (question, answer, source) in enumerate(chunk.select("question", "answer", "source").rows()):
            if reason := self._reason_to_drop(question, answer):
                self.dropped[reason] += 1
            else:
                source_number = self.source_names.setdefault(source, len(self.source_names))
                kept.append((question, answer, source_number, self.rows_in + row))
        self.rows_in += len(chunk)
        encoded = encode_documents(tokenizer, [row[0] for row in kept], [row[1] for row in kept])
        for (ids, answer_start), (_, _, source_number, input_row) in zip(encoded, kept, strict=True):
            yield Document(ids, answer_start, source_number, input_row)

    def _reason_to_drop(self, question: str, answer: str) -> str | None:
        if not question or not answer:
            return "empty"
        # Cleaning leaves no NUL, so it tells where the question ends.
        digest = hashlib.blake2b(f"{question}\0{answer}".encode(), digest_size=16).digest()
        if digest in self.digests:
            return "duplicate"
        self.digests.add(digest)
        return None


def _load(name: str) -> "PreTrainedTokenizerFast":
    from data_pipeline.tokenization import load_tokenizer

    return load_tokenizer(name)


def _config(
    source: Source, tokenizer: "PreTrainedTokenizerFast | None", seq_len: int, rows_per_shard: int, vocab_size: int
) -> dict:
    """Gathers all that decides the bytes of the shards, and nothing that differs between machines."""
    if tokenizer is None:
        tokenizer_config = {"train_vocab_size": vocab_size}
    else:
        from data_pipeline.tokenization import fingerprint

        tokenizer_config = {"fingerprint": fingerprint(tokenizer)}
    return {
        "source": source.identity,
        "tokenizer": tokenizer_config,
        "cleaning": list(RULES),
        "drop": list(DROP_REASONS),
        "seq_len": seq_len,
        "rows_per_shard": rows_per_shard,
        "rows_per_chunk": ROWS_PER_CHUNK,
        "rows_per_group": ROWS_PER_GROUP,
    }


def _save_tokenizer(tokenizer: "PreTrainedTokenizerFast", out: Path) -> dict:
    from data_pipeline.tokenization import fingerprint

    # The backend reports a full disk as a bare Exception, so it writes elsewhere, and our own writer writes here.
    with TemporaryDirectory() as elsewhere:
        tokenizer.save_pretrained(elsewhere)
        contents = {path.name: path.read_bytes() for path in sorted(Path(elsewhere).iterdir())}
    folder = out / TOKENIZER_FOLDER
    folder.mkdir(exist_ok=True)
    files = [
        {"name": f"{TOKENIZER_FOLDER}/{name}", **write_file(folder / name, [data])} for name, data in contents.items()
    ]
    return {"fingerprint": fingerprint(tokenizer), "pad_token_id": tokenizer.pad_token_id, "files": files}
