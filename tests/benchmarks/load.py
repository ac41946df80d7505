"""How fast rows come from shards to batches, beside other readers of the same rows; by hand: `python -m tests.benchmarks.load`.

All readers run in one process with one thread and read shuffled rows from the page cache, in batches of 32 rows of 2,048
tokens. Every reader gives input_ids, labels and position_ids of rows with documents, except `litdata, tokens alone`: it
reads plain blocks of tokens into one int64 tensor, as that library usually does, which is less work. Time is the processor
time of the whole process, because a machine may be shared. Readers take turns; by hand the best pass of each counts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline.loading.collate import collate
from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.shards.format import FORMAT_VERSION, TOKENIZER_FOLDER, write_index, write_shard
from data_pipeline.shards.packing import PackedRows
from tests.benchmarks.measurement import Goal, Options, Row, take_turns
from tests.benchmarks.packed_rows import PAD, make_rows

SEQ_LEN = 2048
VOCABULARY = 50_266
BATCH_ROWS = 32
ROWS, ROWS_PER_SHARD = 16_384, 4096
SHUFFLE_BUFFER = 1000  # rows in webdataset's buffer
PASSES = 4
MEGABYTE = 1e6
TOKENS_ALONE = "litdata, tokens alone"
Reader = Callable[[], Iterator[torch.Tensor]]


def make_folder(path: Path, shards: list[PackedRows]) -> ShardFolder:
    """Write the rows as a finished shard folder with an empty tokenizer folder."""
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
    """Turn tokens and spans, as the other readers give them, into input_ids, labels and position_ids."""
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
    """Read text without documents as litdata does: chunks of tokens in blocks of a row, no labels, no positions."""
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
    # The package imports its image datasets and thus torchvision, whose wheel must match the build of torch.
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
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
    "webdataset": batches_of_webdataset,
    "litdata": batches_of_litdata,
    TOKENS_ALONE: batches_of_litdata_tokens,
    "mosaicml-streaming (MDS)": batches_of_mds,
}


def measure(options: Options) -> list[Row]:
    """Measure rows per second of processor time, warm, beside each other reader."""
    _, readers, missing = make_readers(options.scratch / "load", ROWS_PER_SHARD if options.quick else ROWS)
    speeds = take_turns({name: speed_of(reader) for name, reader in readers.items()}, options.repeats(PASSES))
    return [
        Row(
            f"batches of {BATCH_ROWS} rows of {SEQ_LEN:,} tokens", "rows/s", speeds["this"], name, speeds.get(name, ()),
            None if name == TOKENS_ALONE else Goal(at_least=2), missing.get(name, ""),
        )
        for name in OTHERS
    ]  # fmt: skip


def make_readers(scratch: Path, rows: int) -> tuple[ShardFolder, dict[str, Reader], dict[str, str]]:
    """Write the same random rows for every reader; return our folder, the readers, and why others are missing.

    Raises `ValueError` if a reader does not give all of the rows.
    """
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    shards = [make_rows(ROWS_PER_SHARD, SEQ_LEN, VOCABULARY, generator) for _ in range(-(-rows // ROWS_PER_SHARD))]
    folder = make_folder(scratch / "shards", shards)
    readers, missing = {"this": batches_of_ours(folder)}, {}
    for name, make in OTHERS.items():
        target = scratch / name
        target.mkdir()
        try:
            readers[name] = make(folder, target, shards)
        except ImportError as error:
            missing[name] = str(error)
    expected = {hashlib.sha256(row.astype(np.int64).tobytes()).digest() for rows in shards for row in rows.tokens}
    for name, reader in readers.items():  # a first pass also opens the files
        seen = {hashlib.sha256(row.numpy().tobytes()).digest() for batch in reader() for row in batch}
        # Some readers drop a last batch that is not full.
        if not seen <= expected or len(seen) < 0.98 * len(expected):
            raise ValueError(f"{name} gave {len(seen & expected)} of the {len(expected)} rows, or other rows")
    return folder, readers, missing


def speed_of(reader: Reader) -> Callable[[], float]:
    """Return a function that reads all rows once and gives rows per second of processor time."""

    def read() -> float:
        started = time.process_time()
        rows = sum(len(batch) for batch in reader())
        return rows / (time.process_time() - started)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of {SEQ_LEN} tokens (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, readers, missing = make_readers(Path(scratch), options.rows)
        for name, reason in missing.items():
            print(f"{name} is not installed ({reason}): `make bench` installs it")
        first_pass = speed_of(batches_of_ours(ShardFolder(folder.path)))()
        report(first_pass, take_turns({name: speed_of(reader) for name, reader in readers.items()}, PASSES))


def report(first_pass: float, speeds: dict[str, list[float]]) -> None:
    """Print rows and MB of tokens per second; exit with an error below our own goal."""
    megabytes = SEQ_LEN * 2 / MEGABYTE  # a row
    print(f"rows of {SEQ_LEN} tokens; rows and MB of tokens per second of processor time")
    print(f"{'this, first pass (hashes)':26} {first_pass:10,.0f} rows/s {megabytes * first_pass:8.0f} MB/s")
    for name, passes in speeds.items():
        best, worst = max(passes), min(passes)
        print(f"{name:26} {best:10,.0f} rows/s {megabytes * best:8.0f} MB/s  (worst pass {megabytes * worst:.0f})")
    others = {name: max(passes) for name, passes in speeds.items() if name not in ("this", TOKENS_ALONE)}
    if others:
        fastest = max(others, key=others.get)
        print(
            f"{max(speeds['this']) / others[fastest]:.1f} times as fast as the best other reader, {fastest}; the goal is 2"
        )
    if megabytes * max(speeds["this"]) < 500:
        sys.exit("below the goal of 500 MB/s")


if __name__ == "__main__":
    main()
