"""Training gives the same numbers for every ZeRO stage, spread of the experts, recomputation and number of ranks.

Every run makes the same ten steps of eight rows: plain PyTorch in one process with one batch, or DeepSpeed in micro-batches
of two rows. The rows have different numbers of supervised tokens. In one step half of the rows have none, so that a whole
rank has none, and two rows are only padding, which make a whole micro-batch.
"""

import json
import shutil
import sys
from collections import defaultdict

import pytest
import torch

from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.reader import ShardFolder
from launcher.config import RunConfig
from launcher.config_file import load_run_config
from launcher.tools.export.export import load_run
from launcher.training.checkpoints.checkpoint import TrainState
from launcher.training.setup.model_source import build_model
from launcher.training.setup.schedule import learning_rate
from model.loss import total_loss
from model.metrics import count_tokens, load_max_over_mean
from model.moe import balancing_bias, set_balancing_bias, updated_balancing_bias
from tests.launcher.mathematics_worker import (
    GLOBAL_ROWS,
    GRADIENTS_OF,
    MICRO_ROWS,
    STEPS,
    UNLABELLED_STEP,
    leave_labels_out,
)
from tests.launcher.trainer import start

# Adam's epsilon. With the usual 1e-8, rounding errors decide the update of a parameter whose gradient is nearly zero.
EPSILON = 1e-5
CELLS = {
    (ranks, stage, experts, recomputed): f"{ranks}_ranks_zero_{stage}_experts_over_{experts}"
    + "_recomputed" * recomputed
    for ranks in (1, 2, 4)
    for stage in (1, 3)
    for experts in (1, 2)
    for recomputed in (True, False)
    if ranks % experts == 0
}
REPRESENTATIVE = [(2, 3, 2, True), (2, 3, 1, False), (2, 1, 2, True)]
ALL = [
    pytest.param(cell, id=name, marks=() if cell in REPRESENTATIVE else pytest.mark.slow)
    for cell, name in CELLS.items()
]


@pytest.fixture(scope="module")
def config(trainer) -> RunConfig:
    """A run from exported weights: the routers already have a bias, and no parameter is zero, as some fresh ones are."""
    config = load_run_config(trainer.config)
    data = ShardFolder(config.data)
    model = build_model(config, data)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    set_balancing_bias(model, 0.1 * torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    folder = trainer.folder / "exported"
    shutil.copytree(data.tokenizer_path, folder)
    model.save_pretrained(folder)
    overrides = [f"init_from={folder}", f"max_steps={STEPS}", f"global_batch_rows={GLOBAL_ROWS}", "learning_rate=0.001"]
    return load_run_config(trainer.config, overrides)


@pytest.fixture(scope="module")
def trained(trainer, config):
    """Return the name of a cell's run; cells with the same number of ranks run together, in one set of processes."""
    done = set()

    def name_of(cell: tuple) -> str:
        if cell not in done:
            together = [other for other in CELLS if group(other) == group(cell)]
            runs = [arguments(trainer, config, other) for other in together]
            results = start(cell[0], [sys.executable, "-m", "mathematics_worker", json.dumps(runs)])
            failed = [result for result in results if result.returncode]
            assert not failed, max(failed, key=lambda result: result.returncode).stdout  # the others were killed
            done.update(together)
        return CELLS[cell]

    return name_of


def group(cell: tuple) -> tuple:
    return cell[0], cell in REPRESENTATIVE


def arguments(trainer, config: RunConfig, cell: tuple) -> list[str]:
    _, stage, experts, recomputed = cell
    content = json.loads(trainer.fp32.read_text())
    content["zero_optimization"]["stage"] = stage
    content["optimizer"]["params"]["eps"] = EPSILON
    return trainer.arguments(
        CELLS[cell], f"init_from={config.init_from}", f"max_steps={STEPS}", f"global_batch_rows={GLOBAL_ROWS}",
        f"micro_batch_rows={MICRO_ROWS}", f"learning_rate={config.learning_rate}", f"expert_parallel_size={experts}",
        f"activation_checkpointing={recomputed}".lower(),
        deepspeed_config=trainer.deepspeed_config(f"zero_{stage}", **content),
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(trainer, trained):
    def load(cell: tuple) -> dict:
        return torch.load(trainer.folder / trained(cell) / "mathematics.pt", weights_only=True)

    return load


@pytest.fixture(scope="module")
def plain(config):
    return plain_pytorch(config, recomputed=False)


def plain_pytorch(config: RunConfig, recomputed: bool) -> tuple[dict[str, list[float]], dict]:
    """Train the same steps in plain PyTorch with one batch; return figures by tag, and gradients and final weights."""
    data = ShardFolder(config.data)
    model = build_model(config, data).train()
    if recomputed:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=EPSILON, weight_decay=config.weight_decay)
    stream = BatchStream(data, seed=config.seed, global_batch_rows=GLOBAL_ROWS, micro_batch_rows=GLOBAL_ROWS, rank=0,
                         world_size=1, loss_on=config.loss_on)  # fmt: skip
    means = TrainState.initial(model).running_means
    shown, gradients = defaultdict(list), {}
    for step in range(STEPS):
        batches = stream.next_step()
        if step + 1 == UNLABELLED_STEP:
            batches = leave_labels_out(batches, 0, data.pad_token_id)
        (batch,) = batches
        output = model(**batch, running_means=means)
        supervised, text = count_tokens(batch, model.config.pad_token_id).values()
        loss = total_loss(output.loss_sums, config.loss, supervised, text)
        optimizer.zero_grad()
        loss.backward()
        if step + 1 in GRADIENTS_OF:
            gradients[step + 1] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        means = means.updated(output.statistics["routing"] / text, output.statistics["retained_ratio"] / text)
        load = output.statistics["load"]
        bias = updated_balancing_bias(balancing_bias(model), load, config.balancing_rate)
        set_balancing_bias(model, bias)
        values = {"train/loss": loss, "train/grad_norm": norm, "balance/bias_max": bias.abs().max()}
        layers = {
            f"moe/layer_{layer:02d}/load_max_over_mean": ratio for layer, ratio in enumerate(load_max_over_mean(load))
        }
        for tag, value in {**values, **layers}.items():
            shown[tag].append(value.item())
    return shown, {"gradients": gradients, "parameters": {n: p.detach() for n, p in model.named_parameters()}}


def largest_difference(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the difference relative to the parameter's largest element; for experts, to each expert's own."""
    if given.dim() == 3:
        return max(largest_difference(one, other) for one, other in zip(given, expected, strict=True))
    return ((given - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("cell", ALL)
def test_losses_gradient_norms_and_use_of_experts_are_those_of_plain_pytorch(trainer, trained, plain, cell):
    scalars, (expected, _) = trainer.scalars(trained(cell)), plain
    for tag, values in expected.items():
        given = [scalars[tag][step] for step in range(1, STEPS + 1)]
        assert given == pytest.approx(values, rel=1e-4 if tag == "train/grad_norm" else 1e-5), tag
    losses = expected["train/loss"]
    assert losses[0] != pytest.approx(losses[-1], rel=0.01)  # something was learned, so the equality has a meaning


@pytest.mark.parametrize("cell", ALL)
def test_every_gradient_is_that_of_plain_pytorch(recorded, plain, cell):
    """The weights alone would not show a wrong scale, which Adam divides out; the norm hardly shows that of experts."""
    gradients, (_, expected) = recorded(cell)["gradients"], plain
    for step in GRADIENTS_OF:
        assert gradients[step].keys() == expected["gradients"][step].keys()
        apart = {
            name: largest_difference(gradients[step][name], value)
            for name, value in expected["gradients"][step].items()
        }
        assert max(apart.values()) < 2e-5, max(apart.items(), key=lambda item: item[1])


@pytest.mark.parametrize("cell", ALL)
def test_the_weights_after_ten_steps_are_those_of_plain_pytorch(recorded, plain, cell):
    weights, (_, expected) = recorded(cell)["parameters"], plain
    assert weights.keys() == expected["parameters"].keys()
    apart = {name: (weights[name] - value).abs().max().item() for name, value in expected["parameters"].items()}
    assert max(apart.values()) < 1e-5, max(apart.items(), key=lambda item: item[1])


@pytest.mark.slow
def test_plain_pytorch_is_the_same_with_recomputation(plain, config):
    (shown, tensors), (expected, others) = plain_pytorch(config, recomputed=True), plain
    for tag, values in expected.items():
        assert shown[tag] == pytest.approx(values, rel=1e-5), tag
    for name, value in others["parameters"].items():
        torch.testing.assert_close(tensors["parameters"][name], value, atol=1e-6, rtol=1e-5)


def test_every_expert_has_a_gradient_of_its_own(plain):
    """Otherwise the equality above would say nothing about an expert without a gradient."""
    gradients = [value for name, value in plain[1]["gradients"][1].items() if ".experts." in name]
    assert [len(value) for value in gradients] == [4, 4, 4, 4]
    assert all(expert.abs().max() > 1e-5 for value in gradients for expert in value)


@torch.no_grad()
def test_the_bias_changes_the_experts_of_many_tokens_from_the_first_step_on(config):
    """Otherwise the equality above would say nothing about the bias."""
    model = build_model(config, ShardFolder(config.data))
    for layer in model.model.layers:
        tokens = torch.randn(1000, 32)
        biased, _ = layer.moe.router(tokens)
        layer.moe.router.e_score_correction_bias.zero_()
        unbiased, _ = layer.moe.router(tokens)
        assert (biased.sort().values != unbiased.sort().values).any(-1).float().mean() > 0.1


def test_the_exported_weights_are_those_of_plain_pytorch(trainer, trained, plain):
    exported = load_run(trainer.folder / trained(REPRESENTATIVE[0])).state_dict()
    for name, parameter in plain[1]["parameters"].items():
        tokens = (
            len(exported["lm_head.weight"]) if name == "model.embed_tokens.weight" else None
        )  # without the padding rows
        torch.testing.assert_close(
            exported[name], parameter[:tokens], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
