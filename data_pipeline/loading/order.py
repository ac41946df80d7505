"""The order of rows, as a pure function of the data, the seed and the position."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Rows are shuffled within blocks of this many shards, so that reading stays local.
SHARDS_PER_BLOCK = 16
# Every block of this many positions has the exact share of each source, so weights have a resolution of 0.01 %.
MIXTURE_BLOCK = 10_000
RAW_VALUES_PER_COUNT = 4  # Philox generates this many 64-bit values per value of its counter


class RowOrder:
    """The endless order of a folder's rows, with a different permutation for every epoch.

    It needs memory for a few blocks, independent of the number of rows.
    """

    def __init__(self, num_rows: int, fingerprint: str, seed: int, rows_per_file: Sequence[int]) -> None:
        if num_rows != sum(rows_per_file):
            raise ValueError(f"num_rows is {num_rows}, but the files have {sum(rows_per_file)} rows")
        self.num_rows = num_rows
        self.fingerprint = fingerprint
        self.seed = seed
        self.rows_per_file = np.asarray(rows_per_file, dtype=np.int64)
        self._first_rows = np.cumsum(self.rows_per_file) - self.rows_per_file
        # A batch may span two blocks and two epochs, and threads that look ahead may be one further.
        self._epoch = lru_cache(maxsize=3)(self._shuffle_shards)
        self._block = lru_cache(maxsize=3)(self._shuffle_block)

    def row(self, position: int) -> int:
        """Return the row at a position of the endless stream."""
        return int(self.rows(np.array([position]))[0])

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at ascending positions, both int64 `[n]`."""
        rows = np.empty(len(positions), dtype=np.int64)
        done = 0
        while done < len(positions):
            epoch, block, index = self._locate(int(positions[done]))
            block_rows = self._block(epoch, block)
            block_end = int(positions[done]) - index + len(block_rows)
            end = int(np.searchsorted(positions, block_end))
            rows[done:end] = block_rows[positions[done:end] - (block_end - len(block_rows))]
            done = end
        return rows

    def shards_ahead(self, position: int) -> list[int]:
        """List the shards that the stream reads from a position on: those of its block, then those of the next."""
        epoch, block, _ = self._locate(position)
        shards, ends = self._epoch(epoch)
        start = block * SHARDS_PER_BLOCK
        following = shards[start : start + 2 * SHARDS_PER_BLOCK]
        if block == len(ends) - 1:
            following = np.concatenate([following, self._epoch(epoch + 1)[0][:SHARDS_PER_BLOCK]])
        return list(dict.fromkeys(following.tolist()))

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Return the epoch of a position, the block in the epoch and the index in the block."""
        epoch, index = divmod(position, self.num_rows)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, index, side="right"))
        return epoch, block, index - (int(ends[block - 1]) if block else 0)

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of an epoch, and the number of rows up to the end of each block."""
        shards = _permutation(self._random(epoch, 0, len(self.rows_per_file)))
        last_of_blocks = [*range(SHARDS_PER_BLOCK - 1, len(shards) - 1, SHARDS_PER_BLOCK), len(shards) - 1]
        return shards, np.cumsum(self.rows_per_file[shards])[last_of_blocks]

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        shards, ends = self._epoch(epoch)
        before = int(ends[block - 1]) if block else 0
        rows = np.concatenate(
            [
                np.arange(self._first_rows[shard], self._first_rows[shard] + self.rows_per_file[shard])
                for shard in shards[block * SHARDS_PER_BLOCK : (block + 1) * SHARDS_PER_BLOCK]
            ]
        )
        return rows[_permutation(self._random(epoch, len(shards) + before, len(rows)))]

    def _random(self, epoch: int, first: int, count: int) -> np.ndarray:
        return _random(f"{self.fingerprint}:{self.seed}:{epoch}", first, count)


class MixtureOrder:
    """The endless order of the rows of several sources. Each source has an endless order of its own.

    Every MIXTURE_BLOCK positions have `quotas[s]` rows of source s, shuffled. So the share of a source is exact, and the
    row at a position does not depend on history. Row numbers count through all sources, one source after another.
    """

    def __init__(self, orders: Sequence[RowOrder], quotas: Sequence[int], fingerprint: str, seed: int) -> None:
        if sum(quotas) != MIXTURE_BLOCK:
            raise ValueError(f"the quotas add up to {sum(quotas)}, not {MIXTURE_BLOCK}")
        self.orders = orders
        self.quotas = quotas
        self.fingerprint = fingerprint
        self.seed = seed
        self._first_rows = np.cumsum([0, *(order.num_rows for order in orders)])
        self._block = lru_cache(maxsize=3)(self._shuffle_block)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at ascending positions, both int64 `[n]`."""
        sources, indices = self._sources(positions)
        rows = np.empty(len(positions), dtype=np.int64)
        for source in np.unique(sources):
            chosen = sources == source
            rows[chosen] = self._first_rows[source] + self.orders[source].rows(indices[chosen])
        return rows

    def shards_ahead(self, position: int) -> list[int]:
        """List the shards of all sources that the stream reads from a position on, like `RowOrder.shards_ahead`."""
        block, first_shard, shards = position // MIXTURE_BLOCK, 0, []
        for order, quota in zip(self.orders, self.quotas, strict=True):
            shards += [first_shard + shard for shard in order.shards_ahead(block * quota)]
            first_shard += len(order.rows_per_file)
        return shards

    def _sources(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at each position, and the position in that source's own order."""
        blocks, offsets = np.divmod(positions, MIXTURE_BLOCK)
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            chosen = blocks == block
            source_at, index_at = self._block(int(block))
            sources[chosen] = source_at[offsets[chosen]]
            indices[chosen] = index_at[offsets[chosen]] + block * np.asarray(self.quotas)[sources[chosen]]
        return sources, indices

    def _shuffle_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        shuffled = _permutation(_random(f"{self.fingerprint}:{self.seed}:mixture:{block}", 0, MIXTURE_BLOCK))
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[shuffled]
        indices = np.empty_like(sources)
        for source, quota in enumerate(self.quotas):
            indices[sources == source] = np.arange(quota)
        return sources, indices


def quotas_of(weights: Sequence[float]) -> list[int]:
    """Turn weights into whole numbers of rows that add up to MIXTURE_BLOCK, by the largest-remainder method."""
    exact = np.asarray(weights, dtype=np.float64) * (MIXTURE_BLOCK / sum(weights))
    quotas = np.floor(exact).astype(np.int64)
    # The stable sort rounds up the first in the list if remainders are equal.
    short = MIXTURE_BLOCK - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:short]] += 1
    return quotas.tolist()


def _random(identity: str, first: int, count: int) -> np.ndarray:
    # The raw stream of a bit generator is the same in every numpy version; the result of Generator.permutation is not.
    generator = np.random.Philox(key=int.from_bytes(hashlib.sha256(identity.encode()).digest()[:16], "little"))
    generator.advance(first // RAW_VALUES_PER_COUNT)
    skipped = first % RAW_VALUES_PER_COUNT
    return generator.random_raw(skipped + count)[skipped:]


def _permutation(random: np.ndarray) -> np.ndarray:
    return np.argsort(random, kind="stable")
