import numpy as np
import pytest
import torch

from data_pipeline.clean import clean_text
from data_pipeline.errors import DataError
from data_pipeline.loader import SHARDS_PER_BLOCK, BatchStream, RowOrder, position_ids, supervised
from data_pipeline.reader import ShardFolder
from data_pipeline.tokenization import decode_answer, load_tokenizer

# Two pieces, the second without its answer, then three tokens of padding.
SPANS = np.array([[0, 3, 6, 0, 0, 0], [6, 9, 9, 0, 1, 0]])


@pytest.fixture(scope="module")
def folder(prepared):
    return ShardFolder(prepared)


def stream(folder, rank=0, world_size=1, micro_batch_rows=1, **options):
    options = {"seed": 1, "global_batch_rows": 8} | options
    return BatchStream(folder, rank=rank, world_size=world_size, micro_batch_rows=micro_batch_rows, **options)


def global_batch(folder, steps, world_size=1, micro_batch_rows=1, **options):
    """Gives the rows that all ranks together take at each step, in the order of their positions."""
    streams = [stream(folder, rank, world_size, micro_batch_rows, **options) for rank in range(world_size)]
    batches = []
    for _ in range(steps):
        micro_batches = [micro_batch for one in streams for micro_batch in one.next_step()]
        assert all(tensor.shape == (micro_batch_rows, folder.seq_len) for m in micro_batches for tensor in m.values())
        batches.append({name: torch.cat([m[name] for m in micro_batches]) for name in micro_batches[0]})
    return batches


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in ("input_ids", "labels", "position_ids"))


def test_every_row_comes_once_an_epoch_and_each_epoch_differs():
    order = RowOrder(1000, "data", 0, [37] * 27 + [1])
    epochs = [[order.row(position) for position in range(1000 * e, 1000 * (e + 1))] for e in range(3)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.row(3) == epochs[0][3]  # going back is no different


def test_the_order_is_a_function_of_fingerprint_and_seed():
    def rows(*identity):
        return [RowOrder(100, *identity, [50, 50]).row(position) for position in range(100)]

    assert rows("data", 0) == rows("data", 0)
    assert rows("data", 0) != rows("data", 1)
    assert rows("data", 0) != rows("other", 0)


def test_the_order_stays_what_it_was_in_earlier_versions():
    order = RowOrder(12, "data", 0, [4, 4, 4])
    assert [order.row(position) for position in range(12)] == [9, 7, 11, 1, 10, 6, 4, 0, 8, 3, 5, 2]


def test_reading_stays_within_a_block_of_shards():
    order = RowOrder(1000, "data", 0, [10] * 100)
    for start in range(0, 1000, 10 * SHARDS_PER_BLOCK):
        shards = {order.row(position) // 10 for position in range(start, min(start + 10 * SHARDS_PER_BLOCK, 1000))}
        assert len(shards) <= SHARDS_PER_BLOCK
    first = [order.row(position) // 10 for position in range(20)]
    assert len(set(first)) > 5


def test_global_batches_are_the_same_for_every_world_and_micro_batch(folder):
    steps = folder.num_rows // 8 + 2  # beyond the first epoch
    reference = global_batch(folder, steps)
    for world_size, micro_batch_rows in ((2, 1), (4, 2), (1, 8), (8, 1)):
        assert_equal(global_batch(folder, steps, world_size, micro_batch_rows), reference)


def test_a_stream_resumes_from_its_position_at_another_world_size(folder):
    reference = global_batch(folder, 12)
    stopped = stream(folder, world_size=2)
    for _ in range(5):
        stopped.next_step()
    assert stopped.position == 40
    assert_equal(global_batch(folder, 7, world_size=4, position=stopped.position), reference[5:])


def test_batches_hold_the_rows_of_the_order(folder):
    (batch,) = global_batch(folder, 1, position=5)
    order = RowOrder(folder.num_rows, folder.fingerprint, 1, folder.rows_per_file)
    for index in range(8):
        assert np.array_equal(batch["input_ids"][index].numpy(), folder.read(order.row(5 + index))[0])
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_positions_restart_at_every_piece_and_at_padding():
    assert position_ids(SPANS, 12).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2]
    assert position_ids(SPANS, 9).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_no_first_token_and_no_padding_is_a_target():
    targets = [0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert supervised(SPANS, 12, "all").tolist() == [bool(target) for target in targets]
    assert supervised(SPANS, 9, "all").tolist() == [bool(target) for target in targets[:9]]


def test_only_answers_are_targets_when_asked():
    assert supervised(SPANS, 12, "answer").tolist() == [3 <= position < 6 for position in range(12)]
    # a continuation that is all answer: its first token is still no target
    assert supervised(np.array([[0, 0, 4, 0, 0, 16]]), 4, "answer").tolist() == [False, True, True, True]


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_labels_stand_at_their_own_tokens(folder, loss_on):
    for batch in global_batch(folder, 3, loss_on=loss_on):
        targets = batch["labels"] != -100
        assert 0 < targets.sum() < targets.numel()
        assert torch.equal(batch["labels"][targets], batch["input_ids"][targets])
        assert not targets[batch["position_ids"] == 0].any()
        assert not targets[batch["input_ids"] == folder.pad_token_id].any()


def test_answer_labels_decode_to_the_answer(folder, rows):
    tokenizer = load_tokenizer(str(folder.tokenizer_path))
    order = RowOrder(folder.num_rows, folder.fingerprint, 1, folder.rows_per_file)
    (batch,) = global_batch(folder, 1, loss_on="answer")
    whole = 0
    for index, labels in enumerate(batch["labels"]):
        for start, _, end, _, input_row, offset in folder.read(order.row(index))[1].tolist():
            targets = labels[start:end][labels[start:end] != -100].tolist()
            if offset == 0 and targets[-1:] == [tokenizer.eos_token_id]:
                assert decode_answer(tokenizer, targets) == clean_text(rows[input_row]["answer"])
                whole += 1
    assert whole > 8


def test_a_batch_that_does_not_divide_names_the_numbers_and_the_nearest(folder):
    with pytest.raises(DataError, match="global_batch_rows 10 .* micro_batch_rows 2 × world size 4: .*: 8 and 16"):
        stream(folder, world_size=4, micro_batch_rows=2, global_batch_rows=10)
    with pytest.raises(DataError, match="global_batch_rows 3 .*: 8$"):
        stream(folder, world_size=4, micro_batch_rows=2, global_batch_rows=3)
    with pytest.raises(DataError, match="must all be at least 1"):
        stream(folder, micro_batch_rows=0)


def test_an_unknown_loss_on_is_one_sentence(folder):
    with pytest.raises(DataError, match="loss_on is 'question': give one of all, answer"):
        stream(folder, loss_on="question")
