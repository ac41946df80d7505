"""A whole shard at once, as columns: every byte of its format checked, without a loop over rows."""

import io
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.packing import SPAN_COLUMNS

BLOCK = tarfile.BLOCKSIZE
KINDS = ("tokens", "spans")
SPAN_BYTES = 8 * len(SPAN_COLUMNS)
# The only fields of a header that differ between members; digits are octal.
NAME, SIZE_DIGITS, CHECKSUM_DIGITS = slice(0, 100), slice(124, 135), slice(148, 154)
CHECKSUM_FIELD = slice(148, 156)  # counts as spaces in the checksum itself


@dataclass(frozen=True)
class ShardColumns:
    """A shard that keeps the format.

    spans: int64 `[pieces, 6]`, columns as in SPAN_COLUMNS, rows one after another. piece_rows: int64 `[pieces]`, the
    row of the shard that each piece stands in. row_ends: int64 `[rows]`, where each row's padding begins.
    """

    spans: np.ndarray
    piece_rows: np.ndarray
    row_ends: np.ndarray
    seq_len: int
    _token_blocks: np.ndarray  # first block of each row's tokens
    _blocks: np.ndarray  # the tar as tokens, `[blocks, tokens in a block]`

    def tokens(self, first: int, last: int) -> np.ndarray:
        """Copy the tokens of the rows from first up to last, `[rows, seq_len]`."""
        per_block = self._blocks.shape[1]
        skipped = len(_npy_header(self._blocks.dtype.str, (self.seq_len,))) // self._blocks.itemsize
        blocks_per_row = -(-(skipped + self.seq_len) // per_block)
        wanted = self._token_blocks[first:last, None] + np.arange(blocks_per_row)
        return self._blocks[wanted].reshape(len(wanted), -1)[:, skipped : skipped + self.seq_len]


def parse_shard(name: str, tar: np.ndarray, offsets: np.ndarray, seq_len: int, dtype: type) -> ShardColumns:
    """Read a shard from its bytes.

    name: the tar's file name, which its members' names begin with. tar: uint8 `[bytes]`. offsets: as in the offsets
    file. dtype: of the tokens. Raises DataError with the first row where the shard breaks the format.
    """
    token_type = np.dtype(dtype).newbyteorder("<")
    data_blocks = _data_blocks(name, tar, offsets)
    blocks = tar.reshape(-1, BLOCK)
    sizes = _member_sizes(name, blocks, data_blocks)
    _check_layout(name, blocks, data_blocks, sizes)
    pieces = _check_npy_headers(name, blocks, data_blocks, sizes, seq_len, token_type)
    spans = _gather_spans(tar, data_blocks, pieces)
    piece_rows = np.repeat(np.arange(len(pieces)), pieces)
    row_ends = _check_spans(name, spans, pieces, piece_rows, seq_len)
    return ShardColumns(spans, piece_rows, row_ends, seq_len, data_blocks[:, 0], blocks.view(token_type))


def broken(name: str, what: str) -> NoReturn:
    """Raise the DataError of a shard that breaks the format."""
    raise DataError(f"{name} breaks the format of shards, {what}: prepare the folder again")


def require(name: str, rows_hold: np.ndarray, what: str, rows: np.ndarray | None = None) -> None:
    """Raise the DataError with the first row that doesn't hold.

    rows_hold: bool, by rows in its first axis. rows: their numbers, where these are not 0, 1, ….
    """
    if not rows_hold.all():
        first = int(np.argwhere(~rows_hold)[0][0])
        broken(name, f"row {first if rows is None else rows[first]}: {what}")


def _data_blocks(name: str, tar: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Give the block where each member's data begin, int64 `[rows, 2]`."""
    if offsets.dtype != np.uint64 or offsets.ndim != 2 or offsets.shape[1] != len(KINDS) or not len(offsets):
        broken(name, f"its offsets are {offsets.dtype} {list(offsets.shape)} and not uint64 [rows, {len(KINDS)}]")
    if len(tar) % tarfile.RECORDSIZE:
        broken(name, f"its {len(tar)} bytes are no multiple of {tarfile.RECORDSIZE}")
    inside = (offsets >= BLOCK) & (offsets < len(tar)) & (offsets % BLOCK == 0)
    require(name, inside, "an offset is not where a member of the tar can be")
    return offsets.astype(np.int64) // BLOCK


def _member_sizes(name: str, blocks: np.ndarray, data_blocks: np.ndarray) -> np.ndarray:
    """Check that a plain tar header with the right name stands before each member's data; give int64 `[rows, 2]`."""
    headers = blocks[data_blocks - 1]
    stem = name.removesuffix(".tar")
    expected = [[f"{stem}-{row:06d}.{kind}.npy".encode() for kind in KINDS] for row in range(len(headers))]
    names = np.ascontiguousarray(headers[..., NAME]).view("S100")[..., 0]
    require(name, names == np.array(expected), "an offset leads to no member of the row's name")
    sizes, checksums = _octal(headers[..., SIZE_DIGITS]), _octal(headers[..., CHECKSUM_DIGITS])
    template = np.frombuffer(tarfile.TarInfo().tobuf(format=tarfile.USTAR_FORMAT), dtype=np.uint8)
    fixed = np.ones(BLOCK, dtype=bool)
    for field in (NAME, SIZE_DIGITS, CHECKSUM_DIGITS):
        fixed[field] = False
    plain = (headers[..., fixed] == template[fixed]).all(axis=-1)
    headers[..., CHECKSUM_FIELD] = ord(" ")
    plain &= (sizes >= 0) & (checksums == headers.sum(axis=-1, dtype=np.int64))
    require(name, plain, "a member's tar header is not a plain one")
    return sizes


def _octal(digits: np.ndarray) -> np.ndarray:
    """Read octal numbers, uint8 `[..., digits]`; -1 where a character is no octal digit."""
    values = digits - np.uint8(ord("0"))  # what stands before "0" wraps around to large numbers
    numbers = values.astype(np.int64) @ 8 ** np.arange(values.shape[-1] - 1, -1, -1)
    return np.where((values < 8).all(axis=-1), numbers, -1)


def _check_layout(name: str, blocks: np.ndarray, data_blocks: np.ndarray, sizes: np.ndarray) -> None:
    """Check that the members stand close together, each filled up with zeros, and that only zeros follow."""
    member_blocks = -(-sizes // BLOCK)
    expected = 1 + np.concatenate([[0], np.cumsum(member_blocks + 1)])
    exact = (data_blocks.reshape(-1) == expected[:-1]).reshape(data_blocks.shape) & (sizes > 0)
    require(name, exact, "its members don't follow one another")
    end = int(expected[-1]) - 1
    # Two blocks of zeros end a tar, and whole records of 20 blocks make it up.
    if len(blocks) != -(-(end + 2) // (tarfile.RECORDSIZE // BLOCK)) * (tarfile.RECORDSIZE // BLOCK):
        broken(name, f"it has {len(blocks)} blocks, and its {len(data_blocks)} rows take {end}")
    if blocks[end:].any():
        broken(name, "something follows its last row")
    last_blocks = blocks[data_blocks + member_blocks - 1]
    filling = np.arange(BLOCK) >= (sizes - BLOCK * (member_blocks - 1))[..., None]
    require(name, ~(last_blocks.astype(bool) & filling).any(axis=-1), "a member is not filled up with zeros")


def _check_npy_headers(
    name: str, blocks: np.ndarray, data_blocks: np.ndarray, sizes: np.ndarray, seq_len: int, token_type: np.dtype
) -> np.ndarray:
    """Check that each member is the array that it has to be; give the number of pieces, int64 `[rows]`."""
    tokens_header = _npy_header(token_type.str, (seq_len,))
    header_bytes = len(tokens_header)
    starts = blocks[data_blocks][..., :header_bytes]
    holds = (starts[:, 0] == np.frombuffer(tokens_header, dtype=np.uint8)).all(axis=-1)
    holds &= sizes[:, 0] == header_bytes + seq_len * token_type.itemsize
    require(name, holds, f"its tokens are not {token_type.name} [{seq_len}]")
    pieces, rest = np.divmod(sizes[:, 1] - header_bytes, SPAN_BYTES)
    kinds, kind = np.unique(pieces, return_inverse=True)
    spans_headers = [_npy_header("<i8", (int(count), len(SPAN_COLUMNS))) for count in kinds]
    table = np.frombuffer(b"".join(spans_headers), dtype=np.uint8).reshape(len(kinds), header_bytes)
    holds = (starts[:, 1] == table[kind]).all(axis=-1) & (rest == 0) & (pieces > 0)
    require(name, holds, f"its spans are not int64 [pieces, {len(SPAN_COLUMNS)}]")
    return pieces


@lru_cache
def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Give what comes before an array's data: 128 bytes, for all that fits into a shard."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _gather_spans(tar: np.ndarray, data_blocks: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    words = tar.view("<i8")
    counts = pieces * len(SPAN_COLUMNS)
    header_bytes = len(_npy_header("<i8", (1, len(SPAN_COLUMNS))))
    first_words = (data_blocks[:, 1] * BLOCK + header_bytes) // words.itemsize
    shifts = first_words - (np.cumsum(counts) - counts)
    return words[np.arange(counts.sum()) + np.repeat(shifts, counts)].reshape(-1, len(SPAN_COLUMNS))


def _check_spans(name: str, spans: np.ndarray, pieces: np.ndarray, piece_rows: np.ndarray, seq_len: int) -> np.ndarray:
    """Check that the pieces fill each row from its beginning; give where they end, int64 `[rows]`."""
    starts, answer_starts, ends = spans[:, 0], spans[:, 1], spans[:, 2]
    last_pieces = np.cumsum(pieces) - 1
    previous_ends = np.concatenate([[0], ends[:-1]])
    previous_ends[last_pieces[:-1] + 1] = 0
    require(name, starts == previous_ends, "its pieces don't follow one another", piece_rows)
    require(name, (starts < ends) & (ends <= seq_len), "a piece ends before its start or behind the row", piece_rows)
    require(name, (starts <= answer_starts) & (answer_starts <= ends), "an answer begins outside its piece", piece_rows)
    require(name, (spans[:, 3:] >= 0).all(axis=-1), "a source, input row or offset is negative", piece_rows)
    return ends[last_pieces]
