"""Small shard folders for the reader's tests, each row's first token telling which row it is."""

import hashlib
from pathlib import Path

import numpy as np

from data_pipeline.shards.format import FORMAT_VERSION, write_index, write_shard
from data_pipeline.shards.packing import SPAN_COLUMNS, PackedRows

PAD = 1
FIRST_ID = 100  # the first token of row r is FIRST_ID + r


def make_folder(
    path: Path, rows_per_shard=(20, 20, 20, 7), seq_len=32, seed=0, sources=("web", "books"), tokenizer="tokenizer"
) -> Path:
    """Write a finished folder: rows of one to five pieces, some of which end in padding, of sources by turns."""
    (path / "tokenizer").mkdir(parents=True)
    generator = np.random.default_rng(seed)
    files, row = [], 0
    for number, rows in enumerate(rows_per_shard):
        packed = [_row(generator, row + index, seq_len, len(sources)) for index in range(rows)]
        tokens, spans = zip(*packed, strict=True)
        pieces = np.array([len(one) for one in spans])
        files.append(
            write_shard(path, f"shard-{number:05d}", PackedRows(np.stack(tokens), np.concatenate(spans), pieces))
        )
        row += rows
    text = f'{{"tokenizer": "{tokenizer}"}}'.encode()
    (path / "tokenizer" / "tokenizer.json").write_bytes(text)
    entry = {"name": "tokenizer/tokenizer.json", "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    write_index(path, {
        "format_version": FORMAT_VERSION, "config": {}, "seq_len": seq_len, "vocab_size": 50266,
        "tokenizer": {"fingerprint": tokenizer, "pad_token_id": PAD, "files": [entry]}, "sources": list(sources),
        "counts": {}, "files": files,
    })  # fmt: skip
    return path


def flip_bit(path: Path, position: int = 700) -> None:
    """Damage a file without changing its size."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def _row(generator: np.random.Generator, row: int, seq_len: int, num_sources: int) -> tuple[np.ndarray, np.ndarray]:
    full = generator.random() < 0.5
    used = seq_len if full else int(generator.integers(seq_len // 2, seq_len))
    pieces = int(generator.integers(1, 6))
    ends = np.append(np.sort(generator.choice(np.arange(1, used), pieces - 1, replace=False)), used)
    starts = np.concatenate([[0], ends[:-1]])
    spans = np.zeros((pieces, len(SPAN_COLUMNS)), dtype=np.int64)
    spans[:, 0], spans[:, 2] = starts, ends
    spans[:, 1] = generator.integers(starts, ends + 1)
    spans[:, 3] = (row + np.arange(pieces)) % num_sources
    tokens = np.full(seq_len, PAD, dtype=np.uint16)
    tokens[:used] = generator.integers(3, 90, used)
    tokens[0] = FIRST_ID + row
    return tokens, spans
