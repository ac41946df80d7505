import hashlib
import multiprocessing
import os
import signal
from itertools import chain

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data_pipeline.cleaning.clean import clean_text
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import BatchStream, ValidationBatches
from data_pipeline.loading.mixture import open_data
from data_pipeline.loading.prefetch import Prefetcher
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.tokens.tokenization import decode_answer
from tests.data_pipeline.shard_folders import FIRST_ID, PAD, make_folder

NAMES = ("input_ids", "labels", "position_ids")
PROCESSES = multiprocessing.get_context("fork")  # real processes that need not import torch again
SECONDS = 60  # that no process may take


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("shards") / "folder")


@pytest.fixture(scope="module")
def mixed(folder, tmp_path_factory):
    other = make_folder(tmp_path_factory.mktemp("shards") / "other", (11, 5), seed=1, sources=("code", "web"))
    return [{"path": str(folder), "weight": 0.7}, {"path": str(other), "weight": 0.3}]


def stream(data, rank=0, world_size=1, micro_batch_rows=1, **options):
    options = {"seed": 1, "global_batch_rows": 8} | options
    data = open_data(data) if isinstance(data, list) else ShardFolder(data)
    return BatchStream(data, rank=rank, world_size=world_size, micro_batch_rows=micro_batch_rows, **options)


def take(batches, steps):
    """A digest of every row of every step, so that it travels between processes."""
    return [[digest for batch in batches.next_step() for digest in row_digests(batch)] for _ in range(steps)]


def row_digests(batch):
    rows = zip(*(batch[name] for name in NAMES), strict=True)
    return [hashlib.sha256(b"".join(part.numpy().tobytes() for part in row)).hexdigest() for row in rows]


def in_processes(function, count):
    """What `function(rank)` returns in each of `count` processes; fails where one dies or hangs."""

    def work(rank, pipe):
        pipe.send(function(rank))
        pipe.close()

    ends = [PROCESSES.Pipe(duplex=False) for _ in range(count)]
    processes = [PROCESSES.Process(target=work, args=(rank, ends[rank][1])) for rank in range(count)]
    for process in processes:
        process.start()
    results = []
    for (reader, writer), process in zip(ends, processes, strict=True):
        writer.close()
        assert reader.poll(SECONDS), "a process hangs"
        results.append(reader.recv())
        process.join(SECONDS)
        assert process.exitcode == 0
    return results


def global_steps(data, steps, world_size, micro_batch_rows=1, prefetch=None, **options):
    """What `world_size` processes take together at each step, in the order of the positions."""

    def rank_steps(rank):
        batches = stream(data, rank, world_size, micro_batch_rows, **options)
        if prefetch is None:
            return take(batches, steps)
        with Prefetcher(batches, **prefetch) as ahead:
            return take(ahead, steps)

    ranks = in_processes(rank_steps, world_size)
    return [[digest for rank in ranks for digest in rank[step]] for step in range(steps)]


@pytest.mark.parametrize("kind", ["folder", "mixed"])
def test_global_batches_are_the_same_for_every_world_micro_batch_and_number_of_threads(kind, request):
    data = request.getfixturevalue(kind)
    steps = 40  # several epochs, so that batches straddle their ends
    reference = global_steps(data, steps, 1)
    assert global_steps(data, steps, 1, micro_batch_rows=8, prefetch={"steps": 5, "threads": 3}) == reference
    assert global_steps(data, steps, 2, micro_batch_rows=2, prefetch={"steps": 1}) == reference
    assert global_steps(data, steps, 4, micro_batch_rows=2) == reference
    assert global_steps(data, steps, 8, prefetch={"steps": 3, "threads": 4}) == reference


@pytest.mark.parametrize("kind", ["folder", "mixed"])
def test_a_stream_resumes_at_any_step_at_another_world_size(kind, request):
    data = request.getfixturevalue(kind)
    reference = take(stream(data), 20)
    for done in range(20):
        stopped = stream(data, rank=1, world_size=2)
        take(stopped, done)
        assert stopped.position == 8 * done
        resumed = [take(stream(data, rank, 4, position=stopped.position), 20 - done) for rank in range(4)]
        assert [list(chain(*step)) for step in zip(*resumed, strict=True)] == reference[done:]


def test_a_killed_process_goes_on_from_the_position_that_it_had_written_down(folder, tmp_path):
    """With steps made ahead, which were lost with it: nothing is missing and nothing comes twice."""
    log = tmp_path / "log"

    def train_until_killed(kill_at):
        with log.open("a") as file:
            lines = log.read_text().splitlines()
            position = int(lines[-1].split()[0]) if lines else 0
            with Prefetcher(stream(folder, position=position), steps=4, threads=2) as batches:
                for step in range(100):
                    if step == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    (digests,) = take(batches, 1)
                    print(batches.position, *digests, file=file, flush=True)

    log.touch()
    for kill_at in (3, 1, 6):
        process = PROCESSES.Process(target=train_until_killed, args=(kill_at,))
        process.start()
        process.join(SECONDS)
        assert process.exitcode == -signal.SIGKILL
    assert [line.split()[1:] for line in log.read_text().splitlines()] == take(stream(folder), 10)


def test_each_row_comes_once_an_epoch_over_all_ranks(folder):
    def first_ids(rank):
        batches = stream(folder, rank, 2, global_batch_rows=2)
        return [int(batches.next_step()[0]["input_ids"][0, 0]) for _ in range(3 * 67)]

    by_rank = in_processes(first_ids, 2)
    rows = [row for step in zip(*by_rank, strict=True) for row in step]
    for epoch in range(6):
        assert sorted(rows[67 * epoch : 67 * (epoch + 1)]) == [FIRST_ID + row for row in range(67)]


def test_a_folder_smaller_than_a_batch_goes_round(tmp_path):
    small = make_folder(tmp_path / "small", (2, 1))
    (batch,) = stream(small, micro_batch_rows=8).next_step()
    firsts = (batch["input_ids"][:, 0] - FIRST_ID).tolist()
    assert sorted(firsts[:3]) == sorted(firsts[3:6]) == [0, 1, 2]


def test_batches_hold_the_rows_of_the_order(folder):
    batches = stream(folder, micro_batch_rows=8, position=5)
    (batch,) = batches.next_step()
    shards = ShardFolder(folder)
    for index in range(8):
        assert np.array_equal(batch["input_ids"][index].numpy(), shards.read(batches.order.row(5 + index))[0])
    assert all(batch[name].dtype == torch.int64 and batch[name].is_contiguous() for name in NAMES)


def test_a_batch_that_is_kept_does_not_change(folder):
    """The memory of a batch is used again, but not while somebody holds the batch."""
    batches = stream(folder, micro_batch_rows=2)
    kept = [batches.next_step()[1] for _ in range(100)]
    again = stream(folder, micro_batch_rows=2)
    assert all(row_digests(batch) == row_digests(again.next_step()[1]) for batch in kept)


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_labels_stand_at_their_own_tokens(folder, loss_on):
    for batch in stream(folder, micro_batch_rows=8, loss_on=loss_on).next_step():
        targets = batch["labels"] != -100
        assert 0 < targets.sum() < targets.numel()
        assert torch.equal(batch["labels"][targets], batch["input_ids"][targets])
        assert not targets[batch["position_ids"] == 0].any()
        assert not targets[batch["input_ids"] == PAD].any()


def test_answer_labels_decode_to_the_answer(prepared, rows):
    batches = stream(prepared, micro_batch_rows=8, loss_on="answer")
    (batch,) = batches.next_step()
    tokenizer = AutoTokenizer.from_pretrained(batches.data.tokenizer_path)
    whole = 0
    for index, labels in enumerate(batch["labels"]):
        for start, _, end, _, input_row, offset in batches.data.read(batches.order.row(index))[1].tolist():
            targets = labels[start:end][labels[start:end] != -100].tolist()
            if offset == 0 and targets[-1:] == [tokenizer.eos_token_id]:
                assert decode_answer(tokenizer, targets) == clean_text(rows[input_row]["answer"])
                whole += 1
    assert whole > 8


def test_a_batch_that_does_not_divide_names_the_numbers_and_the_nearest(folder):
    with pytest.raises(DataError, match="global_batch_rows 10 .* micro_batch_rows 2 × world size 4; .*: 8 and 16"):
        stream(folder, world_size=4, micro_batch_rows=2, global_batch_rows=10)
    with pytest.raises(DataError, match="global_batch_rows 3 .*: 8$"):
        stream(folder, world_size=4, micro_batch_rows=2, global_batch_rows=3)
    with pytest.raises(DataError, match="must all be at least 1"):
        stream(folder, micro_batch_rows=0)


def test_an_unknown_loss_on_is_one_sentence(folder):
    with pytest.raises(DataError, match="loss_on is 'question': give one of all, answer"):
        stream(folder, loss_on="question")
    with pytest.raises(DataError, match="loss_on is 'question': give one of all, answer"):
        ValidationBatches(ShardFolder(folder), micro_batch_rows=1, rank=0, world_size=1, loss_on="question")


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(1, 4), (2, 5), (4, 3), (8, 1), (3, 40)])
def test_validation_takes_every_row_once_and_as_many_batches_on_every_rank(folder, world_size, micro_batch_rows):
    def share(rank):
        batches = ValidationBatches(
            ShardFolder(folder), micro_batch_rows=micro_batch_rows, rank=rank, world_size=world_size, loss_on="answer"
        )
        taken = [(batch.inputs, batch.sources) for batch in batches]
        assert len(taken) == len(batches)
        return [({name: rows.numpy() for name, rows in inputs.items()}, sources.numpy()) for inputs, sources in taken]

    ranks = in_processes(share, world_size)
    assert len({len(batches) for batches in ranks}) == 1
    inputs, sources = zip(*(batch for batches in zip(*ranks, strict=True) for batch in batches), strict=True)
    assert all(len(batch["labels"]) == micro_batch_rows for batch in inputs)
    whole = {name: np.concatenate([batch[name] for batch in inputs]) for name in NAMES}
    firsts = whole["input_ids"][:, 0]
    assert firsts[:67].tolist() == [FIRST_ID + row for row in range(67)]
    assert (whole["input_ids"][67:] == PAD).all() and (whole["labels"][67:] == -100).all()
    of_tokens = np.concatenate(sources)
    assert ((of_tokens == -1) == (whole["input_ids"] == PAD)).all()
    for row in range(67):
        for start, _, end, source, *_ in ShardFolder(folder).read(row)[1]:
            assert (of_tokens[row, start:end] == source).all()
