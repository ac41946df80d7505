"""Augmented copies keep their answers right, are marked, and stay out of validation."""

import json
import operator
import re
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from data_pipeline.augmentation.augmentations import (
    AUGMENTATIONS,
    NUMBER_WORDS,
    number_words,
    request,
    reversed_fact,
    swapped_operands,
    without_courtesy,
)
from data_pipeline.checking.inspection import collect_statistics, report, rows_as_text
from data_pipeline.checking.verification import verify
from data_pipeline.errors import DataError
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from data_pipeline.shards.packing import FIRST_COPY
from data_pipeline.sources.sample import clean_rows
from data_pipeline.tokens.tokenization import decode_answer

OPERATIONS = {"+": operator.add, "-": operator.sub, "×": operator.mul}
OPERATIONS |= {"plus": operator.add, "minus": operator.sub, "times": operator.mul}


@pytest.mark.parametrize(
    ("function", "prompt", "answer", "expected"),
    [
        (number_words, "What is 7 + 5?", "12", ("What is seven plus five?", "12")),
        (number_words, "Compute 20 × 3.", "60", ("Compute twenty times three.", "60")),
        (swapped_operands, "What is 7 + 5?", "12", ("What is 5 + 7?", "12")),
        (swapped_operands, "3 times 4 is what?", "12", ("4 times 3 is what?", "12")),
        (reversed_fact, "What is the capital of Peru?", "Lima", ("What is Lima the capital of?", "Peru")),
        (reversed_fact, "What's the chemical symbol for iron?", "Fe", ("What is Fe the chemical symbol for?", "iron")),
        (without_courtesy, "Why is it so? Thanks in advance!", "so", ("Why is it so?", "so")),
        (without_courtesy, "Why?\n\nAny help would be greatly appreciated.", "so", ("Why?", "so")),
    ],
)
def test_a_copy_says_the_same_in_other_words(function, prompt, answer, expected):
    assert function(prompt, answer) == expected


@pytest.mark.parametrize(
    ("function", "prompt", "answer"),
    [
        (number_words, "What is 7 + 25?", "32"),
        (number_words, "What is 7 + 5.5?", "12.5"),
        (number_words, "What is 1.7 + 5?", "6.7"),
        (number_words, "What is 7 + 5 in base 8?", "14"),
        (swapped_operands, "What is 7 - 5?", "2"),
        (swapped_operands, "What is 2 × 7 + 5?", "19"),
        (swapped_operands, "What is 20 - 7 + 5?", "18"),
        (swapped_operands, "What is -7 + 5?", "-2"),
        (swapped_operands, "What is 5 + 5?", "10"),
        (swapped_operands, "Solve x + 3 = 8.", "5"),
        (swapped_operands, "What is 3 + 4 squared?", "19"),
        (reversed_fact, "What is the color of grass?", "green"),
        (reversed_fact, "What is the capital of France and of Spain?", "Paris, Madrid"),
        (reversed_fact, "What is the capital of Peru?", "Lima. It lies at the coast."),
        (reversed_fact, "What is the opposite of 5?", "-5"),
        (without_courtesy, "How do I say thanks in advance?", "so"),
        (without_courtesy, "Thank you.", "so"),
        (request, "two\nlines", "so"),
    ],
)
def test_a_prompt_stays_alone_if_the_answer_might_not_hold(function, prompt, answer):
    assert function(prompt, answer) is None


def test_sums_and_products_of_the_sample_have_right_answers_in_every_copy():
    checked = 0
    for row in clean_rows():
        for function in (number_words, swapped_operands):
            if copy := function(row["question"], row["answer"]):
                words = copy[0].rstrip("?.").split()
                places = [place for place, word in enumerate(words) if word in OPERATIONS]
                if len(places) != 1 or not copy[1].isdigit():
                    continue
                (at,) = places
                first, second = (
                    NUMBER_WORDS.index(word) if word in NUMBER_WORDS else int(word)
                    for word in (words[at - 1], words[at + 1])
                )
                assert OPERATIONS[words[at]](first, second) == int(copy[1]), copy
                checked += 1
    assert checked > 1000


QUESTIONS = ("What is {} + {}?", "Compute {} plus {}.")
CAPITALS = {"Peru": "Lima", "Chad": "N'Djamena", "Cuba": "Havana", "Oman": "Muscat"}


@pytest.fixture(scope="module")
def augmented(tmp_path_factory):
    """Sums, half of them held out, with all their copies; prepared by one and by two processes."""
    folder = tmp_path_factory.mktemp("augmented")
    sums = [(a, b) for a in range(20) for b in range(a)]
    rows = [{"question": question.format(a, b), "answer": str(a + b)} for question in QUESTIONS for a, b in sums]
    rows += [{"question": f"What is the capital of {land}?", "answer": city} for land, city in CAPITALS.items()]
    rows += [rows[0], {"question": "why?", "answer": ""}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(
        seq_len=64, vocab_size=400, validation_share=0.5, augment=tuple(AUGMENTATIONS), near_duplicates=1.0
    )
    for workers in (1, 2):
        prepare(str(folder / "rows.jsonl"), folder / str(workers), settings, workers=workers, progress=False)
    return folder, rows


def texts_of(folder, tokenizer) -> dict[int, tuple[str, str]]:
    """Gives the prompt and answer of every document by its input row."""
    shards, found = ShardFolder(folder), {}
    for row in range(shards.num_rows):
        tokens, spans = shards.read(row)
        for start, answer_start, end, _, input_row, _ in spans.tolist():
            prompt, answer = tokens[start + 1 : answer_start - 1].tolist(), tokens[answer_start:end].tolist()
            found[input_row] = (decode_answer(tokenizer, prompt), decode_answer(tokenizer, answer))
    return found


def test_copies_are_of_training_rows_marked_and_counted(augmented):
    folder, rows = augmented
    counts = verify(folder / "1")["counts"]
    assert (folder / "1" / "index.json").read_bytes() == (folder / "2" / "index.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder / "1" / "tokenizer")
    training, validation = texts_of(folder / "1", tokenizer), texts_of(folder / "1" / "validation", tokenizer)
    names = list(AUGMENTATIONS)
    copies = {row: pair for row, pair in training.items() if row >= FIRST_COPY}
    for number, pair in copies.items():
        augmentation, row = divmod(number, FIRST_COPY)
        assert AUGMENTATIONS[names[augmentation - 1]](rows[row]["question"], rows[row]["answer"]) == pair
        assert row in training
    assert all(row < FIRST_COPY for row in validation)
    held_out = {prompt for prompt, _ in validation.values()}
    assert not held_out & {prompt for prompt, _ in training.values()}
    assert len(set(training.values())) == len(training)
    assert {row // FIRST_COPY for row in copies} == {1, 2, 3, 4}
    assert counts["rows_in"] == len(rows)
    assert counts["rows_dropped"]["held_out_copy"] > 50
    kept = counts["documents"] + counts["validation_documents"]
    assert counts["rows_in"] + counts["rows_copied"] == kept + sum(counts["rows_dropped"].values())


def test_inspection_tells_copies(augmented):
    folder = augmented[0] / "1"
    counts = json.loads((folder / "index.json").read_text())["counts"]
    lines = [line.split() for line in report(collect_statistics(folder)).splitlines()]
    assert ["copies", "made", f"{counts['rows_copied']:,}"] in lines
    assert re.search(
        r"input row \d+, copy 3, tokens", "\n".join(rows_as_text(folder, range(ShardFolder(folder).num_rows)))
    )


def test_unknown_augmentations_and_rows_without_a_prompt_are_told(tmp_path, settings):
    with pytest.raises(DataError, match="there is no augmentation 'rhymes': give some of request, number-words"):
        replace(settings, augment=("rhymes",))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"a.jsonl has the layout text: augmentations need one prompt and one answer"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", replace(settings, augment=("request",)), progress=False)
