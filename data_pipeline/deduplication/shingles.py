"""Words and word n-grams of texts as 64-bit hashes, which the near-duplicate and contamination searches compare.

A word is a run of letters, digits and combining marks, in lower case after NFKC; everything else separates words. In
scripts without spaces (Chinese, Japanese, Thai, …), every character is a word. An operator in a formula changes the hash of
the word after it, or before it at the end of a text: `2 + 3` and `2 - 3` are two words each, and only the first word is
the same.

The hashes are the same on every machine, because they use only integer arithmetic. The Unicode tables come with polars and
Python; `constraints.txt` pins their versions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl

from data_pipeline.deduplication.operators import ASCII_OPERATORS, OPERATOR_SYMBOL, find_operators

NOT_IN_A_WORD = r"[^\p{L}\p{M}\p{N}\p{Sm}\x00-\x7f]"  # non-ASCII only; WORD_BYTES decides about ASCII
WITHOUT_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# Increased if the same text gets other words: a folder made with other near duplicates must not pass for this one.
WORDS_VERSION = 2
LONGEST_WORD = 64  # bytes; anything longer (base64, a URL without dots) counts as several words
# Limits of a block of rows. They keep the arrays in the processor's cache, and bound the memory if rows are whole books.
BLOCK_ROWS, BLOCK_BYTES = 4096, 8 * 2**20
MULTIPLIER = np.uint64(0xC4CEB9FE1A85EC53)


def _byte_table() -> np.ndarray:
    table = np.zeros(256, dtype=np.uint8)
    for byte in range(256):
        character = chr(byte)
        table[byte] = byte if byte >= 0x80 else ord(character.lower()) if character.isalnum() else 0
    return table


# Each byte in lower case, or 0 if it is not part of a word. Bytes from 0x80 on always are, since other non-ASCII
# characters have been replaced.
WORD_BYTES = _byte_table()
FIRST_BYTES = np.array([(1 << 8 * length) - 1 for length in range(9)], dtype=np.uint64)


class Hashes(NamedTuple):
    """Hashes of the words, or of the n-grams, of several consecutive texts.

    values: uint64 `[words]`. offsets: int64 `[texts + 1]`; text i has values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray


def words_of(texts: pl.Series) -> Hashes:
    """Hash every word of a string column."""
    texts = _normalize(texts)
    if texts.is_empty():
        return Hashes(np.empty(0, dtype=np.uint64), np.zeros(1, dtype=np.int64))
    array = texts.to_arrow(compat_level=pl.CompatLevel.oldest())  # 64-bit offsets and one buffer of text
    _, offsets, buffer = array.buffers()
    offsets = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    raw = np.frombuffer(buffer, dtype=np.uint8)[: offsets[-1]]
    padded = np.zeros(len(raw) + 8, dtype=np.uint8)  # padded because words are read 8 bytes at a time
    np.take(WORD_BYTES, raw, out=padded[: len(raw)], mode="clip")
    in_word = padded[: len(raw)] != 0
    edges = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1
    if in_word[0]:
        edges = np.concatenate([[0], edges])
    starts, lengths = _cut_long_words(edges[::2], edges[1::2] - edges[::2])  # in pairs: a text never ends inside a word
    words = Hashes(_hash_words(padded, starts, lengths), np.searchsorted(starts, offsets))
    _mix_operators_into(words, starts, raw, offsets)
    return words


def blocks_of_words(question: pl.Series, answer: pl.Series) -> Iterator[tuple[slice, Hashes]]:
    """Yield blocks of rows: the rows' slice, and their words as texts in the order question, answer, question, …

    `joined` merges each question with its answer. The block boundaries do not affect any row's result.
    """
    end_of_row = (question.str.len_bytes() + answer.str.len_bytes()).cast(pl.Int64).cum_sum().to_numpy()
    start = 0
    while start < len(question):
        before = end_of_row[start - 1] if start else 0
        fitting = int(np.searchsorted(end_of_row, before + BLOCK_BYTES, side="right"))
        rows = slice(start, min(max(fitting, start + 1), start + BLOCK_ROWS))
        questions, answers = question[rows].rename("text"), answer[rows].rename("text")
        in_turn = np.arange(2 * len(questions)).reshape(2, -1).T.ravel()
        yield rows, words_of(pl.concat([questions, answers]).gather(in_turn))
        start = rows.stop


def joined(pairs: Hashes) -> Hashes:
    """Merge each question and its answer into one text."""
    return Hashes(pairs.values, pairs.offsets[::2])


def ngrams_of(words: Hashes, n: int) -> Hashes:
    """Hash the n-grams of words, none across two texts; a text of fewer than n words has none."""
    counts = np.maximum(np.diff(words.offsets) - n + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if not offsets[-1]:
        return Hashes(np.empty(0, dtype=np.uint64), offsets)
    last = len(words.values) - n + 1
    values = words.values[:last].copy()
    for place in range(1, n):
        values *= MULTIPLIER
        values += words.values[place : last + place]
    # The values include n-grams across texts, which are cheaper to drop now than to avoid before.
    inside = np.arange(offsets[-1]) + np.repeat(words.offsets[:-1] - offsets[:-1], counts)
    return Hashes(mix(values[inside]), offsets)


def short_texts_of(words: Hashes, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash whole texts that have words, but fewer than n.

    Returns their indices, int64 `[short]`, and their hashes, uint64 `[short]`. The hash of a text of m words is that of
    its m-gram.
    """
    counts = np.diff(words.offsets)
    short = np.flatnonzero((counts > 0) & (counts < n))
    starts, counts = words.offsets[short], counts[short]
    values = words.values[starts]
    for place in range(1, counts.max(initial=0)):
        longer = np.flatnonzero(counts > place)
        values[longer] = values[longer] * MULTIPLIER + words.values[starts[longer] + place]
    return short, mix(values)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit of uint64 values over all 64, in place (MurmurHash3's finalizer, a bijection)."""
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= MULTIPLIER
    values ^= values >> np.uint64(33)
    return values


def _normalize(texts: pl.Series) -> pl.Series:
    """End every text with a line break and normalise non-ASCII characters; WORD_BYTES handles ASCII."""
    texts = texts.to_frame("text").select(pl.col("text") + "\n").to_series()
    others = (texts.str.len_bytes() != texts.str.len_chars()).arg_true()
    if others.is_empty():
        return texts
    mapped = texts.gather(others).str.normalize("NFKC").str.to_lowercase()
    mapped = mapped.str.replace_many(ASCII_OPERATORS)
    mapped = mapped.str.replace_all(NOT_IN_A_WORD, " ").str.replace_all(WITHOUT_SPACES, " $0 ")
    mapped = mapped.str.replace_all(OPERATOR_SYMBOL, " $0 ")
    return texts.scatter(others, mapped)


def _cut_long_words(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if lengths.max(initial=0) <= LONGEST_WORD:
        return starts, lengths
    pieces = -(-lengths // LONGEST_WORD)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    remaining = np.repeat(lengths, pieces) - piece * LONGEST_WORD
    return np.repeat(starts, pieces) + piece * LONGEST_WORD, np.minimum(remaining, LONGEST_WORD)


def _hash_words(padded: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    # Read eight bytes at a time from the start of each word. No byte in a word is 0, so the hash of a short word need not
    # include its length.
    eight_bytes = np.ndarray(len(padded) - 7, dtype="<u8", buffer=padded, strides=(1,))
    values = mix(eight_bytes[starts] & FIRST_BYTES[np.minimum(lengths, 8)])
    longer = np.flatnonzero(lengths > 8)
    for place in range(8, LONGEST_WORD, 8):
        following = eight_bytes[starts[longer] + place] & FIRST_BYTES[np.minimum(lengths[longer] - place, 8)]
        values[longer] = mix(values[longer] * MULTIPLIER + following)
        longer = longer[lengths[longer] > place + 8]
    return values


def _mix_operators_into(words: Hashes, starts: np.ndarray, raw: np.ndarray, text_offsets: np.ndarray) -> None:
    """Change the hashes of the words after operators, or of the last word of a text before them, in place."""
    operators = find_operators(raw)
    texts = np.searchsorted(text_offsets, operators, side="right") - 1
    operators_words = np.minimum(np.searchsorted(starts, operators), words.offsets[texts + 1] - 1)
    in_text = operators_words >= words.offsets[texts]  # unless the text has no word
    operators, operators_words = operators[in_text], operators_words[in_text]
    sums = np.zeros(len(words.values), dtype=np.uint64)
    np.add.at(sums, operators_words, mix(raw[operators].astype(np.uint64)))
    changed = np.unique(operators_words)
    words.values[changed] = mix(words.values[changed] ^ sums[changed])
