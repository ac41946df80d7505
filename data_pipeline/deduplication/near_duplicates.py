"""Near duplicates: a MinHash signature for every row, and the rows that repeat an earlier one.

A row is the set of its word n-grams, question and answer together; two rows are near duplicates when the Jaccard
similarity of their sets, estimated from the signatures, reaches a threshold. `signatures` looks at one chunk and needs no
other; `duplicates` looks at all signatures, so its answer depends on the order of rows and on nothing else. Words are all
that counts: rows that ask different questions about the same long passage are near duplicates too, and so are rows that
differ in nothing but punctuation or operators.

One-permutation hashing (Li, Owen and Zhang 2012, arXiv:1208.1259) hashes every n-gram once, into one of k bins; a bin keeps
its smallest hash. A bin that stays empty borrows for the bands from another (optimal densification, Shrivastava 2017,
arXiv:1703.04664), and is marked, because the estimate leaves bins out that are empty in both rows: for texts with fewer
n-grams than bins, most questions and answers, that is more exact than k permutations.
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

BORROWED = np.uint16(0x8000)  # marks the value of a bin that was empty; the lower 15 bits are the value
LARGEST_SIGNATURE = 300  # bytes
WANTED_RECALL = 0.99  # of the bands, for pairs at the threshold
REPRESENTATIVES = 8  # rows of a bucket that all others in it are compared with, which keeps a huge bucket linear
PAIRS_AT_ONCE = 16384


@dataclass(frozen=True)
class NearDuplicateSettings:
    """What counts as a near duplicate.

    threshold: the Jaccard similarity of two rows' n-grams from which on they are near duplicates.
    ngram_words: words per n-gram. A row of fewer words is one n-gram; a row without words repeats nothing.
    permutations: bins of a signature, 2 bytes each. seed: another one gives another, equally good, set of hashes.
    Raises DataError where one of them makes no sense.

    With the defaults, one changed word leaves texts of L words (L - 5) / (L + 1) similar: from 29 words on they are near
    duplicates, and in longer texts one changed word in 27 is the limit. Two rows of similarity J are compared with
    probability 1 - (1 - J^6)^21; that they are then dropped as well has, where all 128 bins are filled, the probability
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
                f"near duplicates are looked for with {self.permutations} permutations: "
                f"give 16 to {LARGEST_SIGNATURE // 2}"
            )
        if not 0 <= self.seed < 2**64:
            raise DataError(f"the seed of near duplicates is {self.seed}: give a number from 0 to 2^64 - 1")

    @property
    def rows_per_band(self) -> int:
        """The most bins to a band, hence the fewest pairs to compare, with which pairs at the threshold meet."""
        wide_enough = range(self.permutations // 2, 1, -1)
        return next((r for r in wide_enough if _meet(self.threshold, self.permutations // r, r) >= WANTED_RECALL), 1)

    @property
    def bands(self) -> int:
        """Bands of a signature; rows that agree in all bins of one are compared."""
        return self.permutations // self.rows_per_band

    def candidate_probability(self, jaccard: float) -> float:
        """Gives the probability that two rows of this similarity are compared (the S-curve of LSH)."""
        return _meet(jaccard, self.bands, self.rows_per_band)


def signatures(
    question: pl.Series, answer: pl.Series, settings: NearDuplicateSettings = NearDuplicateSettings()
) -> np.ndarray:
    """Computes the signatures of rows, uint16 `[rows, permutations]`; they need nothing but their row and the settings.

    Nothing else has to be kept for `duplicates`: band keys are computed from these.
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
    """Finds the rows that repeat an earlier one: bool `[rows]`, true for those to drop.

    signature_chunks: what `signatures` gave for the chunks, in order; memory-mapped arrays are read band by band.
    eligible: bool `[rows]`, false for rows that are dropped anyway: they neither repeat nor are repeated.
    Rows that are near duplicates of each other, directly or through others, are a cluster; its first row stays. Takes
    about 45 bytes of memory a row beside the signatures.
    """
    rows = _Signatures(signature_chunks)
    if eligible.shape != (len(rows),):
        raise ValueError(f"{len(rows)} signatures, and eligible has the shape {eligible.shape}")
    candidates = np.flatnonzero(eligible & rows.have_words())
    parents = np.arange(len(rows))
    for band in range(settings.bands):
        bins = slice(band * settings.rows_per_band, (band + 1) * settings.rows_per_band)
        members, buckets = _buckets(rows.band_keys(bins)[candidates], candidates, len(rows))
        _join_similar(parents, rows, members, buckets, settings.threshold)
    return _roots(parents, np.arange(len(rows))) != np.arange(len(rows))


def estimated_jaccard(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimates the similarity of pairs of rows from their signatures, `[pairs, permutations]` each; 0 without words."""
    equal = np.count_nonzero((left == right) & (left < BORROWED), axis=1)
    empty = np.count_nonzero((left & right) >= BORROWED, axis=1)
    return equal / np.maximum(left.shape[1] - empty, 1)


class _Signatures:
    """The signatures of all chunks as one array that is never made."""

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self.chunks = chunks
        self.starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def have_words(self) -> np.ndarray:
        """A row with words has a bin of its own."""
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
        for index in np.flatnonzero(np.diff(edges)):
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
    smallest = np.full((len(offsets) - 1) * bins, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, texts * bins + bin_of_text, hashes)
    smallest = smallest.reshape(-1, bins)
    # The upper bits choose the bin and the order in it; the lower ones are left to tell n-grams apart.
    values = smallest.astype(np.uint16) & ~BORROWED
    _densify(values, smallest, smallest != np.iinfo(np.uint64).max, settings.seed)
    return values


def _densify(values: np.ndarray, smallest: np.ndarray, filled: np.ndarray, seed: int) -> None:
    """Gives each empty bin a value that follows from the filled bin it likes best, `[rows, bins]` all of them."""
    bins = values.shape[1]
    values[~filled] = np.iinfo(np.uint16).max  # which stays in rows without any n-gram
    counts = filled.sum(axis=1)
    rows = np.argsort(-counts, kind="stable")
    rows = rows[(counts[rows] > 0) & (counts[rows] < bins)]
    filled, counts = filled[rows], counts[rows]
    lenders = np.nonzero(filled)[1]
    first_lender = np.cumsum(counts) - counts
    likings, multipliers = _likings(bins, seed)
    best = np.full(filled.shape, np.iinfo(np.uint16).max, dtype=np.uint16)
    for place in range(counts.max(initial=0)):
        having = np.searchsorted(-counts, -place)  # rows with so many filled bins stand in front
        np.minimum(best[:having], likings[lenders[first_lender[:having] + place]], out=best[:having])
    borrowed = np.take_along_axis(smallest[rows], (best % bins).astype(np.int64), axis=1)
    # Other bits of the hash in every bin: a row of one n-gram would have the 15 bits of one bin only, and unlike rows
    # in a large corpus would have the same.
    borrowed = ((borrowed * multipliers) >> np.uint64(49)).astype(np.uint16) | BORROWED
    values[rows] = np.where(filled, values[rows], borrowed)


@lru_cache(maxsize=4)
def _likings(bins: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How much each bin likes to borrow from another, and by what it multiplies what it borrows.

    The first, uint16 `[lender, borrower]`, is least for the one liked best, and the lender modulo bins; the second is
    uint64 `[borrower]`, odd.
    """
    # A bit generator's raw stream is the same in every numpy version; what Generator.permutation makes of it is not.
    generator = np.random.Philox(key=seed)
    order = np.argsort(generator.random_raw(bins * bins).reshape(bins, bins), axis=0, kind="stable")
    likings = order * bins + np.arange(bins)[:, None]
    return likings.astype(np.uint16), generator.random_raw(bins) | np.uint64(1)


def _buckets(keys: np.ndarray, rows: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows that share their key with others; gives them, bucket by bucket in order, and a name of the bucket."""
    # Key and row become one number: sorting it needs no second array, and keeps the order of rows. The bits that keys
    # lose make a few pairs meet that should not; comparing them settles it.
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
    """Joins rows of a bucket that are similar to its first row, then those left to the first row left, and so on."""
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
    """Joins the clusters of pairs of rows; the parent of a cluster is its first row."""
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
