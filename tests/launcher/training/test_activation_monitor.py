"""The activation monitor shows plain PyTorch's numbers under ZeRO-3 and recomputation, and counts each value once."""

import dataclasses
import shutil
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.reader import ShardFolder
from launcher.config import RunConfig
from launcher.config_file import load_run_config
from launcher.errors import ConfigurationError
from launcher.training.monitoring.activation_monitor import ActivationMonitor, Statistics
from launcher.training.monitoring.gradient_norms import GROUPS, group_of
from launcher.training.setup.model_source import build_model
from model.loss import total_loss
from model.metrics import count_tokens

LAYERS = ("model.liquid_embedding", "model.layers.0", "model.layers.1", "model.norm")
WAYS = {
    "recomputed": [],
    "accumulated": ["micro_batch_rows=1"],
    "not_recomputed": ["activation_checkpointing=false", "expert_parallel_size=1"],
    "zero1": [],
}


@pytest.fixture(scope="module")
def config(trainer):
    """A run in which no parameter begins as zeros, so that every part has a gradient."""
    config = load_run_config(trainer.config)
    data = ShardFolder(config.data)
    model = build_model(config, data)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    folder = trainer.folder / "exported"
    shutil.copytree(data.tokenizer_path, folder)
    model.save_pretrained(folder)
    return load_run_config(trainer.config, [f"init_from={folder}"])


@pytest.fixture(scope="module")
def watched(trainer, config):
    """One step in each of `WAYS` on two ranks, in one pair of processes; and a run with a far too high learning rate."""
    zero1 = trainer.deepspeed_config("zero1", zero_optimization={"stage": 1})
    common = [f"init_from={config.init_from}", "expert_parallel_size=2", "monitor.every=1"]
    runs = [
        trainer.arguments(name, *common, "max_steps=1", *overrides, deepspeed_config=zero1 if name == "zero1" else None)
        for name, overrides in WAYS.items()
    ]
    wild = trainer.arguments(
        "wild", *common, "max_steps=8", "warmup_steps=4", "learning_rate=3", "gradient_clipping=1e9"
    )
    trainer.outputs = trainer.run(2, *runs, wild)
    return trainer


@pytest.fixture(scope="module")
def plain(config):
    """The statistics of layers and the norms of groups in the same step of plain PyTorch, by tag."""
    data = ShardFolder(config.data)
    model = build_model(config, data).train()
    (batch,) = BatchStream(
        data, seed=config.seed, global_batch_rows=4, micro_batch_rows=4, rank=0, world_size=1, loss_on=config.loss_on
    ).next_step()
    outputs = {}
    for name, module in model.named_modules():
        if name in LAYERS:
            module.register_forward_hook(
                lambda _, __, output, name=name: outputs.update(
                    {name: output if torch.is_tensor(output) else output[0]}
                )
            )
    output = model(**batch)
    for tensor in outputs.values():
        tensor.retain_grad()
    supervised, text = count_tokens(batch, model.config.pad_token_id).values()
    total_loss(output.loss_sums, config.loss, supervised, text).backward()
    found = {}
    for name, tensor in outputs.items():
        for kind, values in (("activations", tensor.detach()), ("gradients", tensor.grad)):
            found |= {
                f"{kind}/{name}/mean": values.mean().item(),
                f"{kind}/{name}/rms": values.square().mean().sqrt().item(),
                f"{kind}/{name}/max_abs": values.abs().max().item(),
                f"{kind}/{name}/nonfinite": 0.0,
                f"{kind}/{name}/saturated": 0.0,
            }
    squares = dict.fromkeys(GROUPS, 0.0)
    for name, parameter in model.named_parameters():
        squares[group_of(name)] += parameter.grad.double().square().sum().item()
    assert all(squares.values())
    return found, {f"grad_norm/{group}": square**0.5 for group, square in squares.items()}


@pytest.mark.parametrize("way", WAYS)
def test_activations_and_their_gradients_are_those_of_plain_pytorch(watched, plain, way):
    scalars = watched.scalars(way)
    expected, _ = plain
    assert {tag for tag in scalars if tag.startswith(("activations/", "gradients/"))} == set(expected)
    for tag, value in expected.items():
        scale = expected[tag.replace("/mean", "/rms")]  # a mean near zero is a difference of large numbers
        assert scalars[tag][1] == pytest.approx(value, rel=1e-4, abs=1e-5 * scale), tag


@pytest.mark.parametrize("way", WAYS)
def test_gradient_norms_of_groups_are_those_of_plain_pytorch(watched, plain, way):
    scalars = watched.scalars(way)
    _, expected = plain
    for tag, value in expected.items():
        assert scalars[tag][1] == pytest.approx(value, rel=1e-4), tag
    total = sum(scalars[tag][1] ** 2 for tag in expected) ** 0.5
    assert total == pytest.approx(scalars["train/grad_norm"][1], rel=1e-5)


def test_a_run_that_diverges_prints_a_warning_on_rank_0(watched):
    said = [line for line in watched.outputs[0].stdout.splitlines() if "lower learning_rate" in line]
    assert any("the activations of model.layers.1 have grown to" in line or "are not finite" in line for line in said)
    assert not any("lower learning_rate" in line for line in watched.outputs[1].stdout.splitlines())


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Recomputing(nn.Module):
    """Two linear layers, the first recomputed in the backward pass."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        return self.second(checkpoint(self.first, inputs, use_reentrant=self.use_reentrant)).sum()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_counts_once_and_later_steps_do_not_count(process_group, use_reentrant):
    model = Recomputing(use_reentrant)
    monitor = ActivationMonitor(model, ["first", "second"])
    inputs = torch.randn(3, 4, requires_grad=True)
    model(inputs).backward()  # not a monitored step
    monitor.begin(torch.device("cpu"))
    for _ in range(2):  # micro-batches
        model(inputs).backward()
    assert monitor._sums[..., 0].tolist() == [[24, 24], [24, 24]]
    found = monitor.collect(gradient_scale=2.0)
    assert vars(found["gradients"]["second"]) == pytest.approx(vars(Statistics(0.5, 0.5, 0.5, 0.0, 0.0)))
    model(inputs).backward()
    assert monitor._sums[..., 0].tolist() == [[24, 24], [24, 24]]


def test_nonfinite_and_nearly_overflowing_values_are_counted_separately(process_group):
    model = nn.Sequential(nn.Identity())
    monitor = ActivationMonitor(model, ["0"])
    monitor.begin(torch.device("cpu"))
    model(torch.tensor([1.0, -3.0, float("nan"), float("inf"), 40000.0, 0.0, 0.0, 0.0], dtype=torch.float16))
    statistics = monitor.collect(1.0)["activations"]["0"]
    assert (statistics.nonfinite, statistics.saturated, statistics.max_abs) == (0.25, 0.125, 40000.0)
    assert statistics.mean == pytest.approx(39998 / 6)
    assert "gradients" in monitor.collect(1.0) and monitor.collect(1.0)["gradients"] == {}


def test_a_layer_that_leaves_its_range_is_reported_once_until_it_is_back():
    monitor = ActivationMonitor(nn.Sequential(nn.Identity()), ["0"])

    def look(rms, nonfinite=0.0, kind="activations", loss_scaled=False):
        found = {kind: {"0": Statistics(0.0, rms, rms, nonfinite, 0.0)}}
        return monitor.warnings(found, loss_scaled)

    assert [look(rms) for rms in (1.0, 30.0, 1.1, 0.9)] == [[], [], [], []]  # the first values set what is usual
    (said,) = look(50.0)
    assert "the activations of 0 have grown to" in said and "lower learning_rate" in said
    assert look(60.0) == [] and look(1.0) == []
    assert "almost silent" in look(0.01)[0]
    assert look(1.0) == []
    assert "not finite in 12.50%" in look(1.0, nonfinite=0.125)[0]
    assert look(1.0, nonfinite=0.125, kind="gradients", loss_scaled=True) == []


def test_layer_patterns_that_match_nothing_or_are_invalid_are_refused():
    for patterns, fault in (
        (["no_such"], "'no_such', which matches no layer; .* of the model are 0"),
        (["("], "not a valid regular expression"),
    ):
        with pytest.raises(ConfigurationError, match=fault):
            ActivationMonitor(nn.Sequential(nn.Identity()), patterns)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_monitoring_every_100_steps_takes_less_than_a_hundredth_of_the_time(process_group, config, one_thread):
    """The test measures processor time on one thread: threads that wait for one another spin, which would count."""
    data = ShardFolder(config.data)
    model = build_model(dataclasses.replace(config, model="tiny", init_from=None), data).train()
    (batch,) = BatchStream(data, seed=1, global_batch_rows=8, micro_batch_rows=8, rank=0, world_size=1).next_step()
    settings = RunConfig().monitor
    monitor = ActivationMonitor(model, settings.layers)
    taken = {True: [], False: []}
    for looks in [True, False] * 8:
        begun = time.process_time()
        if looks:
            monitor.begin(torch.device("cpu"))
        model(**batch).loss.backward()
        if looks:
            assert monitor.collect(1.0)["gradients"].keys() == {"model.liquid_embedding", "model.norm"} | {
                f"model.layers.{layer}" for layer in range(4)
            }
        taken[looks].append(time.process_time() - begun)
    usual = min(taken[False])
    assert (min(taken[True]) - usual) / settings.every < 0.01 * usual
    assert min(taken[True]) < 1.5 * usual  # nor is the monitored step much slower
