"""Verification over several shards: every document is whole, stands once and is counted, in training and validation."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.checking.verification import bytes_to_verify, verify
from tests.data_pipeline.shard_folders import flip_bit
from tests.data_pipeline.written_shards import (
    EOS,
    SEP,
    Row,
    document,
    message,
    row,
    sound_shards,
    write_folder,
    write_index,
)


def rows_of(shards: list[list[Row]], input_row: int) -> list[np.ndarray]:
    """Gives views of the spans of a document."""
    return [span for shard in shards for _, spans in shard for span in spans if span[4] == input_row]


def begin_an_answer_again(shards: list[list[Row]]) -> None:
    tokens, spans = shards[1][0]
    tokens[1] = SEP  # so that the piece alone is sound
    spans[0, 1] = 2


def go_on_after_the_end(shards: list[list[Row]]) -> None:
    shards[2] += [row(piece) for piece in document(8, 5, 40)]
    tokens, _ = shards[2][-2]
    tokens[-1] = EOS


@pytest.mark.parametrize(
    ("edit", "shards_named", "what"),
    [
        (lambda shards: rows_of(shards, 1)[1].__setitem__(5, 15), (0, 1), "input row 1 has pieces that do not"),
        (lambda shards: rows_of(shards, 1)[1].__setitem__(3, 0), (0, 1), "input row 1 has pieces that do not"),
        (begin_an_answer_again, (0, 1), "input row 1 has pieces that do not"),
        (go_on_after_the_end, (2,), "input row 8 has pieces that do not"),
        (lambda shards: shards[0].pop(), (1,), "input row 1 has pieces that do not"),
        (lambda shards: rows_of(shards, 7)[0].__setitem__(4, 0), (0, 2), "input row 0 occurs more than once"),
        (lambda shards: shards[1].append(shards[2][0]), (1, 2), "input row 5 occurs more than once"),
    ],
    ids=[
        "a gap",
        "another source",
        "an answer that stops",
        "an early end",
        "a beginning lost",
        "one number twice",
        "a row twice",
    ],
)
def test_documents_must_be_whole_and_stand_once(tmp_path, edit, shards_named, what):
    shards = sound_shards()
    edit(shards)
    said = message(write_folder(tmp_path / "shards", shards))
    assert what in said
    for number in range(3):
        assert (f"shard-00000-00{number}.tar" in said) == (number in shards_named)


def conversation(input_row: int, *turns: tuple[int, int]) -> list:
    """Lays out turns of one document that together fit into a row."""
    pieces, offset = [], 0
    for question, answer in turns:
        ((ids, answer_start, (source, row, _)),) = document(input_row, question, answer)
        pieces.append((ids, answer_start, [source, row, offset]))
        offset += len(ids)
    return pieces


def test_turns_make_up_a_document_in_one_row_and_over_two(tmp_path):
    shards = sound_shards()
    first, second = conversation(20, (2, 2), (1, 1))
    full, after = conversation(21, (6, 7), (1, 1))  # the first turn fills a row
    shards[0] += [row(first, second), row(full)]
    shards[2] += [row(after)]
    verify(write_folder(tmp_path / "shards", shards))


@pytest.mark.parametrize("fault", ["does not begin", "begins early", "a gap", "is lost"])
def test_turns_that_do_not_follow_each_other_are_told(tmp_path, fault):
    shards = sound_shards()
    (ids, answer_start, origin), after = conversation(20, (2, 2), (1, 1))
    if fault == "does not begin":
        after = ([10, *after[0][1:]], *after[1:])
    elif fault == "begins early":
        ids = [*ids[:-1], 10]
    elif fault == "a gap":
        after[2][2] += 1
    shards[0] += [row((ids, answer_start, origin), after)]
    if fault == "is lost":
        shards[0][-1] = row((ids[:-1], answer_start, origin))
    assert "input row 20 has pieces that do not form one whole" in message(write_folder(tmp_path / "shards", shards))


def test_a_lost_end_is_told(tmp_path):
    shards = sound_shards()
    shards[1][0] = row(*document(2, 1, 2))
    said = message(write_folder(tmp_path / "shards", shards))
    assert "shard-00000-000.tar: input row 1 has pieces that do not form one whole" in said


@pytest.mark.parametrize("wrong", [{"documents": 9}, {"tokens": 1}, {"packed_rows": 6}, {"rows_in": 41}])
def test_counts_must_be_right(tmp_path, wrong):
    said = message(write_folder(tmp_path / "shards", sound_shards(), **wrong))
    assert "rows were read" in said if "rows_in" in wrong else f"{next(iter(wrong))}, but its index says" in said


def with_validation(path: Path, validation_row: int = 20, **counts: int) -> Path:
    write_folder(path, sound_shards(), **({"validation_documents": 2} | counts))
    held_out = [[row(*document(validation_row, 2, 2), *document(21, 2, 1))]]
    write_folder(path / "validation", held_out)
    return path


def test_a_validation_folder_is_verified_too(tmp_path):
    folder = with_validation(tmp_path / "shards")
    seen = []
    assert verify(folder, seen.append)["counts"]["validation_documents"] == 2
    assert sum(seen) == bytes_to_verify(folder) > bytes_to_verify(folder / "validation") > 0
    index = json.loads((folder / "validation" / "index.json").read_text())
    for key in ("rows_in", "rows_dropped"):
        del index["counts"][key]
    index["tokenizer"]["files"] = []
    verify(write_index(folder / "validation", index).parent)
    assert verify(folder / "validation")["counts"] == index["counts"]
    flip_bit(folder / "validation" / "shard-00000-000.tar")
    assert f"{folder}/validation/shard-00000-000.tar has changed" in message(folder)


def test_training_and_validation_share_no_input_row(tmp_path):
    said = message(with_validation(tmp_path / "whole", validation_row=6))
    assert "whole/shard-00000-002.tar and" in said
    assert "validation/shard-00000-000.tar: input row 6 occurs more than once" in said
    path = tmp_path / "parts"
    shards = sound_shards()
    write_folder(path, [shards[0], shards[2]], validation_documents=3)
    write_folder(path / "validation", [shards[1]])
    assert "validation/shard-00000-000.tar: input row 1 has pieces that do not form one whole document" in message(path)


def test_validation_documents_must_be_counted_right(tmp_path):
    said = message(with_validation(tmp_path / "shards", validation_documents=3))
    assert "says 3 validation documents, but there are 2" in said


def test_a_validation_folder_with_another_tokenizer_is_told(tmp_path):
    folder = with_validation(tmp_path / "shards")
    index = json.loads((folder / "validation" / "index.json").read_text())
    index["tokenizer"]["fingerprint"] = "1" * 64
    write_index(folder / "validation", index)
    assert "has a different tokenizer than" in message(folder)
