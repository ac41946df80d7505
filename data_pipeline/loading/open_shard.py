"""One shard's tar, mapped into memory, and the numpy arrays in it."""

import io
import mmap
from functools import lru_cache

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.loading.integrity import BadFileError
from data_pipeline.shards.packing import SPAN_COLUMNS

NPY_HEADER_BYTES = 128  # as numpy writes the arrays in a shard
SPAN_BYTES = 8 * len(SPAN_COLUMNS)


class OpenShard:
    """The memory-mapped tar of one shard, and the positions in it of each row's two members.

    A lock on the tar is held as long as this object exists. Raises DataError if tar and offsets do not fit together.
    """

    def __init__(self, tar: io.BufferedIOBase, offsets: io.BufferedIOBase, name: str, rows: int) -> None:
        self.name = name
        self._map = mmap.mmap(tar.fileno(), 0, access=mmap.ACCESS_READ)  # the map has its own file descriptor
        self.data = memoryview(self._map)
        try:
            at = np.load(offsets, allow_pickle=False)
        except ValueError as error:
            raise DataError(f"the offsets of {name} are not a numpy array: copy or prepare the folder again") from error
        if at.shape != (rows, 2) or at.dtype != np.uint64 or at.max() > len(self.data) - NPY_HEADER_BYTES:
            raise DataError(f"the offsets of {name} do not fit it: copy or prepare the folder again")
        self.offsets: list[list[int]] = at.tolist()  # Python integers are faster than numpy's one at a time

    def check_length(self) -> None:
        """Raise BadFileError if the file has been truncated: reading past its end would kill the process."""
        if self._map.size() < len(self._map):
            size = self._map.size()
            raise BadFileError(f"{self.name} was truncated to {size} bytes while it was read: copy it again")

    def count_spans(self, at: int) -> int:
        """Return the number of spans of a row. at: where the data of its spans member begins."""
        try:
            return _count_spans(bytes(self.data[at : at + NPY_HEADER_BYTES]))
        except ValueError as error:
            raise DataError(f"{self.name} has invalid spans ({error}): prepare the data again") from error

    def read_npy(self, at: int) -> np.ndarray:
        """Return a read-only view of the array of a member. at: where the data of the member begins."""
        header_end = at + 10 + int.from_bytes(self.data[at + 8 : at + 10], "little")
        try:
            shape, dtype = _parse_npy_header(bytes(self.data[at:header_end]))
            size = dtype.itemsize * int(np.prod(shape))
            return np.frombuffer(self.data[header_end : header_end + size], dtype=dtype).reshape(shape)
        except ValueError as error:
            raise DataError(f"{self.name} is corrupt ({error}): copy or prepare the folder again") from error


@lru_cache(maxsize=4096)  # few headers are distinct, and parsing one costs more than reading a row
def _count_spans(header: bytes) -> int:
    shape, dtype = _parse_npy_header(header)
    if dtype != np.int64 or len(shape) != 2 or shape[1] != len(SPAN_COLUMNS) or header[-1:] != b"\n":
        raise ValueError(f"{dtype} {shape}")
    return shape[0]


@lru_cache(maxsize=4096)
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("pickled objects, which are never read")
    return shape, dtype
