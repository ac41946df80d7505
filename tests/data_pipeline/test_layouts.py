"""Layouts: every kind of column becomes the documents that a chat template would render."""

import json
from dataclasses import replace
from itertools import chain

import numpy as np
import polars as pl
import pytest
from transformers import AutoTokenizer

from data_pipeline.checking.inspection import collect_statistics, report
from data_pipeline.checking.verification import verify
from data_pipeline.errors import DataError
from data_pipeline.loading.collate import IGNORE_INDEX, collate
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.layout_choice import LayoutChoice
from data_pipeline.sources.layouts import Template
from data_pipeline.sources.source import open_source


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}
# Each layout: the rows, what the user says, and the conversations that they are.
LAYOUTS = {
    "question-answer": ([{"question": "why?", "answer": 12}], {}, [[user("why?"), assistant("12")]]),
    "renamed": (
        [{"title": "why?", "body": "so", "text": "no"}],
        {"columns": (("question", "title"), ("answer", "body"))},
        [[user("why?"), assistant("so")]],
    ),
    "instruction": (
        [
            {"instruction": "add", "input": "2 and 3", "output": "5"},
            {"instruction": "say hi", "input": "", "output": "hi"},
        ],
        {},
        [[user("add\n\n2 and 3"), assistant("5")], [user("say hi"), assistant("hi")]],
    ),
    "prompt-response": ([{"prompt": "why?", "completion": "so"}], {}, [[user("why?"), assistant("so")]]),
    "messages": (
        [
            {"messages": [user("a"), assistant("b")]},
            {"messages": [SYSTEM, user("a"), assistant("the b"), user("c"), assistant("d")]},
        ],
        {},
        [[user("a"), assistant("b")], [SYSTEM, user("a"), assistant("the b"), user("c"), assistant("d")]],
    ),
    "conversations": (
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        {},
        [[user("a"), assistant("b")]],
    ),
    "template": (
        [{"from": "the sum", "facts": {"to": "of two", "of": 3}}],
        {"prompt_template": "{{say}} {from} {facts.of}", "answer_template": "{facts.to}"},
        [[user("{say} the sum 3"), assistant("of two")]],
    ),
    "translation": (
        [{"translation": {"en": "water", "de": "Wasser"}}],
        {"task": "translation:en-de"},
        [[user("Translate this text from en to de:\n\nwater"), assistant("Wasser")]],
    ),
    "summarization": (
        [{"article": "water boils at hundred degrees", "summary": "water boils"}],
        {"task": "summarization", "columns": (("document", "article"),)},
        [[user("Summarize this text:\n\nwater boils at hundred degrees"), assistant("water boils")]],
    ),
}


def write(folder, kind: str, rows: list[dict]):
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pl.DataFrame(rows).write_parquet(folder / "rows.parquet")
    return str(folder / f"rows.{kind}")


def documents(folder) -> dict[int, tuple[list[int], list[bool]]]:
    """Gives the ids of each input row, and which of them are answers."""
    shards, found = ShardFolder(folder), {}
    for row in range(shards.num_rows):
        tokens, spans = shards.read(row)
        for start, answer_start, end, _, input_row, offset in spans.tolist():
            is_answer = [place >= answer_start for place in range(start, end)]
            found.setdefault(input_row, []).append((offset, tokens[start:end].tolist(), is_answer))
    return {
        row: tuple(list(chain(*parts)) for parts in list(zip(*sorted(pieces), strict=True))[1:])
        for row, pieces in found.items()
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_have_the_ids_and_targets_of_the_chat_template(tmp_path, prepared, settings, name, kind):
    rows, said, conversations = LAYOUTS[name]
    settings = replace(settings, tokenizer=str(prepared / "tokenizer"), layout=LayoutChoice(**said))
    out = tmp_path / "out"
    prepare(write(tmp_path, kind, rows), out, settings, workers=1, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    expected = {}
    for row, conversation in enumerate(conversations):
        rendered = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True)
        expected[row] = (rendered["input_ids"], [bool(target) for target in rendered["assistant_masks"]])
    assert documents(out) == expected
    assert verify(out)["counts"]["documents"] == len(rows)
    turns = sum(message["role"] == "assistant" for conversation in conversations for message in conversation)
    assert collect_statistics(out).turns == turns


def test_plain_texts_have_no_separator_and_every_token_is_a_target(tmp_path, prepared, settings):
    texts = ["the sum of two numbers " * 20, "water boils"]
    settings = replace(settings, tokenizer=str(prepared / "tokenizer"), validation_share=0.5)
    source = write(tmp_path, "jsonl", [{"text": text} for text in [*texts, texts[0], "", *"abcdefgh"]])
    counts = prepare(source, tmp_path / "out", settings, workers=1, progress=False)["counts"]
    assert counts["rows_dropped"] | {"duplicate": 1, "empty": 1} == counts["rows_dropped"]
    assert 0 < counts["validation_documents"] < 10  # one key for all texts would hold out all or none
    verify(tmp_path / "out")
    found = documents(tmp_path / "out") | documents(tmp_path / "out" / "validation")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    for row, text in enumerate(texts):
        ids, is_answer = found[row]
        assert tokenizer.decode(ids) == f"<s>{text.strip()}</s>"
        assert is_answer == [False] + [True] * (len(ids) - 1)
    assert len(found[0][0]) > 64, "no text continues in another row"
    statistics = collect_statistics(tmp_path / "out")
    assert not statistics.prompt_tokens.any()
    assert (statistics.answer_tokens == statistics.document_tokens - 2).all()


@pytest.fixture(scope="module")
def chats(tmp_path_factory, prepared, settings):
    """Conversations of 1 to 9 turns, some longer than a row, prepared as shards."""
    folder = tmp_path_factory.mktemp("chats")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(60):
        turns = [
            message(f"{number} {turn} " + "the sum of two numbers " * int(generator.integers(1, 8)))
            for turn in range(int(generator.integers(1, 10)))
            for message in (user, assistant)
        ]
        rows.append({"messages": turns})
    settings = replace(settings, tokenizer=str(prepared / "tokenizer"), near_duplicates=1.0)
    prepare(write(folder, "jsonl", [*rows, rows[3]]), folder / "out", settings, workers=2, progress=False)
    return folder / "out", rows


def test_long_conversations_are_whole_over_rows(chats):
    out, rows = chats
    counts = verify(out)["counts"]
    assert counts["documents"] == len(rows)
    assert counts["rows_dropped"]["duplicate"] == 1
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for row, (ids, _) in documents(out).items():
        messages = [message | {"content": message["content"].strip()} for message in rows[row]["messages"]]
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    statistics = collect_statistics(out)
    assert statistics.turns == sum(len(row["messages"]) // 2 for row in rows)
    assert f"{statistics.turns} ({statistics.turns / 60:.1f} per document)" in report(statistics)


def test_batches_have_targets_only_in_answers_and_one_document_through_its_turns(chats):
    folder = ShardFolder(chats[0])
    for row in range(folder.num_rows):
        read = folder.gather(np.array([row]))
        _, labels, positions = (array[0] for array in collate(read, 1, "answer"))
        for start, answer_start, end, _, input_row, offset in read.spans.tolist():
            targets = labels[start:end] != IGNORE_INDEX
            assert targets[1:].tolist() == [place >= answer_start for place in range(start + 1, end)]
            assert not targets[0]
            before = [
                end for _, _, end, _, row_before, _ in read.spans.tolist() if row_before == input_row and end == start
            ]
            assert positions[start] == (positions[start - 1] + 1 if before and offset else 0)


@pytest.mark.parametrize(
    ("columns", "said", "sentence"),
    [
        (["instruction", "output", "text"], {}, "fits the layouts instruction and text: choose one with --layout"),
        (["title", "body"], {}, "has the columns title, body, which fit no layout: say which column holds what"),
        (["title"], {"layout": "text"}, "has no column text: it has title; say which .* --columns text=COLUMN"),
        (["a"], {"columns": (("question", "b"), ("answer", "a"))}, "has no column b: it has a"),
        (["text"], {"columns": (("source", "site"),)}, "has no column site: it has text"),
        (
            ["text"],
            {"answer_template": "{words}"},
            "has no column words: it has text, and the layout template needs words",
        ),
    ],
)
def test_columns_that_fit_no_layout_are_told(tmp_path, columns, said, sentence):
    source = write(tmp_path, "parquet", [dict.fromkeys(columns, "x")])
    with pytest.raises(DataError, match=sentence):
        open_source(source, LayoutChoice(**said))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"layout": "novel"}, "the layout is 'novel': give auto or one of question-answer"),
        ({"columns": (("reply", "a"),)}, "no layout has the column 'reply': give a name to answer, conv|no layout has"),
        (
            {"layout": "text", "columns": (("answer", "a"),)},
            "no layout has the column 'answer': give a name to source, text",
        ),
        ({"prompt_template": "{a}"}, "a prompt template but no answer template"),
        ({"layout": "text", "task": "summarization"}, "exclude each other"),
        ({"task": "poetry"}, "the task is 'poetry': give summarization or translation:FROM-TO"),
        ({"task": "translation:de"}, "the task is 'translation:de'"),
    ],
)
def test_choices_that_cannot_be_are_told(said, sentence):
    with pytest.raises(DataError, match=sentence):
        LayoutChoice(**said)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no braces", "names no column"),
        ("{a", "braces that do not match"),
        ("{}", "without the plain name"),
        ("{a!r}", "without the plain name"),
        ("{a:5}", "without the plain name"),
    ],
)
def test_templates_that_cannot_be_are_told(text, sentence):
    with pytest.raises(DataError, match=sentence):
        Template(text)


WRONG_CHATS = {
    "no list": ("hello", "is not a list of messages"),
    "empty": ([], "is not a list of messages"),
    "no answer": ([user("a")], "ends with a message of the user"),
    "a question at the end": ([user("a"), assistant("b"), user("c")], "ends with a message of the user"),
    "only a system": ([SYSTEM], "ends with a message of the system"),
    "assistant first": (
        [assistant("a"), user("b")],
        "ends with a message of the user, which has no answer",
    ),
    "a late system": ([user("a"), assistant("b"), SYSTEM, assistant("c")], "has messages of user, assistant, system"),
    "a tool": ([user("a"), {"role": "tool", "content": "b"}], "message 2, has the role 'tool'"),
    "no role": ([{"content": "b"}], "message 1, is not an object with role and content"),
    "an image": (
        [user([{"type": "image_url", "url": "x"}]), assistant("b")],
        "message 1, has a part that is not of the type text",
    ),
}


@pytest.mark.parametrize("name", WRONG_CHATS)
def test_conversations_that_cannot_be_read_are_named(tmp_path, name):
    messages, sentence = WRONG_CHATS[name]
    good = {"messages": [user("a"), assistant("b")]}
    source = open_source(write(tmp_path, "jsonl", [good, {"messages": messages}]))
    with pytest.raises(DataError, match=rf"rows.jsonl, line 2: messages,? {sentence}"):
        list(source.frames(BadRows()))


def test_a_wrong_conversation_in_parquet_is_named_by_its_row(tmp_path):
    good = {"messages": [user("a"), assistant("b")]}
    source = open_source(write(tmp_path, "parquet", [good, good, {"messages": [user("a"), user("b")]}]))
    with pytest.raises(DataError, match=r"rows.parquet, row 3: messages ends with a message of the user"):
        list(source.frames(BadRows()))


def test_parts_of_text_are_joined_and_values_are_text(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    rows = [{"messages": [user(parts), assistant(True)], "source": 7}]
    (frame,) = open_source(write(tmp_path, "jsonl", rows)).frames(BadRows())
    assert frame.rows() == [(["a b"], ["true"], "7")]


def test_a_missing_optional_column_is_empty_in_some_rows_only(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    (frame,) = open_source(write(tmp_path, "jsonl", rows)).frames(BadRows())
    assert frame["prompt"].to_list() == ["a", "c\n\nd"]
