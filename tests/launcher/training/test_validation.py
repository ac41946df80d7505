"""Validation during training: exact on any number of ranks, every held-out row once, no effect on training."""

import json
import math
import shutil
import sys
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.loading.loader import ValidationBatches
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from launcher.config_file import load_run_config
from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.tools.export.export import load_run
from launcher.training.checkpoints.checkpoint import find_checkpoint, read_train_state
from launcher.training.monitoring.validation import Validation, _sequence_sums, open_validation_data, score_tokens
from launcher.training.setup.data_source import open_run_data
from launcher.training.setup.model_source import build_model
from tests import fork_server

STEPS = 4
REPEATS = """
import gc, json, sys
import torch
import train
from launcher.config_file import load_run_config
from launcher.training.setup.data_source import open_run_data
from launcher.training.setup.deepspeed_config import resolve_deepspeed_config
from launcher.training.engine import build_engine, start_process_group
from launcher.environment import detect_environment
from launcher.process import export_for_torch
from launcher.training.setup.model_source import build_model
from launcher.training.monitoring.validation import Validation, open_validation_data

options = train.parse_arguments(sys.argv[1:])
environment = detect_environment()
export_for_torch(environment)
start_process_group(environment)
config = load_run_config(options.config, options.overrides)
data = open_run_data(config)
resolved, config, _ = resolve_deepspeed_config(options.deepspeed_config, config, environment, 4)
engine = build_engine(build_model(config, data), resolved)
before = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
validation = Validation(config, open_validation_data(config, data), 0, 1)
tensors, figures = [], []
for _ in range(5):
    result, answers = validation.run(engine, interrupted=lambda: False)
    figures.append(result.cross_entropy)
    gc.collect()
    held = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors.append((len(held), sum(t.nbytes for t in held)))
same = all(torch.equal(buffer, before[name]) for name, buffer in engine.module.named_buffers())
print("RESULT", json.dumps({"tensors": tensors, "figures": figures, "same": same, "training": engine.module.training,
                            "buffers": len(before)}))
"""


@pytest.fixture(scope="module")
def held_out(trainer, tmp_path_factory):
    """The trainer's data: a folder with held-out rows whose number no batch of several rows divides."""
    folder = tmp_path_factory.mktemp("data") / "with_validation"
    prepare("sample", folder, Settings(seq_len=64, validation_share=0.02), progress=False)
    rows = ShardFolder(folder / "validation").num_rows
    assert rows % 2 == 1 and rows % 3 != 0 and rows > 12, rows
    trainer.data = folder
    return folder


@pytest.fixture(scope="module")
def standing_still(trainer, held_out):
    """Trained weights that no step changes, so that any number of ranks validates the same model."""
    config = load_run_config(trainer.config, [f"data={held_out}"])
    model = build_model(config, open_run_data(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in islice(ValidationBatches(open_run_data(config), micro_batch_rows=8, rank=0, world_size=1), 25):
        optimizer.zero_grad()
        model.train()(**batch.inputs).loss.backward()
        optimizer.step()
    folder = trainer.folder / "exported"
    shutil.copytree(held_out / "tokenizer", folder)
    model.save_pretrained(folder)
    return [f"data={held_out}", f"init_from={folder}", "learning_rate=1e-12", "weight_decay=0", "balancing_rate=0"]


@pytest.fixture(scope="module")
def runs(trainer, held_out, standing_still):
    """Validations of the same model on one and two ranks, and the same training with and without validation.

    The run without is started again at its end, now with validation, because its last step has not been validated.
    """
    still = [
        *standing_still,
        "max_steps=1",
        "validate_every=1",
        "micro_batch_rows=2",
        "loss_on=all",
        "validation_samples=0",
    ]
    training = [f"data={held_out}", f"max_steps={STEPS}", "expert_parallel_size=2"]
    trainer.run(1, trainer.arguments("one_rank", *still))
    trainer.outputs = trainer.run(
        2,
        trainer.arguments("two_ranks", *still, "expert_parallel_size=2"),
        trainer.arguments("validated", *training, "validate_every=1", "validation_samples=1"),
        trainer.arguments("not_validated", *training, "validate_every=0"),
        trainer.arguments("not_validated", *training, "validation_samples=1"),
        trainer.arguments("not_validated", *training, "validation_samples=1"),
    )
    return trainer


def validation_figures(scalars) -> dict[str, float]:
    return {tag: values[1] for tag, values in scalars.items() if tag.startswith("validation/")}


def test_one_and_two_ranks_give_the_same_figures(runs):
    one, two = (validation_figures(runs.scalars(name)) for name in ("one_rank", "two_ranks"))
    assert one == pytest.approx(two, rel=1e-5)
    assert len(one) > 5
    assert 0 < one["validation/token_accuracy"] < one["validation/top5_accuracy"] < 1


def test_the_figures_are_those_of_plain_pytorch_over_every_row_once(runs, standing_still, held_out):
    config = load_run_config(runs.config, [*standing_still, "loss_on=all"])
    data = ShardFolder(held_out / "validation")
    model = load_run(runs.folder / "one_rank").eval()
    losses, places, sources, whole_answers = [], [], [], []
    with torch.no_grad():
        for row in range(data.num_rows):
            read = data.gather(np.array([row]))
            ids = torch.from_numpy(read.tokens.astype(np.int64))
            for start, answer, end, source, _, offset in read.spans.tolist():
                piece = ids[:, start:end]  # alone; the row had it among others
                logits = model(piece, use_cache=False).logits[0, :-1].double()
                target = piece[0, 1:]
                losses.append(F.cross_entropy(logits, target, reduction="none"))
                order = logits.argsort(dim=-1, descending=True, stable=True)
                places.append((order == target[:, None]).int().argmax(-1))
                if offset == 0 and target[-1] == model.config.eos_token_id:
                    whole_answers.append(bool((places[-1][answer - start - 1 :] == 0).all()))
                sources += [data.sources[source]] * len(target)
    losses, places = torch.cat(losses), torch.cat(places)
    expected = {
        "cross_entropy": losses.mean(),
        "perplexity": losses.mean().exp(),
        "token_accuracy": (places == 0).double().mean(),
        "top5_accuracy": (places < 5).double().mean(),
        "sequence_accuracy": torch.tensor(whole_answers).double().mean(),
    }
    for name in set(sources):
        expected[f"by_source/{name}"] = losses[[source == name for source in sources]].mean()
    found = validation_figures(runs.scalars("two_ranks"))
    for name, value in expected.items():
        if f"validation/{name}" in found or not name.startswith("by_source/"):
            assert found[f"validation/{name}"] == pytest.approx(value.item(), rel=1e-5), name
    assert sum(tag.startswith("validation/by_source/") for tag in found) == min(8, len(set(sources)))
    assert config.loss_on == "all"


def test_validation_does_not_change_the_training(runs):
    validated, other = (runs.scalars(name) for name in ("validated", "not_validated"))
    for tag, values in other.items():
        if not tag.startswith(("perf/", "validation/")):
            assert validated[tag] == values, tag
    # The optimizers' own files are not compared: their padding is not initialised.
    weights, expected = (load_run(runs.folder / name).state_dict() for name in ("validated", "not_validated"))
    assert len(expected) > 0 and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_missed_last_validation_runs_once_at_the_next_start(runs):
    whole, made_up = (runs.scalars(name) for name in ("validated", "not_validated"))
    tags = [tag for tag in whole if tag.startswith("validation/")]
    assert len(tags) > 5 and all(made_up[tag] == {STEPS: whole[tag][STEPS]} for tag in tags)
    assert list(made_up["perf/validation_seconds"]) == [STEPS]
    newest, _ = find_checkpoint(RunFolder(runs.folder / "not_validated"), "best")
    state = read_train_state(newest)
    assert (state.best_step, state.best_metric) == (STEPS, pytest.approx(whole["validation/cross_entropy"][STEPS]))
    assert runs.outputs[0].stdout.count(f"step {STEPS} was saved without its validation") == 1
    assert json.loads((runs.folder / "not_validated" / "status.json").read_text())["state"] == "done"


def test_the_best_so_far_is_in_the_train_state(runs):
    losses = runs.scalars("validated")["validation/cross_entropy"]
    assert sorted(losses) == list(range(1, STEPS + 1))
    state = read_train_state(runs.folder / "validated" / "checkpoints" / f"step-{STEPS:08d}")
    assert state.best_metric == pytest.approx(min(losses.values()))
    assert losses[state.best_step] == min(losses.values())
    assert f"validation at step {STEPS}: cross entropy" in runs.outputs[0].stdout


@pytest.mark.slow
def test_repeated_validations_hold_no_memory_and_change_no_state(trainer, held_out):
    arguments = trainer.arguments("repeats", f"data={held_out}", "validation_samples=1")
    result = fork_server.run([sys.executable, "-c", REPEATS, *arguments], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    measured = json.loads(result.stdout.split("RESULT", 1)[1].splitlines()[0])
    assert len({tuple(held) for held in measured["tensors"][1:]}) == 1, measured["tensors"]
    assert len(set(measured["figures"])) == 1
    assert measured["same"] and measured["buffers"] > 2
    assert measured["training"]


@pytest.mark.slow
def test_a_validation_may_take_longer_than_a_step_and_a_signal_ends_it_with_a_checkpoint(trainer, held_out):
    """The validation at step 2 takes twice the limit, most of it in the 48 forward passes of the answer.

    In step 4 rank 1 is asked to stop, and the validation after that step is interrupted.
    """
    overrides = ["max_steps=6", "validate_every=2", "validation_samples=1", "step_timeout_seconds=8"]
    arguments = trainer.arguments("long", f"data={held_out}", "micro_batch_rows=1", *overrides)
    slow = {"kind": "sleep", "steps": [2], "seconds": 0.35}
    results = trainer.run_with_faults(2, arguments, [slow, {"kind": "terminate", "rank": 1, "steps": [4]}])
    assert [result.returncode for result in results] == [75, 75], results[0].stdout
    assert "validating at step 4 was interrupted: the run was asked to stop" in results[0].stdout
    shown, state = trainer.scalars("long"), read_train_state(trainer.folder / "long/checkpoints/step-00000004")
    assert list(shown["validation/cross_entropy"]) == [2] and shown["perf/validation_seconds"][2] > 16
    assert (state.best_step, state.best_metric) == (2, pytest.approx(shown["validation/cross_entropy"][2]))


def test_ranks_share_the_rows_without_repeating_any(held_out):
    data = ShardFolder(held_out / "validation")
    taken = []
    for rank in range(2):
        batches = list(ValidationBatches(data, micro_batch_rows=3, rank=rank, world_size=2))
        assert len(batches) == -(-data.num_rows // 6)
        taken += [row.tobytes() for batch in batches for row in batch.inputs["input_ids"].numpy() if (row != 1).any()]
    assert sorted(taken) == sorted(
        data.gather(np.array([row])).tokens.astype(np.int64).tobytes() for row in range(data.num_rows)
    )


def test_without_a_held_out_folder_no_validation_is_due(trainer, held_out, sample_data):
    config = load_run_config(trainer.config, [f"data={sample_data}"])
    assert open_validation_data(config, open_run_data(config)) is None
    assert not Validation(config, None, 0, 1).is_due(config.max_steps)
    named = load_run_config(trainer.config, [f"data={sample_data}", f"validation_data={held_out / 'validation'}"])
    data = open_run_data(named)
    if data.tokenizer_fingerprint != ShardFolder(held_out).tokenizer_fingerprint:
        with pytest.raises(ConfigurationError, match="another tokenizer"):
            open_validation_data(named, data)


def test_of_equally_likely_tokens_the_first_is_the_prediction():
    logits = torch.tensor([[[1.0, 3.0, 3.0, 0.0]]])
    places = [score_tokens(logits, torch.tensor([[target]]))[1].item() for target in range(4)]
    assert places == [2, 0, 1, 3]
    loss, _ = score_tokens(logits, torch.tensor([[1]]))
    assert loss.item() == pytest.approx(-math.log(math.exp(3) / sum(map(math.exp, (1, 3, 3, 0)))))


def test_an_answer_is_right_if_all_its_tokens_are_and_pieces_do_not_count():
    # Three documents `<s> q <sep> a a </s>` and a piece of a long one; <s> is 0, </s> 2.
    whole = [0, 7, 5, 8, 9, 2]
    ids = torch.tensor([[*whole, *whole, 8, 9, 9, 2], [*whole, 0, 7, 5, 8, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[*range(6), *range(6), *range(4)], [*range(6), *range(4), *range(6)]])
    answers = torch.full_like(ids, -100)
    for row, begin in ((0, 3), (0, 9), (1, 3)):
        answers[row, begin : begin + 3] = ids[row, begin : begin + 3]
    answers[0, 13:16], answers[1, 9] = ids[0, 13:16], ids[1, 9]
    correct = torch.ones(2, 15, dtype=torch.bool)
    assert [n.item() for n in _sequence_sums(correct, ids, answers, positions, 0, 2).values()] == [3, 3]
    correct[0, 10 - 1] = False  # a token of the second answer
    correct[1, 1 - 1] = False  # a token of a question, which does not count
    assert [n.item() for n in _sequence_sums(correct, ids, answers, positions, 0, 2).values()] == [3, 2]
