"""Near duplicates: computes a MinHash signature for every row, and finds the rows that repeat an earlier one.

A row is represented by the set of its word n-grams, over question and answer together. Two rows are near duplicates if
the Jaccard similarity of their sets, estimated from the signatures, reaches a threshold. Only words and the operators
of formulas count. So rows that ask different questions about the same long passage are near duplicates, and so are rows
that differ only in punctuation. `2 + 3` and `2 - 3` differ in one word.

`signatures` processes each chunk independently. `duplicates` reads all signatures, so its result depends on the order of
the rows but not on how they are divided into chunks.

One-permutation hashing (Li, Owen and Zhang 2012, arXiv:1208.1259) hashes every n-gram once, into one of k bins, and each
bin keeps its smallest hash. For the bands, an empty bin borrows its value from another bin (optimal densification,
Shrivastava 2017, arXiv:1703.04664). Borrowed values are marked, because the estimate ignores bins that are empty in both
rows. For texts with fewer n-grams than bins, which most questions and answers are, the estimate is more accurate than with
k permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl

from data_pipeline.deduplication.shingles import (
    MULTIPLIER,
    Hashes,
    blocks_of_words,
    joined,
    mix,
    ngrams_of,
    short_texts_of,
)
from data_pipeline.errors import DataError

BORROWED = np.uint16(0x8000)  # flag of a bin that was empty; the lower 15 bits are the value
LARGEST_SIGNATURE = 300  # bytes
WANTED_RECALL = 0.99  # share of the pairs at the threshold that the bands must find
# Rows of a bucket that all its other rows are compared with. A small number keeps the cost of huge buckets linear.
REPRESENTATIVES = 8
PAIRS_AT_ONCE = 16384


@dataclass(frozen=True)
class NearDuplicateSettings:
    """The definition of a near duplicate.

    threshold: two rows are near duplicates if the Jaccard similarity of their n-grams is at least this.
    ngram_words: words per n-gram. A row of fewer words is one n-gram; a row without words is never a duplicate.
    permutations: bins of a signature, 2 bytes each.
    seed: selects the hash functions; all seeds are equally good.
    Raises DataError for a value out of range.

    With the defaults, changing one word of a text of L words leaves a similarity of (L - 5) / (L + 1). From 29 words on
    the texts are still near duplicates; in longer texts, the limit is one changed word in 27.

    Two rows of similarity J are compared with probability 1 - (1 - J^6)^21. If all 128 bins are filled, the
    probabilities that the two rows are compared, and that one is then dropped, are
    J        0.60   0.70   0.75   0.80   0.85   0.90   0.95
    compared 0.633  0.928  0.984  0.998  1.000  1.000  1.000
    dropped  0.000  0.005  0.090  0.500  0.936  1.000  1.000
    """

    threshold: float = 0.8
    ngram_words: int = 3
    permutations: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise DataError(f"the threshold of near duplicates is {self.threshold}: give a number above 0 and up to 1")
        if self.ngram_words < 1:
            raise DataError(f"the n-grams of near duplicates have {self.ngram_words} words: give 1 or more")
        if not 16 <= self.permutations <= LARGEST_SIGNATURE // 2:
            raise DataError(
                f"near duplicates cannot be found with {self.permutations} permutations: "
                f"give 16 to {LARGEST_SIGNATURE // 2}"
            )
        if not 0 <= self.seed < 2**64:
            raise DataError(f"the seed of near duplicates is {self.seed}: give a number from 0 to 2^64 - 1")

    @property
    def rows_per_band(self) -> int:
        """The bins per band: the largest number, hence with the fewest comparisons, that reaches WANTED_RECALL."""
        wide_enough = range(self.permutations // 2, 1, -1)
        return next((r for r in wide_enough if _meet(self.threshold, self.permutations // r, r) >= WANTED_RECALL), 1)

    @property
    def bands(self) -> int:
        """The bands per signature; rows that agree in all bins of a band are compared."""
        return self.permutations // self.rows_per_band

    def candidate_probability(self, jaccard: float) -> float:
        """Compute the probability that two rows of this similarity are compared (the S-curve of LSH)."""
        return _meet(jaccard, self.bands, self.rows_per_band)


def signatures(
    question: pl.Series, answer: pl.Series, settings: NearDuplicateSettings = NearDuplicateSettings()
) -> np.ndarray:
    """Compute the signatures of rows, uint16 `[rows, permutations]`; each depends only on its row and the settings.

    `duplicates` needs nothing else: it computes the band keys from the signatures.
    """
    blocks = [np.empty((0, settings.permutations), dtype=np.uint16)]
    for _, pairs in blocks_of_words(question, answer):
        blocks.append(_one_permutation_hashing(joined(pairs), settings))
    return np.concatenate(blocks)


def duplicates(
    signature_chunks: Sequence[np.ndarray],
    eligible: np.ndarray,
    settings: NearDuplicateSettings = NearDuplicateSettings(),
) -> np.ndarray:
    """Find the rows that repeat an earlier one: bool `[rows]`, true for rows to drop.

    signature_chunks: the results of `signatures` for the chunks, in order; memory-mapped arrays are read band by band.
    eligible: bool `[rows]`, false for rows that are dropped anyway and are not compared with any other.

    Rows that are near duplicates of each other, directly or through other rows, form a cluster, and its first row stays.
    Uses about 45 bytes of memory per row in addition to the signatures.
    """
    rows = _Signatures(signature_chunks)
    if eligible.shape != (len(rows),):
        raise ValueError(f"eligible has the shape {eligible.shape}; it must be {(len(rows),)}, one entry per signature")
    candidates = np.flatnonzero(eligible & rows.have_words())
    parents = np.arange(len(rows))
    for band in range(settings.bands):
        bins = slice(band * settings.rows_per_band, (band + 1) * settings.rows_per_band)
        members, buckets = _buckets(rows.band_keys(bins)[candidates], candidates, len(rows))
        _join_similar(parents, rows, members, buckets, settings.threshold)
    return _roots(parents, np.arange(len(rows))) != np.arange(len(rows))


def estimated_jaccard(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimate the similarity of pairs of rows from their signatures, `[pairs, permutations]` each; 0 without words."""
    equal = np.count_nonzero((left == right) & (left < BORROWED), axis=1)
    empty = np.count_nonzero((left & right) >= BORROWED, axis=1)
    return equal / np.maximum(left.shape[1] - empty, 1)


class _Signatures:
    """A view of the signatures of all chunks as one array, without copying them into one."""

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self.chunks = chunks
        self.starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def have_words(self) -> np.ndarray:
        """Find the rows that have words, bool `[rows]`: they have a bin that is not borrowed."""
        found = [chunk.min(axis=1) < BORROWED for chunk in self.chunks]
        return np.concatenate([np.empty(0, dtype=bool), *found])

    def band_keys(self, bins: slice) -> np.ndarray:
        keys = np.zeros(len(self), dtype=np.uint64)
        for start, chunk in zip(self.starts, self.chunks, strict=False):
            part = keys[start : start + len(chunk)]
            for values in chunk[:, bins].T:
                part *= MULTIPLIER
                part += values
            mix(part)
        return keys

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        order = np.argsort(rows)
        ordered = rows[order]
        edges = np.searchsorted(ordered, self.starts)
        found = np.empty((len(rows), self.chunks[0].shape[1]), dtype=np.uint16)
        for index in np.flatnonzero(np.diff(edges)).tolist():
            part = slice(edges[index], edges[index + 1])
            found[order[part]] = self.chunks[index][ordered[part] - self.starts[index]]
        return found


def _meet(jaccard: float, bands: int, rows_per_band: int) -> float:
    return 1 - (1 - jaccard**rows_per_band) ** bands


def _one_permutation_hashing(words: Hashes, settings: NearDuplicateSettings) -> np.ndarray:
    bins = settings.permutations
    hashes, offsets = ngrams_of(words, settings.ngram_words)
    short, short_hashes = short_texts_of(words, settings.ngram_words)
    texts = np.concatenate([np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), short])
    seed = mix(np.array([settings.seed], dtype=np.uint64))
    hashes = mix(np.concatenate([hashes, short_hashes]) ^ seed)
    bin_of_text = (((hashes >> np.uint64(32)) * np.uint64(bins)) >> np.uint64(32)).view(np.int64)
    smallest: np.ndarray = np.full((len(offsets) - 1) * bins, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, texts * bins + bin_of_text, hashes)
    smallest = smallest.reshape(-1, bins)
    # The upper bits of a hash choose the bin and the smallest value in it; the lower bits distinguish n-grams.
    values = smallest.astype(np.uint16) & ~BORROWED
    _densify(values, smallest, smallest != np.iinfo(np.uint64).max, settings.seed)
    return values


def _densify(values: np.ndarray, smallest: np.ndarray, filled: np.ndarray, seed: int) -> None:
    """Fill each empty bin with a value derived from its preferred filled bin; all arrays are `[rows, bins]`."""
    bins = values.shape[1]
    values[~filled] = np.iinfo(np.uint16).max  # final only in rows without n-grams
    counts = filled.sum(axis=1)
    rows = np.argsort(-counts, kind="stable")
    rows = rows[(counts[rows] > 0) & (counts[rows] < bins)]
    filled, counts = filled[rows], counts[rows]
    lenders = np.nonzero(filled)[1]
    first_lender = np.cumsum(counts) - counts
    likings, multipliers = _likings(bins, seed)
    best = np.full(filled.shape, np.iinfo(np.uint16).max, dtype=np.uint16)
    for place in range(counts.max(initial=0)):
        having = np.searchsorted(-counts, -place)  # rows with more filled bins than `place`; they come first
        np.minimum(best[:having], likings[lenders[first_lender[:having] + place]], out=best[:having])
    borrowed = np.take_along_axis(smallest[rows], (best % bins).astype(np.int64), axis=1)
    # Each bin takes different bits of the hash. Otherwise a row with one n-gram would have the same 15 bits in all bins,
    # and unrelated rows in a large corpus would share them.
    borrowed = ((borrowed * multipliers) >> np.uint64(49)).astype(np.uint16) | BORROWED
    values[rows] = np.where(filled, values[rows], borrowed)


@lru_cache(maxsize=4)
def _likings(bins: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw from which bins each bin prefers to borrow, and the factor by which it multiplies what it borrows.

    The preferences are uint16 `[lender, borrower]`; the smallest is preferred, and modulo `bins` it gives the lender. The
    factors are uint64 `[borrower]`, odd.
    """
    # A bit generator's raw stream is the same in every numpy version; the result of Generator.permutation is not.
    generator = np.random.Philox(key=seed)
    order = np.argsort(generator.random_raw(bins * bins).reshape(bins, bins), axis=0, kind="stable")
    likings = order * bins + np.arange(bins)[:, None]
    return likings.astype(np.uint16), generator.random_raw(bins) | np.uint64(1)


def _buckets(keys: np.ndarray, rows: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows that share their key with others; return them sorted by bucket and row, and each one's bucket."""
    # Key and row are packed into one number: sorting it needs no second array and keeps the order of rows. Because keys
    # lose bits, a few pairs share a bucket by accident; the comparison rejects them.
    row_bits = np.uint64(max(num_rows - 1, 1).bit_length())
    keys >>= row_bits
    keys <<= row_bits
    keys |= rows.view(np.uint64)
    keys.sort()
    equal = (keys[1:] ^ keys[:-1]) >> row_bits == 0
    shared = np.zeros(len(keys), dtype=bool)
    shared[1:] = equal
    shared[:-1] |= equal
    keys = keys[shared]
    return (keys & ((np.uint64(1) << row_bits) - np.uint64(1))).view(np.int64), keys >> row_bits


def _join_similar(
    parents: np.ndarray, rows: _Signatures, members: np.ndarray, buckets: np.ndarray, threshold: float
) -> None:
    """Join the rows of each bucket that are similar to its first row; repeat with the remaining rows."""
    for _ in range(REPRESENTATIVES):
        first = np.ones(len(members), dtype=bool)
        first[1:] = buckets[1:] != buckets[:-1]
        if first.all():
            return
        representatives = members[first][np.cumsum(first) - 1][~first]
        members, buckets = members[~first], buckets[~first]
        settled = _roots(parents, members) == _roots(parents, representatives)
        for start in range(0, len(members), PAIRS_AT_ONCE):
            pairs = start + np.flatnonzero(~settled[start : start + PAIRS_AT_ONCE])
            settled[pairs] = estimated_jaccard(rows[members[pairs]], rows[representatives[pairs]]) >= threshold
        _join(parents, members[settled], representatives[settled])
        members, buckets = members[~settled], buckets[~settled]


def _join(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Join the clusters of the two rows of each pair; the root of a cluster is its first row."""
    while True:
        left, right = _roots(parents, left), _roots(parents, right)
        apart = left != right
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))


def _roots(parents: np.ndarray, rows: np.ndarray) -> np.ndarray:
    roots = parents[rows]
    while not np.array_equal(roots, above := parents[roots]):
        roots = above
    parents[rows] = roots
    return roots
