"""Questions that are shown in training or evaluated are whole documents of the rows."""

import json

import pytest
from transformers import AutoTokenizer

from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from data_pipeline.sources.sample import clean_rows
from data_pipeline.tokens.tokenization import encode_prompt
from launcher.held_out_questions import questions_in, spread
from launcher.tools.evaluation.held_out import open_held_out
from launcher.training.monitoring.answers import choose_questions


@pytest.fixture(scope="module")
def rows(sample_data, tmp_path_factory):
    """The sample in rows of 16 tokens, so that many documents are cut."""
    folder = tmp_path_factory.mktemp("data") / "short"
    prepare("sample", folder, Settings(tokenizer=str(sample_data / "tokenizer"), seq_len=16), progress=False)
    return ShardFolder(folder)


@pytest.fixture(scope="module")
def tokenizer(rows):
    return AutoTokenizer.from_pretrained(rows.tokenizer_path)


def test_pieces_of_documents_are_no_questions(rows, tokenizer):
    """None of them may be asked or expected."""
    pairs = {(row["question"], row["answer"]) for row in clean_rows()}
    pieces = whole = 0
    for number in range(min(rows.num_rows, 200)):
        _, spans = rows.read(number)
        found = list(questions_in(rows, number, tokenizer))
        for question in found:
            assert (question.question, question.expected) in pairs
            assert question.prompt == encode_prompt(tokenizer, question.question)
        pieces, whole = pieces + len(spans), whole + len(found)
    assert 0 < whole < pieces


def test_training_shows_questions_that_the_evaluation_asks(rows, tokenizer):
    asked = open_held_out(str(rows.path), None, tokenizer, 16, limit=None).questions
    shown = choose_questions(rows, tokenizer, 60)
    assert len(shown) > 10 and all(question in asked for question in shown)
    assert choose_questions(rows, tokenizer, 0) == []


def test_a_conversation_asks_its_first_turn_and_a_plain_text_nothing(rows, tokenizer, tmp_path):
    turns = [("Hi?", "Yes."), ("Why?", "So.")]
    roles = ("user", "assistant")
    chat = {
        "messages": [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    }
    for name, row, asked in (("chat", chat, [("Hi?", "Yes.")]), ("text", {"text": "Hi? Yes."}, [])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        settings = Settings(tokenizer=str(rows.tokenizer_path), seq_len=64)
        prepare(str(tmp_path / f"{name}.jsonl"), tmp_path / name, settings, progress=False)
        found = questions_in(ShardFolder(tmp_path / name), 0, tokenizer)
        assert [(question.question, question.expected) for question in found] == asked


def test_numbers_are_spread_evenly_and_include_both_ends():
    assert spread(10, 4).tolist() == [0, 3, 6, 9]
    assert spread(3, 7).tolist() == spread(3, None).tolist() == [0, 1, 2]
    assert spread(5, 0).tolist() == []
