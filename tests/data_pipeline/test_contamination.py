import gzip
import json
import random
import re
import unicodedata
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.deduplication import shingles
from data_pipeline.deduplication.contamination import EvaluationSet
from data_pipeline.deduplication.shingles import LONGEST_WORD, words_of
from data_pipeline.errors import DataError

PASSAGE = (
    "The quick auditor of the northern harbour counted seventeen grey barrels. She wrote their weights into a ledger, "
    "and nobody asked her why the eleventh one rang hollow when she knocked."
)
WORDS = re.findall(r"\w+", PASSAGE)
VOCABULARY = [f"word{number}" for number in range(3000)]


def series(texts) -> pl.Series:
    return pl.Series("text", list(texts), dtype=pl.String)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluation_set(folder, *texts, **settings) -> EvaluationSet:
    return EvaluationSet([write_jsonl(folder / "evaluation.jsonl", [{"text": text} for text in texts])], **settings)


def found(evaluation: EvaluationSet, *rows) -> list[bool]:
    rows = [row if isinstance(row, tuple) else (row, "An answer.") for row in rows]
    return evaluation.contaminated(series(row[0] for row in rows), series(row[1] for row in rows)).tolist()


def test_a_passage_is_found_wherever_it_stands(tmp_path):
    evaluation = evaluation_set(tmp_path, f"Before it all. {PASSAGE} After that.")
    for start in (0, 5, len(WORDS) - 13):
        passage = " ".join(WORDS[start : start + 13])
        rows = [
            passage,
            f"{passage} and so on",
            f"so what of {passage}",
            f"why {passage}, then?",
            ("Why?", passage),
            ("Why?", f"Because {passage}"),
            (" ".join(passage.split()[:6]), " ".join(passage.split()[6:])),  # across question and answer
        ]
        assert all(found(evaluation, *rows))
    # Words 8 to 20 are of two sentences.
    assert found(evaluation, "grey barrels she wrote their weights into a ledger and nobody asked her") == [True]


def test_case_punctuation_form_and_markup_make_no_difference(tmp_path):
    passage = " ".join(PASSAGE.split()[:13])  # every word of it counts
    evaluation = evaluation_set(tmp_path, passage.replace("grey", "gr&eacute;y"))
    shouted = passage.upper().replace("GREY", "GRE\u0301Y").replace(".", " —").replace(" ", "\n")
    rows = [shouted, f"“{passage.replace('grey', 'gréy')}”", passage]
    assert found(evaluation, *rows) == [True, True, False]


def test_twelve_words_in_common_are_not_enough(tmp_path):
    evaluation = evaluation_set(tmp_path, PASSAGE)
    rows = [" ".join(WORDS[start : start + 12]) for start in range(len(WORDS) - 11)]
    assert not any(found(evaluation, *rows))
    assert not any(found(evaluation, *[" ".join([*WORDS[:12], "thirteen", *WORDS[13:25]]), " ".join(reversed(WORDS))]))
    assert found(evaluation_set(tmp_path, PASSAGE, ngram_words=12), *rows) == [True] * len(rows)


def test_no_ngram_runs_from_one_row_or_evaluation_text_into_the_next(tmp_path):
    evaluation = evaluation_set(tmp_path, " ".join(WORDS[:16]), " ".join(WORDS[16:]))
    assert found(evaluation, (" ".join(WORDS[:8]), ""), (" ".join(WORDS[8:12]), "")) == [False, False]
    assert found(evaluation, " ".join(WORDS[8:24])) == [False]


def test_a_short_evaluation_text_counts_only_as_a_whole(tmp_path):
    evaluation = evaluation_set(tmp_path, "What is the capital of Peru?", "yes", "…")
    rows = [
        "what is the CAPITAL of Peru",
        ("What is the capital", "of Peru?"),  # question and answer together
        "What is the capital of Peru today?",
        "And what is the capital of Peru?",
        ("Guess.", "What is the capital of Peru?"),
        ("Is it so?", "Yes."),
        ("", ""),
        ("?", "!"),
    ]
    assert found(evaluation, *rows) == [True, True, False, False, False, False, False, False]


def test_a_question_counts_without_its_answer_and_with_it(tmp_path):
    row = {"question": "Name the harbour's auditor", "answer": "Nobody knows", "subject": " ".join(WORDS[:14])}
    evaluation = EvaluationSet([write_jsonl(tmp_path / "e.jsonl", [row])])
    rows = [
        ("Name the harbour's auditor!", "Another."),
        ("Name the harbour's auditor: nobody knows", ""),
        ("Who?", "Nobody knows"),
        ("Who?", row["subject"]),  # another column is left alone where there is a question
    ]
    assert found(evaluation, *rows) == [True, True, False, False]


def test_every_kind_of_file_gives_the_same_set(tmp_path):
    rows = [{"question": PASSAGE, "answer": f"Answer {n} of many", "index": n} for n in range(5)]
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", rows)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in reversed(rows)))
    sets = [EvaluationSet([tmp_path / name]) for name in ("a.parquet", "b.jsonl", "c.jsonl.gz")]
    assert len({evaluation.fingerprint for evaluation in sets}) == 1
    assert all(evaluation.texts == 10 and found(evaluation, PASSAGE, "no") == [True, False] for evaluation in sets)


def test_columns_without_a_question_are_text_or_all_strings(tmp_path):
    problem, solution = " ".join(WORDS[:13]), " ".join(WORDS[13:26])
    rows = [{"problem": problem, "solution": solution, "level": 3, "tags": ["a", "b"], "none": None}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pl.DataFrame(rows).write_parquet(tmp_path / "b.parquet")
    pl.DataFrame(rows).with_columns(pl.col("problem").cast(pl.Categorical)).write_parquet(tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.parquet", "d.parquet"):
        assert found(EvaluationSet([tmp_path / name]), problem, solution, "neither") == [True, True, False]
    write_jsonl(tmp_path / "c.jsonl", [{"text": problem, "id": solution}])
    assert found(EvaluationSet([str(tmp_path / "c.jsonl")]), problem, solution) == [True, False]


def test_plain_text_is_read_across_lines_and_line_by_line(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join([*WORDS[:20], "What now, captain?"]), encoding="utf-8")
    evaluation = EvaluationSet([tmp_path / "a.txt"])
    assert found(evaluation, " ".join(WORDS[3:16]), "what now captain", "what now") == [True, True, False]


def test_the_fingerprint_tells_what_would_be_found(tmp_path):
    other = " ".join(reversed(WORDS))
    first = evaluation_set(tmp_path, PASSAGE, other, "Short one").fingerprint
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", [{"text": "short, one"}, {"text": PASSAGE.upper()}])
    write_jsonl(tmp_path / "elsewhere" / "a.jsonl", [{"text": other}, {"text": other}])
    assert EvaluationSet((tmp_path / "elsewhere").iterdir()).fingerprint == first
    assert evaluation_set(tmp_path, PASSAGE, other).fingerprint != first
    assert evaluation_set(tmp_path, PASSAGE, other, "Short one", ngram_words=8).fingerprint != first


@pytest.mark.parametrize(("rows", "size"), [(64, 2**20), (4096, 3000), (4096, 2**20)])
def test_planted_passages_are_found_and_nothing_else(tmp_path, monkeypatch, rows, size):
    monkeypatch.setattr(shingles, "BLOCK_ROWS", rows)
    monkeypatch.setattr(shingles, "BLOCK_BYTES", size)
    generator = random.Random(0)
    texts = [" ".join(generator.choices(VOCABULARY, k=generator.randint(4, 80))) for _ in range(300)]
    rows, planted = [], []
    for _ in range(1000):
        question, answer = (generator.choices(VOCABULARY, k=generator.randint(0, 60)) for _ in range(2))
        words = generator.choice(texts).split()
        length = generator.choice([0, 5, 12, 13, 14, 40])
        start = generator.randint(0, max(0, len(words) - length))
        into = generator.choice([question, answer])
        place = generator.randint(0, len(into))
        into[place:place] = words[start : start + length]
        rows.append((" ".join(question), " ".join(answer)))
        whole = rows[-1][0] in texts or " ".join(question + answer) in texts
        planted.append(whole or len(words[start : start + length]) >= 13)
    assert 200 < sum(planted) < 800
    assert found(evaluation_set(tmp_path, *texts), *rows) == planted


def test_an_empty_chunk_has_no_contaminated_rows(tmp_path):
    assert evaluation_set(tmp_path, PASSAGE).contaminated(series([]), series([])).shape == (0,)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.jsonl", None, "there is no evaluation file .*missing.jsonl: check the path"),
        ("a.csv", b"text\nhello\n", "the evaluation file .*a.csv is none of .jsonl"),
        ("a.jsonl", b"", "the evaluation file .*a.jsonl holds no text"),
        ("a.jsonl", b'{"text": "?!"}\n{"label": 3}\n', "the evaluation file .*a.jsonl holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'["a"]\n', "a.jsonl, line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1 has half a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz cannot be read after line"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "a.jsonl.gz cannot be read after line 0"),
        ("a.parquet", b"PAR1 and more", "a.parquet is not a readable parquet file"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_serve_is_named(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        EvaluationSet([tmp_path / name])


def test_settings_without_sense_are_refused(tmp_path):
    with pytest.raises(DataError, match="no evaluation file is given"):
        EvaluationSet([])
    with pytest.raises(DataError, match="n-grams of 0 words"):
        evaluation_set(tmp_path, PASSAGE, ngram_words=0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 + 3?", "What is 2 - 3?"),
        ("Compute x+y.", "Compute x-y."),
        ("Is π + σ real?", "Is π - σ real?"),
        ("Solve x ≤ 4", "Solve x ≥ 4"),
        ("Solve x <= 4", "Solve x >= 4"),
        ("What is -3 squared?", "What is 3 squared?"),
        ("What is 6/2?", "What is 6*2?"),
        ("What is x^2?", "What is x 2?"),
        (r"Add \alpha + \beta", r"Add \alpha - \beta"),
        ("f(x)-g(x)", "f(x)+g(x)"),
        ("sin x - cos y", "sin x + cos y"),
        ("What is C++?", "What is C?"),
        ("Is 12 prime?", "Is 1 2 prime?"),
        ("Is 12 prime?", "Is 13 prime?"),
    ],
)
def test_questions_that_differ_in_an_operator_or_a_digit_are_not_the_same(tmp_path, one, other):
    assert found(evaluation_set(tmp_path, one), one, one.upper(), other) == [True, True, False]
    assert found(evaluation_set(tmp_path, other), one, other) == [False, True]
    numbers = " one two three four five six seven eight nine ten"
    assert found(evaluation_set(tmp_path, one + numbers), f"So: {one}{numbers}", f"So: {other}{numbers}") == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a well-known x-ray, and/or COVID-19", "a well known x ray and or covid 19"),
        ("* **3 apples**\n- 4 pears\n> so he said", "3 apples 4 pears so he said"),
        ("2 − 3 × 4 ÷ 5", "2-3*4/5"),
        ("½ of it — all - or nothing -", "1/2 of it all or nothing"),
        ("it is 4.", "It is 4!"),
    ],
)
def test_punctuation_is_no_operator(tmp_path, one, other):
    assert found(evaluation_set(tmp_path, one), one, other) == [True, True]


def test_operators_change_no_word_of_another_text():
    texts = ["x = 3 +", "3 is", "2 <", "+ 1 +", "", "= 1", "π ^", "+"]
    values, offsets = words_of(series(texts))
    alone = [words_of(series([text])).values.tolist() for text in texts]
    assert [values[start:end].tolist() for start, end in pairwise(offsets)] == alone


def words_in(text: str) -> list[bytes]:
    """What words are, said in Python, without operators that are ASCII characters."""
    letters = [c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFKC", text).lower()]
    letters = [
        " ≤ " if c == "≤" else letter for c, letter in zip(unicodedata.normalize("NFKC", text), letters, strict=True)
    ]
    words = [word.encode() for word in "".join(letters).split()]
    return [word[start : start + LONGEST_WORD] for word in words for start in range(0, len(word), LONGEST_WORD)]


LONG_WORDS = [*("a" * length + end for length in (7, 8, 9, 30, 62, 63, 64, 150) for end in "abé"), "listen silent"]
LETTERS = st.text(st.sampled_from("abAB19é Éßñя²ﬁ _.,;\n\t\0'’—≤́"), max_size=30)


@settings(deadline=None)
@given(st.lists(LETTERS | st.sampled_from(LONG_WORDS)))
def test_words_are_the_same_where_their_letters_are(texts):
    values, offsets = words_of(series(texts))
    expected = [words_in(text) for text in texts]
    assert np.diff(offsets).tolist() == [len(words) for words in expected]
    words = [word for text in expected for word in text]
    assert len(set(zip(words, values.tolist(), strict=True))) == len(set(words)) == len(set(values.tolist()))
