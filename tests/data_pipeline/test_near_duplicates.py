import hashlib
import random
import tracemalloc
from math import ceil, comb

import numpy as np
import polars as pl
import pytest

from data_pipeline.deduplication import near_duplicates, shingles
from data_pipeline.deduplication.near_duplicates import (
    BORROWED,
    REPRESENTATIVES,
    NearDuplicateSettings,
    duplicates,
    estimated_jaccard,
    signatures,
)
from data_pipeline.errors import DataError

DEFAULT = NearDuplicateSettings()
VOCABULARY = [f"word{number}" for number in range(3000)]


def series(texts) -> pl.Series:
    return pl.Series("text", list(texts), dtype=pl.String)


def signatures_of(texts, settings=DEFAULT) -> np.ndarray:
    """Signatures of rows whose question is a text's first third and whose answer is the rest."""
    words = [text.split(" ") for text in texts]
    questions = series(" ".join(row[: len(row) // 3]) for row in words)
    return signatures(questions, series(" ".join(row[len(row) // 3 :]) for row in words), settings)


def dropped(texts, eligible=None, settings=DEFAULT) -> list[int]:
    """The rows that are dropped, where all texts are questions without answers."""
    found = signatures(series(texts), series([""] * len(texts)), settings)
    eligible = np.ones(len(texts), dtype=bool) if eligible is None else np.array(eligible)
    return np.flatnonzero(duplicates([found], eligible, settings)).tolist()


def jaccard(left: str, right: str, n: int = 3) -> float:
    """The similarity itself, from sets of tuples."""
    sets = [{tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (left.split(), right.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def unique_texts(generator, count, shortest=30, longest=250) -> list[str]:
    return [" ".join(generator.choices(VOCABULARY, k=generator.randint(shortest, longest))) for _ in range(count)]


def edited(generator, text: str, share: float) -> str:
    """Replaces, removes or adds a share of the words."""
    words = text.split(" ")
    for _ in range(round(share * len(words))):
        place = generator.randrange(len(words))
        words[place : place + generator.randint(0, 1)] = generator.choices(VOCABULARY, k=generator.randint(0, 1))
    return " ".join(words)


def random_signatures(rows: int, seed: int = 0, bins: int = 128) -> np.ndarray:
    """Signatures of rows that have nothing in common and many n-grams."""
    return np.random.default_rng(seed).integers(0, BORROWED, (rows, bins), dtype=np.uint16)


def pairs_of(share_of_equal_bins: float, count: int) -> np.ndarray:
    """Pairs of rows, the second after the first, whose bins agree independently with a probability."""
    left, right = random_signatures(count, 1), random_signatures(count, 2)
    equal = np.random.default_rng(3).random(left.shape) < share_of_equal_bins
    return np.stack([left, np.where(equal, left, right)], axis=1).reshape(2 * count, -1)


def drop_probability(similarity: float, settings=DEFAULT) -> float:
    """The probability that a pair agrees in all bins of a band and in enough bins altogether, bin by independent bin."""

    def agreeing(bins: int) -> np.ndarray:
        return np.array([comb(bins, m) * similarity**m * (1 - similarity) ** (bins - m) for m in range(bins + 1)])

    band = agreeing(settings.rows_per_band)
    band[-1] = 0  # no band agrees
    unmet = agreeing(settings.permutations - settings.bands * settings.rows_per_band)
    for _ in range(settings.bands):
        unmet = np.convolve(unmet, band)
    return (agreeing(settings.permutations) - unmet)[ceil(settings.threshold * settings.permutations) :].sum()


def test_short_rows_that_differ_in_an_operator_or_a_digit_stay():
    questions = ["What is 2 + 3?", "What is 2 - 3?", "What is 2 + 3!", "What is 2 + 4?", "Is x < 1?", "Is x > 1?"]
    assert dropped(questions) == [2]
    assert dropped([f"{question} Answer with a number." for question in questions]) == [2]


def test_planted_duplicates_are_found_and_nothing_else():
    generator = random.Random(0)
    originals = unique_texts(generator, 1500)
    copies = [edited(generator, text, generator.choice([0.01, 0.02, 0.05, 0.1, 0.2])) for text in originals[:1200]]
    similarity = np.array([jaccard(*pair) for pair in zip(originals, copies, strict=False)])
    order = np.random.default_rng(0).permutation(len(copies)) + len(originals)
    found = signatures_of(originals + [copies[row - len(originals)] for row in order])
    drop = duplicates([found], np.ones(len(found), dtype=bool))
    of_copies = np.empty(len(copies), dtype=bool)
    of_copies[order - len(originals)] = drop[len(originals) :]
    above, below = similarity >= 0.87, similarity <= 0.73
    assert above.sum() > 250 and below.sum() > 250
    assert of_copies[above].mean() >= 0.95  # recall
    true, false = of_copies[above].sum(), of_copies[below].sum() + drop[: len(originals)].sum()
    assert true / (true + false) >= 0.95  # precision
    assert not drop[: len(originals)].any()
    close = (similarity > 0.78) & (similarity < 0.82)
    assert 0.2 < of_copies[close].mean() < 0.8


@pytest.mark.parametrize("similarity", [0.7, 0.75, 0.8, 0.85, 0.9])
def test_pairs_are_dropped_as_often_as_the_s_curve_says(similarity):
    count = 4000
    drop = duplicates([pairs_of(similarity, count)], np.ones(2 * count, dtype=bool))
    assert not drop[::2].any()
    expected = drop_probability(similarity)
    assert drop[1::2].mean() == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5 + 1e-3)


def test_the_documented_numbers_are_computed_ones():
    lines = [line.split() for line in NearDuplicateSettings.__doc__.splitlines()]
    table = {
        line[0]: [float(number) for number in line[1:]]
        for line in lines
        if line and line[0] in ("J", "compared", "dropped")
    }
    assert (DEFAULT.bands, DEFAULT.rows_per_band) == (21, 6)
    assert table["compared"] == [round(DEFAULT.candidate_probability(j), 3) for j in table["J"]]
    assert table["dropped"] == [round(drop_probability(j), 3) for j in table["J"]]


@pytest.mark.parametrize("words", [6, 20, 60, 150, 600])
def test_the_estimate_is_unbiased_and_no_worse_than_that_of_as_many_permutations(words):
    generator = random.Random(words)
    left = unique_texts(generator, 1000, words, words)
    right = [edited(generator, text, 0.06 if words > 20 else 1 / words) for text in left]
    exact = np.array([jaccard(*pair) for pair in zip(left, right, strict=True)])
    error = estimated_jaccard(signatures_of(left), signatures_of(right)) - exact
    expected = np.sqrt((exact * (1 - exact)).mean() / DEFAULT.permutations)
    assert abs(error.mean()) < 4 * expected / len(error) ** 0.5 + 1e-4
    assert np.sqrt((error**2).mean()) < 1.1 * expected


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("permutations", [16, 64, 128, 150])
def test_pairs_at_the_threshold_meet_in_a_band(threshold, permutations):
    settings = NearDuplicateSettings(threshold=threshold, permutations=permutations)
    assert settings.bands * settings.rows_per_band <= permutations
    assert settings.candidate_probability(threshold) >= near_duplicates.WANTED_RECALL


def test_neither_signatures_nor_the_answer_depend_on_chunks(monkeypatch):
    monkeypatch.setattr(shingles, "BLOCK_ROWS", 100)
    monkeypatch.setattr(shingles, "BLOCK_BYTES", 10_000)
    generator = random.Random(1)
    texts = unique_texts(generator, 400, 1, 60)
    texts += [edited(generator, text, 0.02) for text in texts[:200]] + ["", "?", "so"]
    whole = signatures_of(texts)
    eligible = np.random.default_rng(0).random(len(texts)) < 0.9
    expected = duplicates([whole], eligible)
    assert expected.sum() > 100
    for rows in (1, 7, 250):
        chunks = [signatures_of(texts[start : start + rows]) for start in range(0, len(texts), rows)]
        np.testing.assert_array_equal(np.concatenate(chunks), whole)
        chunks.insert(3, whole[:0])
        np.testing.assert_array_equal(duplicates(chunks, eligible), expected)


def test_signatures_are_the_same_on_every_machine():
    found = signatures(
        series(["What is 2 + 2?", "Où est la gare centrale ?", ""]), series(["4.", "Là-bas, à droite.", ""])
    )
    assert hashlib.sha256(found.astype("<u2").tobytes()).hexdigest()[:16] == "3bf3a4f5427edb02"


def test_another_seed_gives_other_hashes():
    texts = unique_texts(random.Random(0), 50, 200, 600)
    first, other, same = (signatures_of(texts, NearDuplicateSettings(seed=seed)) for seed in (0, 2**64 - 1, 0))
    assert (first == same).all() and (first == other).mean() < 0.001


def test_the_first_eligible_row_of_a_cluster_stays():
    text, other = unique_texts(random.Random(2), 2, 60, 60)
    texts = [other, text, f"{text} more", other, text]
    assert dropped(texts) == [2, 3, 4]
    assert dropped(texts, [True, False, True, True, True]) == [3, 4]
    assert dropped(texts, [False, False, False, True, True]) == []


def test_rows_that_are_alike_through_others_are_one_cluster():
    words = unique_texts(random.Random(3), 1, 100, 100)[0].split()
    chain = [" ".join([*words[:80], *VOCABULARY[: 5 * n], *words[80 + 5 * n :]]) for n in range(4)]
    assert jaccard(chain[0], chain[1]) > 0.85 and jaccard(chain[0], chain[3]) < 0.72
    assert dropped(chain) == [1, 2, 3]
    assert dropped([chain[0], chain[3]]) == []


def test_a_bucket_of_many_rows_costs_no_more_than_its_rows(monkeypatch):
    rows, repeated = 50_000, 2_000
    bucket = random_signatures(rows)
    bucket[:, :6] = bucket[0, :6]  # the first band is the same in all of them
    bucket[repeated : 2 * repeated] = bucket[0]
    compared = 0

    def counted(left, right):
        nonlocal compared
        compared += len(left)
        return estimated_jaccard(left, right)

    monkeypatch.setattr(near_duplicates, "estimated_jaccard", counted)
    drop = duplicates([bucket], np.ones(rows, dtype=bool))
    assert np.flatnonzero(drop).tolist() == list(range(repeated, 2 * repeated))
    assert compared < REPRESENTATIVES * rows * 1.05


def test_similar_rows_that_meet_in_one_band_alone_are_found_behind_repeated_strangers():
    groups = random_signatures(12 * DEFAULT.bands).reshape(DEFAULT.bands, 12, -1)
    for band, group in enumerate(groups):
        bins = slice(6 * band, 6 * band + 6)
        group[11] = group[10]
        group[11, :126:6] ^= 1  # one bin of every band
        group[0, bins] = group[11, bins] = group[10, bins]
        group[1:10] = group[0]
    drop = duplicates([groups.reshape(-1, 128)], np.ones(12 * DEFAULT.bands, dtype=bool))
    assert (drop.reshape(-1, 12) == [False, *[True] * 9, False, True]).all()


def test_rows_without_words_are_not_even_compared(monkeypatch):
    found = signatures(series(["", "?"] * 500), series([""] * 1000))
    monkeypatch.setattr(near_duplicates, "estimated_jaccard", None)
    assert not duplicates([found], np.ones(1000, dtype=bool)).any()


def test_repeats_among_many_others_of_a_bucket_are_found_in_another_band():
    bucket = random_signatures(3000)
    bucket[:, :6] = bucket[0, :6]
    bucket[2500:] = bucket[1000:1500]
    assert np.flatnonzero(duplicates([bucket], np.ones(3000, dtype=bool))).tolist() == list(range(2500, 3000))


@pytest.mark.parametrize(
    "texts",
    [
        ["Ein CAFÉ, „groß“ — so!", "ein cafe\u0301 “groß” so"],
        ["ｗｉｄｅ letters ①", "wide letters 1"],
        ["Ελλάδα και ΑΘΗΝΑ", "ΕΛΛΆΔΑ ΚΑΙ αθηνα"],
        ["x² ≤ y — so?", "x2 ≤ Y. So!"],
    ],
)
def test_case_form_and_punctuation_make_no_difference(texts):
    assert dropped(texts) == [1]


def test_scripts_without_spaces_have_words():
    text = "水在一百度时沸腾而在零度时结冰这是每个学生都知道的事实我们用它来校准温度计并且检查仪器是否准确"
    assert dropped([text, text[:-1] + "度", text[::-1]]) == [1]


def test_rows_without_words_repeat_nothing_and_short_ones_only_themselves():
    assert dropped(["", "", "?!", "?!", " \n", "…"]) == []
    assert dropped(["yes", "no", "yes", "Yes!", "yes no", "no yes", "yes no"]) == [2, 3, 6]
    assert dropped(["what is 3 plus 4", "what is 3 plus 5"]) == []
    empty = signatures(series([]), series([]))
    assert empty.shape == (0, 128) and duplicates([empty], np.zeros(0, dtype=bool)).shape == (0,)
    assert duplicates([], np.zeros(0, dtype=bool)).shape == (0,)


def test_many_rows_of_one_ngram_are_told_apart():
    texts = [f"word{number}" for number in range(100_000)]
    assert dropped([*texts, "word7", "WORD8"]) == [100_000, 100_001]


def test_signatures_and_memory_stay_within_their_bytes(tmp_path):
    largest = NearDuplicateSettings(permutations=150)
    assert signatures(series(["a"]), series(["b"]), largest).nbytes == 300
    rows = 200_000
    np.save(tmp_path / "chunk.npy", random_signatures(rows))
    chunk = np.load(tmp_path / "chunk.npy", mmap_mode="r")
    eligible = np.ones(rows, dtype=bool)
    tracemalloc.start()
    duplicates([chunk[: rows // 2], chunk[rows // 2 :]], eligible)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / rows < 46


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"threshold": 0}, "threshold of near duplicates is 0: give a number above 0"),
        ({"threshold": 1.01}, "threshold of near duplicates is 1.01"),
        ({"ngram_words": 0}, "n-grams of near duplicates have 0 words"),
        ({"permutations": 256}, "with 256 permutations: give 16 to 150"),
        ({"seed": -1}, "seed of near duplicates is -1"),
    ],
)
def test_settings_without_sense_are_refused(values, sentence):
    with pytest.raises(DataError, match=sentence):
        NearDuplicateSettings(**values)
