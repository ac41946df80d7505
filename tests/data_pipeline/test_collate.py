import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.loading.collate import IGNORE_INDEX, BatchMemory, collate, source_of_tokens
from data_pipeline.shards.packing import PackedRows

PAD = 1


def rows_of(*spans, seq_len):
    """Rows of the given spans (start, answer start, end, source), the tokens numbered through the batch from 10."""
    stacked = np.array([(*span, 0, 0) for row in spans for span in row], dtype=np.int64).reshape(-1, 6)
    tokens = np.arange(10, 10 + len(spans) * seq_len, dtype=np.uint16).reshape(len(spans), seq_len)
    return PackedRows(tokens, stacked, np.array([len(row) for row in spans]))


# Two pieces, the second without its answer, then three tokens of padding; a full row; a row that is all padding; a
# continuation that is all answer, with a piece of one token.
ROWS = ([(0, 3, 6, 0), (6, 9, 9, 1)], [(0, 5, 12, 2)], [], [(0, 0, 4, 1), (4, 5, 5, 0)])
POSITIONS = [
    [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2],
    [*range(12)],
    [*range(12)],
    [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6],
]
TARGETS = {
    "all": ["011111011000", "011111111111", "000000000000", "011100000000"],
    "answer": ["000111000000", "000001111111", "000000000000", "011100000000"],
}


def test_positions_restart_at_every_piece_and_at_padding():
    _, _, positions = collate(rows_of(*ROWS, seq_len=12), PAD, "all")
    assert positions.tolist() == POSITIONS


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_targets_are_neither_first_tokens_nor_padding_nor_what_was_not_asked_for(loss_on):
    rows = rows_of(*ROWS, seq_len=12)
    input_ids, labels, _ = collate(rows, PAD, loss_on)
    assert [[target == "1" for target in row] for row in TARGETS[loss_on]] == (labels != IGNORE_INDEX).tolist()
    assert np.array_equal(labels[labels != IGNORE_INDEX], input_ids[labels != IGNORE_INDEX])
    assert np.array_equal(input_ids[[0, 1, 3]], rows.tokens[[0, 1, 3]])
    assert (input_ids[2] == PAD).all()


def test_positions_count_on_through_the_turns_of_a_document_and_each_turn_has_its_targets():
    # A document of two turns, a document whose second turn is here without its first, and the rest of an earlier document,
    # which has the same input row but does not follow it.
    spans = [(0, 2, 4, 0, 7, 0), (4, 5, 7, 0, 7, 4), (7, 8, 9, 0, 8, 20), (9, 9, 11, 0, 8, 30)]
    tokens = np.arange(10, 22, dtype=np.uint16).reshape(1, 12)
    rows = PackedRows(tokens, np.array(spans, dtype=np.int64), np.array([4]))
    _, labels, positions = collate(rows, PAD, "answer")
    assert positions.tolist() == [[*range(7), 0, 1, 0, 1, 0]]
    assert "".join("01"[int(target)] for target in labels[0] != IGNORE_INDEX) == "001101101010"
    _, labels, _ = collate(rows, PAD, "all")
    assert "".join("01"[int(target)] for target in labels[0] != IGNORE_INDEX) == "011101101010"


def test_every_token_has_its_source():
    sources = source_of_tokens(rows_of(*ROWS, seq_len=12))
    assert sources.tolist() == [[0] * 6 + [1] * 3 + [-1] * 3, [2] * 12, [-1] * 12, [1] * 4 + [0] + [-1] * 7]


def test_a_batch_is_its_rows_one_by_one():
    generator = np.random.default_rng(0)
    spans = []
    for _ in range(40):
        ends = np.unique(generator.integers(1, 33, 4))
        starts = np.concatenate([[0], ends[:-1]])
        spans.append([(s, generator.integers(s, e + 1), e, 0) for s, e in zip(starts, ends, strict=True)])
    rows = rows_of(*spans, seq_len=32)
    whole = collate(rows, PAD, "answer")
    for number, row in enumerate(spans):
        alone = rows_of(row, seq_len=32)
        alone.tokens[:] = rows.tokens[number]
        assert np.array_equal(whole[:, number : number + 1], collate(alone, PAD, "answer"))


@pytest.mark.parametrize(
    "broken",
    [[(1, 2, 3, 0)], [(0, 2, 3, 0), (4, 5, 6, 0)], [(0, 2, 13, 0)], [(0, 5, 3, 0)], [(0, 2, 3, 0), (3, 2, 6, 0)]],
)
def test_spans_that_break_the_format_are_refused(broken):
    with pytest.raises(DataError, match="spans break the format"):
        collate(rows_of([(0, 3, 12, 0)], broken, seq_len=12), PAD, "all")


def test_memory_is_used_again_only_when_nobody_holds_it():
    memory = BatchMemory(kept=2)
    first = memory.take((3, 4, 5))
    address = first.ctypes.data
    held = torch.from_numpy(first[1]).unbind()[2]  # a tensor of a row keeps the whole array
    del first
    assert memory.take((3, 4, 5)).ctypes.data != address
    del held
    assert address in [memory.take((3, 4, 5)).ctypes.data for _ in range(2)]
    assert memory.take((3, 4, 6)).shape == (3, 4, 6)
