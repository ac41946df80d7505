"""Parsing a whole shard as columns. Every byte of the format is checked, without a loop over rows."""

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
CHECKSUM_FIELD = slice(148, 156)  # taken as spaces when the checksum is computed


@dataclass(frozen=True)
class ShardColumns:
    """The contents of a shard that follows the format.

    spans: int64 `[pieces, 6]`, columns as in SPAN_COLUMNS, in row order.
    piece_rows: int64 `[pieces]`, each piece's row in the shard.
    row_ends: int64 `[rows]`, where each row's padding begins.
    """

    spans: np.ndarray
    piece_rows: np.ndarray
    row_ends: np.ndarray
    seq_len: int
    _token_blocks: np.ndarray  # `[rows]`, the first block of each row's tokens
    _blocks: np.ndarray  # `[blocks, tokens in a block]`, the tar seen as tokens

    def tokens(self, first: int, last: int) -> np.ndarray:
        """Return a copy of the tokens of rows first to last - 1, `[rows, seq_len]`."""
        per_block = self._blocks.shape[1]
        skipped = self._header_tokens
        blocks_per_row = -(-(skipped + self.seq_len) // per_block)
        wanted = self._token_blocks[first:last, None] + np.arange(blocks_per_row)
        return self._blocks[wanted].reshape(len(wanted), -1)[:, skipped : skipped + self.seq_len]

    def tokens_at(self, columns: np.ndarray) -> np.ndarray:
        """Return one token of each piece, `[pieces]`. columns: `[pieces]`, its position in the piece's row."""
        per_block = self._blocks.shape[1]
        first = self._token_blocks[self.piece_rows] * per_block + self._header_tokens
        return self._blocks.reshape(-1)[first + columns]

    @property
    def _header_tokens(self) -> int:
        return len(_npy_header(self._blocks.dtype.str, (self.seq_len,))) // self._blocks.itemsize


def parse_shard(name: str, tar: np.ndarray, offsets: np.ndarray, seq_len: int, dtype: type) -> ShardColumns:
    """Parse the bytes of a shard.

    name: the tar's file name; its members' names begin with it.
    tar: uint8 `[bytes]`.
    offsets: the contents of the offsets file.
    dtype: the type of the tokens.
    Raises DataError if the shard breaks the format, with the first row that does.
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
    """Raise the DataError for a shard that breaks the format."""
    raise DataError(f"{name} breaks the format of shards, {what}: prepare the folder again")


def require(name: str, rows_hold: np.ndarray, what: str, rows: np.ndarray | None = None) -> None:
    """Raise the DataError for the first row whose condition does not hold, if there is one.

    rows_hold: bool; the first axis is rows. rows: the row numbers, if they are not 0, 1, ….
    """
    if not rows_hold.all():
        first = int(np.argwhere(~rows_hold)[0][0])
        broken(name, f"row {first if rows is None else rows[first]}: {what}")


def _data_blocks(name: str, tar: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the block where each member's data begins, int64 `[rows, 2]`."""
    if offsets.dtype != np.uint64 or offsets.ndim != 2 or offsets.shape[1] != len(KINDS) or not len(offsets):
        broken(name, f"its offsets are {offsets.dtype} {list(offsets.shape)}, not uint64 [rows, {len(KINDS)}]")
    if len(tar) % tarfile.RECORDSIZE:
        broken(name, f"its size of {len(tar)} bytes is not a multiple of {tarfile.RECORDSIZE}")
    inside = (offsets >= BLOCK) & (offsets < len(tar)) & (offsets % BLOCK == 0)
    require(name, inside, "an offset is not a possible position of a tar member")
    return offsets.astype(np.int64) // BLOCK


def _member_sizes(name: str, blocks: np.ndarray, data_blocks: np.ndarray) -> np.ndarray:
    """Check that each member has a plain tar header with the right name; return the data sizes, int64 `[rows, 2]`."""
    headers = blocks[data_blocks - 1]
    stem = name.removesuffix(".tar")
    expected = [[f"{stem}-{row:06d}.{kind}.npy".encode() for kind in KINDS] for row in range(len(headers))]
    names = np.ascontiguousarray(headers[..., NAME]).view("S100")[..., 0]
    require(name, names == np.array(expected), "an offset does not lead to the member with the row's name")
    sizes, checksums = _octal(headers[..., SIZE_DIGITS]), _octal(headers[..., CHECKSUM_DIGITS])
    template = np.frombuffer(tarfile.TarInfo().tobuf(format=tarfile.USTAR_FORMAT), dtype=np.uint8)
    fixed = np.ones(BLOCK, dtype=bool)
    for field in (NAME, SIZE_DIGITS, CHECKSUM_DIGITS):
        fixed[field] = False
    plain = (headers[..., fixed] == template[fixed]).all(axis=-1)
    headers[..., CHECKSUM_FIELD] = ord(" ")
    plain &= (sizes >= 0) & (checksums == headers.sum(axis=-1, dtype=np.int64))
    require(name, plain, "a member's tar header is not a plain ustar header")
    return sizes


def _octal(digits: np.ndarray) -> np.ndarray:
    """Parse octal numbers, uint8 `[..., digits]`. A number with a character that is no octal digit becomes -1."""
    values = digits - np.uint8(ord("0"))  # characters below "0" wrap around to large numbers
    numbers = values.astype(np.int64) @ 8 ** np.arange(values.shape[-1] - 1, -1, -1)
    return np.where((values < 8).all(axis=-1), numbers, -1)


def _check_layout(name: str, blocks: np.ndarray, data_blocks: np.ndarray, sizes: np.ndarray) -> None:
    """Check that the members follow each other without gaps, padded with zeros, and that only zeros follow the last."""
    member_blocks = -(-sizes // BLOCK)
    expected = 1 + np.concatenate([[0], np.cumsum(member_blocks + 1)])
    exact = (data_blocks.reshape(-1) == expected[:-1]).reshape(data_blocks.shape) & (sizes > 0)
    require(name, exact, "its members do not follow each other without gaps")
    end = int(expected[-1]) - 1
    # A tar ends with two blocks of zeros and consists of whole records of 20 blocks.
    if len(blocks) != -(-(end + 2) // (tarfile.RECORDSIZE // BLOCK)) * (tarfile.RECORDSIZE // BLOCK):
        broken(name, f"it has {len(blocks)} blocks, but its {len(data_blocks)} rows take {end}")
    if blocks[end:].any():
        broken(name, "there is data after its last row")
    last_blocks = blocks[data_blocks + member_blocks - 1]
    filling = np.arange(BLOCK) >= (sizes - BLOCK * (member_blocks - 1))[..., None]
    require(name, ~(last_blocks.astype(bool) & filling).any(axis=-1), "a member is not padded with zeros")


def _check_npy_headers(
    name: str, blocks: np.ndarray, data_blocks: np.ndarray, sizes: np.ndarray, seq_len: int, token_type: np.dtype
) -> np.ndarray:
    """Check dtype and shape of each member; return the number of pieces per row, int64 `[rows]`."""
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
    """Return the header of an array in npy format; for every array that fits into a shard it has 128 bytes."""
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
    """Check that the pieces fill each row from its start; return where the last one ends, int64 `[rows]`."""
    starts, answer_starts, ends = spans[:, 0], spans[:, 1], spans[:, 2]
    last_pieces = np.cumsum(pieces) - 1
    previous_ends = np.concatenate([[0], ends[:-1]])
    previous_ends[last_pieces[:-1] + 1] = 0
    require(name, starts == previous_ends, "its pieces do not follow each other without gaps", piece_rows)
    require(name, (starts < ends) & (ends <= seq_len), "a piece ends before its start or past the row", piece_rows)
    require(name, (starts <= answer_starts) & (answer_starts <= ends), "an answer begins outside its piece", piece_rows)
    require(name, spans[:, 3:].min(axis=-1) >= 0, "a source, input row or offset is negative", piece_rows)
    return ends[last_pieces]
