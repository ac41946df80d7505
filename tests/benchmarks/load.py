"""How fast rows come from shards to batches, beside other readers of the same rows; by hand: `python -m tests.benchmarks.load`.

One process and one thread of its own each, from the page cache, shuffled, batches of 32 rows of 2,048 tokens. Every
reader gives input_ids, labels and position_ids of rows with documents; `litdata, tokens alone` does not, it is what that
library does with plain blocks of tokens, as one int64 tensor, and so does less. Time is the processor time of the whole
process (a machine may be shared); passes are taken by turns, and the best of each reader counts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline.loading.collate import collate
from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.shards.format import FORMAT_VERSION, TOKENIZER_FOLDER, write_index, write_shard
from data_pipeline.shards.packing import SPAN_COLUMNS, PackedRows

SEQ_LEN = 2048
VOCABULARY = 50_266
PIECE_TOKENS = 210  # on average, as the documents of webinstruct
BATCH_ROWS = 32
ROWS_PER_SHARD = 4096
SHUFFLE_BUFFER = 1000  # rows, of webdataset
PASSES = 4
MEGABYTE = 1e6
PAD = 1
TOKENS_ALONE = "litdata, tokens alone"
Reader = Callable[[], Iterator[torch.Tensor]]


def make_rows(count: int, generator: np.random.Generator) -> PackedRows:
    """Random tokens in documents of random lengths."""
    tokens = generator.integers(3, VOCABULARY, (count, SEQ_LEN)).astype(np.uint16)
    spans = []
    for row in range(count):
        ends = np.cumsum(generator.integers(20, 2 * PIECE_TOKENS, SEQ_LEN // 20 + 1))
        ends = np.append(ends[ends < SEQ_LEN], SEQ_LEN)
        columns = np.zeros((len(ends), len(SPAN_COLUMNS)), dtype=np.int64)
        columns[1:, 0], columns[:, 2] = ends[:-1], ends
        columns[:, 1] = (columns[:, 0] + ends) // 2
        columns[:, 4] = row
        spans.append(columns)
    return PackedRows(tokens, np.concatenate(spans), np.array([len(columns) for columns in spans]))


def make_folder(path: Path, shards: list[PackedRows]) -> ShardFolder:
    """The rows as a finished shard folder, with nothing in the place of a tokenizer."""
    (path / TOKENIZER_FOLDER).mkdir(parents=True)
    write_index(path, {
        "format_version": FORMAT_VERSION, "config": {}, "seq_len": SEQ_LEN, "vocab_size": VOCABULARY,
        "tokenizer": {"fingerprint": "none", "pad_token_id": PAD, "files": []}, "sources": ["random"], "counts": {},
        "files": [write_shard(path, f"shard-{number:05d}", rows) for number, rows in enumerate(shards)],
    })  # fmt: skip
    return ShardFolder(path)


def batches_of_ours(folder: ShardFolder) -> Reader:
    def batches() -> Iterator[torch.Tensor]:
        stream = BatchStream(
            folder, seed=0, global_batch_rows=BATCH_ROWS, micro_batch_rows=BATCH_ROWS, rank=0, world_size=1
        )
        for _ in range(folder.num_rows // BATCH_ROWS):
            yield stream.next_step()[0]["input_ids"]

    return batches


def to_batch(rows: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """What the other readers' rows still need: tokens and spans to input_ids, labels and position_ids."""
    tokens, spans = zip(*rows, strict=True)
    pieces = np.array([len(one) for one in spans])
    packed = PackedRows(np.stack(tokens), np.concatenate(spans), pieces)
    return torch.from_numpy(collate(packed, PAD, "all"))[0]


def batches_of_webdataset(folder: ShardFolder, scratch: Path, shards: list[PackedRows]) -> Reader:
    import webdataset

    def array(sample: dict, name: str) -> np.ndarray:
        return np.load(io.BytesIO(sample[name]), allow_pickle=False)

    urls = [str(folder.path / entry["name"]) for entry in folder.index["files"]]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE_BUFFER)
    rows = dataset.map(lambda sample: (array(sample, "tokens.npy"), array(sample, "spans.npy")))
    return lambda: (to_batch(batch) for batch in in_batches(iter(rows)))


def batches_of_litdata(folder: ShardFolder, scratch: Path, shards: list[PackedRows]) -> Reader:
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    cache = Cache(str(scratch), chunk_bytes="16MB")
    for number, (tokens, spans) in enumerate(rows_of(shards)):
        cache._add_item(number, {"tokens": tokens, "spans": spans})
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(scratch), shuffle=True, seed=0)
    return lambda: (to_batch([(row["tokens"], row["spans"]) for row in rows]) for rows in in_batches(iter(dataset)))


def batches_of_litdata_tokens(folder: ShardFolder, scratch: Path, shards: list[PackedRows]) -> Reader:
    """Its way with text that has no documents: chunks of tokens, read in blocks of a row; no labels, no positions."""
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.cache import Cache

    cache = Cache(str(scratch), chunk_bytes="16MB", item_loader=TokensLoader(SEQ_LEN))
    for number, (tokens, _) in enumerate(rows_of(shards)):
        cache._add_item(number, torch.from_numpy(tokens))
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(scratch), item_loader=TokensLoader(SEQ_LEN), shuffle=True, seed=0)
    return lambda: (torch.stack(rows).long() for rows in in_batches(iter(dataset)))


def batches_of_mds(folder: ShardFolder, scratch: Path, shards: list[PackedRows]) -> Reader:
    from streaming import MDSWriter, StreamingDataset

    columns = {"tokens": f"ndarray:uint16:{SEQ_LEN}", "spans": "ndarray:int64"}
    with MDSWriter(out=str(scratch / "mds"), columns=columns, size_limit=2**24, progress_bar=False) as writer:
        for tokens, spans in rows_of(shards):
            writer.write({"tokens": tokens, "spans": spans})
    dataset = StreamingDataset(local=str(scratch / "mds"), shuffle=True, batch_size=BATCH_ROWS, shuffle_seed=0)
    return lambda: (to_batch([(row["tokens"], row["spans"]) for row in rows]) for rows in in_batches(iter(dataset)))


def rows_of(shards: list[PackedRows]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for rows in shards:
        yield from zip(rows.tokens, np.split(rows.spans, np.cumsum(rows.pieces)[:-1]), strict=True)


def in_batches(rows: Iterator) -> Iterator[list]:
    gathered = []
    for row in rows:
        gathered.append(row)
        if len(gathered) == BATCH_ROWS:
            yield gathered
            gathered = []


OTHERS = {
    "webdataset": (batches_of_webdataset, "webdataset"),
    "litdata": (batches_of_litdata, "litdata"),
    TOKENS_ALONE: (batches_of_litdata_tokens, "litdata"),
    "mosaicml-streaming (MDS)": (batches_of_mds, "mosaicml-streaming"),
}


def measure(readers: dict[str, Reader], expected: set[bytes]) -> dict[str, tuple[float, float]]:
    """The processor seconds of each reader's first pass and of its best; every pass is of the same rows."""
    for name, reader in readers.items():  # which also opens what is opened once
        seen = {hashlib.sha256(row.numpy().tobytes()).digest() for batch in reader() for row in batch}
        # Some drop the rows of a last batch that is not full.
        if not seen <= expected or len(seen) < 0.98 * len(expected):
            raise SystemExit(f"{name} gave {len(seen & expected)} of the {len(expected)} rows, and others")
    seconds = {name: [] for name in readers}
    for _ in range(PASSES):
        for name, reader in readers.items():
            started = time.process_time()
            rows = sum(len(batch) for batch in reader())
            seconds[name].append((time.process_time() - started) * len(expected) / rows)
    return {name: (min(taken), max(taken)) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_384, help=f"rows of {SEQ_LEN} tokens (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        shards = [make_rows(ROWS_PER_SHARD, generator) for _ in range(-(-options.rows // ROWS_PER_SHARD))]
        folder = make_folder(Path(scratch) / "shards", shards)
        expected = {hashlib.sha256(row.astype(np.int64).tobytes()).digest() for rows in shards for row in rows.tokens}

        started = time.process_time()
        fresh = BatchStream(
            ShardFolder(folder.path),
            seed=0,
            global_batch_rows=BATCH_ROWS,
            micro_batch_rows=BATCH_ROWS,
            rank=0,
            world_size=1,
        )
        for _ in range(folder.num_rows // BATCH_ROWS):
            fresh.next_step()
        first_pass = time.process_time() - started

        readers = {"this": batches_of_ours(folder)}
        for name, (make, package) in OTHERS.items():
            target = Path(scratch) / name
            target.mkdir()
            try:
                readers[name] = make(folder, target, shards)
            except ImportError as error:
                print(f"{name} is not installed ({error}): pip install {package}")
        measured = measure(readers, expected)
        report(folder.num_rows, first_pass, measured)
        shutil.rmtree(scratch, ignore_errors=True)


def report(rows: int, first_pass: float, seconds: dict[str, tuple[float, float]]) -> None:
    megabytes = rows * SEQ_LEN * 2 / MEGABYTE
    print(f"{rows} rows of {SEQ_LEN} tokens, {megabytes:.0f} MB of tokens; rows and MB per second of processor time")
    print(f"{'this, first pass (hashes)':26} {rows / first_pass:10,.0f} rows/s {megabytes / first_pass:8.0f} MB/s")
    for name, (best, worst) in seconds.items():
        figures = f"{rows / best:10,.0f} rows/s {megabytes / best:8.0f} MB/s  (worst pass {megabytes / worst:.0f})"
        print(f"{name:26} {figures}")
    others = {name: best for name, (best, _) in seconds.items() if name not in ("this", TOKENS_ALONE)}
    if others:
        fastest = min(others, key=others.get)
        print(f"{others[fastest] / seconds['this'][0]:.1f} times the best of the others, {fastest}; the goal is 2")
    if megabytes / seconds["this"][0] < 500:
        sys.exit("below the goal of 500 MB/s")


if __name__ == "__main__":
    main()
