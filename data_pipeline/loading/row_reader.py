"""Packed rows by number: the interface of all data that training reads, and how a batch of rows is gathered."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.loading.open_shard import NPY_HEADER_BYTES, SPAN_BYTES, OpenShard
from data_pipeline.loading.order import MixtureOrder, RowOrder
from data_pipeline.shards.format import token_dtype
from data_pipeline.shards.packing import SPAN_COLUMNS, PackedRows

NO_ROW = -1  # a row number that stands for a row of padding


class RowReader(ABC):
    """Packed rows by number, from one folder or from several folders as if they were one.

    location: the name in messages.
    seq_len, vocab_size, pad_token_id: the same for all rows.
    sources: the names that spans refer to.
    tokenizer_fingerprint: the tokenizer that made the rows.
    fingerprint: changes with any token or span, with the tokenizer and with the mixture.
    num_rows: the number of rows of all folders.
    """

    location: str
    seq_len: int
    vocab_size: int
    pad_token_id: int
    sources: list[str]
    tokenizer_fingerprint: str
    fingerprint: str
    num_rows: int
    _first_rows: np.ndarray  # the first row of each shard, and num_rows at the end

    @property
    @abstractmethod
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer that made the rows."""

    @abstractmethod
    def order(self, seed: int) -> RowOrder | MixtureOrder:
        """Return the endless order of the rows."""

    @abstractmethod
    def open_shard(self, shard: int) -> OpenShard | None:
        """Open a shard after checking its hash. Return None if it is bad and bad shards are skipped."""

    @abstractmethod
    def look_ahead(self, shards: Iterable[int]) -> None:
        """Start fetching and checking shards in the background, in the order in which they will be needed."""

    def gather(self, rows: np.ndarray) -> PackedRows:
        """Read rows by number, int64 `[n]`. NO_ROW and the rows of skipped shards become padding.

        Raises DataError if a shard differs from the index (unless bad shards are skipped), or breaks the format.
        """
        if not NO_ROW <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} are not all among the {self.num_rows} rows")
        shards = np.where(rows == NO_ROW, -1, np.searchsorted(self._first_rows, rows, side="right") - 1)
        shards_of_rows, rows_in_shards = shards.tolist(), (rows - self._first_rows[shards]).tolist()
        opened = {shard: self.open_shard(shard) for shard in dict.fromkeys(shards_of_rows) if shard >= 0}
        dtype = np.dtype(token_dtype(self.vocab_size))
        header, padding = _blank_row(self.seq_len, dtype, self.pad_token_id)
        tokens: list[bytes | memoryview] = []
        spans: list[memoryview] = []
        pieces: list[int] = []
        for shard, row in zip(shards_of_rows, rows_in_shards, strict=True):
            source = opened.get(shard)
            if source is None:
                tokens.append(padding)
                pieces.append(0)
                continue
            tokens_at, spans_at = source.offsets[row]
            tokens.append(source.data[tokens_at : tokens_at + len(padding)])
            count = source.count_spans(spans_at)
            spans_at += NPY_HEADER_BYTES
            spans.append(source.data[spans_at : spans_at + count * SPAN_BYTES])
            pieces.append(count)
        # One copy for the whole batch; per row, Python only makes the slices above.
        all_tokens, all_spans = b"".join(tokens), b"".join(spans)
        members = np.frombuffer(all_tokens, dtype=np.uint8)
        if (
            len(members) != len(rows) * len(padding)
            or len(all_spans) != sum(pieces) * SPAN_BYTES
            or (members.reshape(len(rows), -1)[:, : len(header)] != header).any()
        ):
            names = ", ".join(shard.name for shard in opened.values() if shard)
            raise DataError(
                f"a row in one of {names} is not {self.seq_len} tokens of {dtype.name} with spans: prepare the data again"
            )
        return PackedRows(
            members.reshape(len(rows), -1)[:, len(header) :].view(dtype),
            np.frombuffer(all_spans, dtype=np.int64).reshape(-1, len(SPAN_COLUMNS)),
            np.array(pieces, dtype=np.int64),
        )


@lru_cache(maxsize=64)
def _blank_row(seq_len: int, dtype: np.dtype, pad_token_id: int) -> tuple[np.ndarray, bytes]:
    """Return the npy header that the tokens of every row have, uint8, and the bytes of a whole row of padding."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.full(seq_len, pad_token_id, dtype=dtype), version=(1, 0), allow_pickle=False)
    member = buffer.getvalue()
    return np.frombuffer(member, dtype=np.uint8)[: len(member) - seq_len * dtype.itemsize], member
