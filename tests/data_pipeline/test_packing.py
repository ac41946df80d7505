import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import Document, best_fit, pack

SEQ_LEN, PAD = 16, 1


def documents_of(lengths):
    """Documents whose tokens are all different, so that a token out of place shows."""
    ends = np.cumsum(lengths) + 10
    return [
        Document(np.arange(end - length, end), answer_start=length // 2, source=number % 3, input_row=2 * number)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True))
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_pieces_reassemble_to_every_document_exactly_once(lengths):
    documents = documents_of(lengths)
    found = {document.input_row: [] for document in documents}
    for row in pack(documents, SEQ_LEN, PAD, np.uint16):
        assert row.tokens.shape == (SEQ_LEN,)
        assert row.tokens.dtype == np.uint16
        assert row.spans[0, 0] == 0
        assert np.array_equal(row.spans[1:, 0], row.spans[:-1, 2])
        assert np.all(row.tokens[row.spans[-1, 2] :] == PAD)
        for start, answer_start, end, source, input_row, offset in row.spans.tolist():
            found[input_row].append((offset, row.tokens[start:end].tolist(), answer_start - start, source))
    for document in documents:
        pieces = sorted(found[document.input_row])
        assert [token for _, ids, _, _ in pieces for token in ids] == document.ids.tolist()
        for offset, ids, answer_start, source in pieces:
            assert source == document.source
            assert ids == document.ids[offset : offset + len(ids)].tolist()
            answer = [token for token in ids if token >= document.ids[document.answer_start]]
            assert ids[answer_start:] == answer


def test_the_answer_of_a_split_document_is_clipped_to_each_piece():
    rows = pack([Document(np.arange(40), answer_start=20, source=0, input_row=0)], SEQ_LEN, PAD, np.uint16)
    assert [row.spans[0].tolist() for row in rows] == [[0, 16, 16, 0, 0, 0], [0, 4, 16, 0, 0, 16], [0, 0, 8, 0, 0, 32]]


def test_rows_and_their_documents_come_in_the_order_of_the_input():
    rows = pack(documents_of([9, 3, 12, 7, 4, 10]), SEQ_LEN, PAD, np.uint16)
    assert [row.spans[:, 4].tolist() for row in rows] == [[0, 6], [2, 10], [4, 8]]


def test_an_item_goes_into_the_fullest_bin_that_holds_it():
    assert best_fit([6, 8, 4, 2], capacity=10) == [[1, 3], [0, 2]]
    assert best_fit([10, 10], capacity=10) == [[0], [1]]


def test_best_fit_fills_nearly_every_position():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 1.2, 20000), 4, 1024).astype(int).tolist()
    assert sum(lengths) / (len(best_fit(lengths, 1024)) * 1024) > 0.99
