"""Folders of shards that a test writes itself, with tarfile and numpy alone: whatever is wrong in them is meant."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.checking.verification import verify
from data_pipeline.errors import DataError

SEQ_LEN, VOCAB_SIZE, ROWS_IN = 16, 50, 40
BOS, PAD, EOS, SEP = 0, 1, 2, 49
SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "<sep>"}

Row = tuple[np.ndarray, np.ndarray]  # tokens and spans


def document(input_row: int, question: int, answer: int, source: int = 0) -> list[tuple[list[int], int, list[int]]]:
    """Lays a document out: the ids, the answer's start and [source, input row, offset] of each of its pieces."""
    ids = [BOS, *range(10, 10 + question), SEP, *range(10, 10 + answer), EOS]
    return [
        (ids[first : first + SEQ_LEN], question + 2 - first, [source, input_row, first])
        for first in range(0, len(ids), SEQ_LEN)
    ]


def row(*pieces: tuple[list[int], int, list[int]]) -> Row:
    tokens, spans = [], []
    for ids, answer_start, origin in pieces:
        start, end = len(tokens), len(tokens) + len(ids)
        spans.append([start, start + min(max(answer_start, 0), len(ids)), end, *origin])
        tokens += ids
    return np.array(tokens + [PAD] * (SEQ_LEN - len(tokens)), dtype=np.uint16), np.array(spans, dtype=np.int64)


def sound_shards() -> list[list[Row]]:
    """Three shards; a document of 25 tokens begins in the first and ends in the second."""
    long = document(1, 12, 10, source=1)
    return [
        [row(*document(0, 3, 4)), row(long[0])],
        [row(long[1], *document(2, 1, 2)), row(*document(3, 2, 2), *document(4, 2, 3))],
        [row(*document(5, 4, 9, source=1)), row(*document(6, 1, 1)), row(*document(7, 3, 3))],
    ]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_shard(folder: Path, stem: str, rows: list[Row]) -> dict:
    offsets = []
    with tarfile.open(folder / f"{stem}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, arrays in enumerate(rows):
            for kind, array in zip(("tokens", "spans"), arrays, strict=True):
                member = tarfile.TarInfo(f"{stem}-{number:06d}.{kind}.npy")
                member.size = len(npy(array))
                offsets.append(tar.offset + 512)
                tar.addfile(member, io.BytesIO(npy(array)))
    (folder / f"{stem}.offsets.npy").write_bytes(npy(np.array(offsets, dtype=np.uint64).reshape(-1, 2)))
    offsets_entry = {"name": f"{stem}.offsets.npy"}
    return {"name": f"{stem}.tar", "rows": len(rows), "offsets": offsets_entry}


def write_folder(folder: Path, shards: list[list[Row]], **counts: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    ids = zip(SPECIAL_TOKENS.values(), (BOS, PAD, EOS, SEP), strict=True)
    added = [{"content": content, "id": number} for content, number in ids]
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(SPECIAL_TOKENS))
    rows = [row for shard in shards for row in shard]
    documents = sum(int((spans[:, 5] == 0).sum()) for _, spans in rows)
    counts = {
        "rows_in": ROWS_IN,
        "rows_dropped": {"empty": 3, "duplicate": ROWS_IN - documents - 3 - counts.get("validation_documents", 0)},
        "documents": documents,
        "tokens": sum(int(spans[-1, 2]) for _, spans in rows),
        "packed_rows": len(rows),
    } | counts
    index = {
        "format_version": 1,
        "config": {},
        "seq_len": SEQ_LEN,
        "vocab_size": VOCAB_SIZE,
        "sources": ["first", "second"],
        "counts": counts,
        "tokenizer": {
            "fingerprint": "0" * 64,
            "pad_token_id": PAD,
            "files": [{"name": f"tokenizer/{name}"} for name in ("tokenizer.json", "tokenizer_config.json")],
        },
        "files": [write_shard(folder, f"shard-00000-{number:03d}", shard) for number, shard in enumerate(shards)],
    }
    return write_index(folder, index)


def write_index(folder: Path, index: dict | None = None) -> Path:
    """Writes the index with the sizes and hashes that the files have now: whatever they hold is then as meant."""
    index = index or json.loads((folder / "index.json").read_text())
    entries = [*index["files"], *(shard["offsets"] for shard in index["files"]), *index["tokenizer"]["files"]]
    for entry in entries:
        data = (folder / entry["name"]).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def message(folder: Path | str, **options) -> str:
    """What verification says of a folder, which it must refuse."""
    with pytest.raises(DataError) as error:
        verify(folder, **options)
    return str(error.value)
