import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards.packing import Documents, best_fit, pack

SEQ_LEN, PAD = 16, 1


def documents_of(lengths):
    """Documents whose tokens are all different, so that a token out of place shows."""
    lengths = np.array(lengths)
    numbers = np.arange(len(lengths))
    return Documents(np.arange(lengths.sum()) + 10, lengths, lengths // 2, numbers % 3, 2 * numbers)


def rows_of(packed):
    """Gives each row's tokens and spans."""
    return list(zip(packed.tokens, np.split(packed.spans, np.cumsum(packed.pieces)[:-1]), strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_pieces_reassemble_to_every_document_exactly_once(lengths):
    documents = documents_of(lengths)
    found = {input_row: [] for input_row in documents.input_rows.tolist()}
    packed = pack(documents, SEQ_LEN, PAD, np.uint16)
    assert packed.tokens.shape == (len(packed.pieces), SEQ_LEN)
    assert packed.tokens.dtype == np.uint16
    assert packed.spans.dtype == np.int64
    for tokens, spans in rows_of(packed):
        assert spans[0, 0] == 0
        assert np.array_equal(spans[1:, 0], spans[:-1, 2])
        assert np.all(tokens[spans[-1, 2] :] == PAD)
        for start, answer_start, end, source, input_row, offset in spans.tolist():
            found[input_row].append((offset, tokens[start:end].tolist(), answer_start - start, source))
    begin = 10
    for length, answer_at, source, input_row in zip(
        lengths, documents.answer_starts, documents.sources, documents.input_rows, strict=True
    ):
        ids = list(range(begin, begin + length))
        pieces = sorted(found[int(input_row)])
        assert [token for _, piece, _, _ in pieces for token in piece] == ids
        for offset, piece, answer_start, piece_source in pieces:
            assert piece_source == source
            assert piece == ids[offset : offset + len(piece)]
            assert piece[answer_start:] == [token for token in piece if token >= begin + answer_at]
        begin += length


def test_the_answer_of_a_split_document_is_clipped_to_each_piece():
    packed = pack(documents_of([40]), SEQ_LEN, PAD, np.uint16)
    assert packed.spans.tolist() == [[0, 16, 16, 0, 0, 0], [0, 4, 16, 0, 0, 16], [0, 0, 8, 0, 0, 32]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=5), min_size=1, max_size=20))
def test_turns_stay_in_their_document_and_each_has_its_own_span(turns):
    lengths = np.array([length for document in turns for length in document])
    numbers = np.arange(len(turns))
    counts = np.array([len(document) for document in turns])
    documents = Documents(np.arange(lengths.sum()) + 10, lengths, lengths // 2, numbers % 3, numbers, counts)
    packed = pack(documents, SEQ_LEN, PAD, np.uint16)
    as_one_turn = Documents(documents.ids, documents.document_lengths, counts, numbers % 3, numbers)
    assert np.array_equal(packed.tokens, pack(as_one_turn, SEQ_LEN, PAD, np.uint16).tokens)

    answer_tokens = {
        10 + token
        for end, size in zip(np.cumsum(lengths), lengths, strict=True)
        for token in range(end - size + size // 2, end)
    }
    pieces = []
    for tokens, spans in rows_of(packed):
        assert np.array_equal(spans[1:, 0], spans[:-1, 2])
        for start, answer_start, end, source, input_row, offset in spans.tolist():
            pieces.append((input_row, offset, end - start))
            assert source == input_row % 3
            assert [token in answer_tokens for token in tokens[start:end].tolist()] == [
                place >= answer_start for place in range(start, end)
            ]
    for row, document in enumerate(turns):
        its_pieces = sorted((offset, length) for input_row, offset, length in pieces if input_row == row)
        ends = set(np.cumsum([length for _, length in its_pieces]).tolist())
        assert [offset for offset, _ in its_pieces] == [0, *sorted(ends)[:-1]]
        assert ends >= set(np.cumsum(document).tolist())


def test_rows_and_their_documents_come_in_the_order_of_the_input():
    packed = pack(documents_of([9, 3, 12, 7, 4, 10]), SEQ_LEN, PAD, np.uint16)
    assert [spans[:, 4].tolist() for _, spans in rows_of(packed)] == [[0, 6], [2, 10], [4, 8]]


def test_an_item_goes_into_the_fullest_bin_that_holds_it():
    assert best_fit([6, 8, 4, 2], capacity=10) == [[1, 3], [0, 2]]
    assert best_fit([10, 10], capacity=10) == [[0], [1]]


def test_best_fit_fills_nearly_every_position():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 1.2, 20000), 4, 1024).astype(int).tolist()
    assert sum(lengths) / (len(best_fit(lengths, 1024)) * 1024) > 0.99
