"""The same mathematics whatever runs it: experts on one rank or spread over two, with DeepSpeed or without."""

import shutil
from collections import defaultdict

import pytest
import torch

from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.reader import ShardFolder
from launcher.checkpoint import TrainState
from launcher.config import RunConfig, load_run_config
from launcher.export import load_run
from launcher.model_source import build_model
from launcher.schedule import learning_rate
from model.loss import total_loss
from model.metrics import count_tokens, load_max_over_mean
from model.moe import balancing_bias, set_balancing_bias, updated_balancing_bias

STEPS = 5
WAYS = {
    "expert_parallel_1": ["expert_parallel_size=1"],
    "expert_parallel_2": ["expert_parallel_size=2"],
    "expert_parallel_2_accumulated": ["expert_parallel_size=2", "micro_batch_rows=1"],
    "expert_parallel_2_without_recomputation": ["expert_parallel_size=2", "activation_checkpointing=false"],
}


@pytest.fixture(scope="module")
def config(trainer) -> RunConfig:
    """A run that begins with exported weights: routers with a bias already, and no output at zero, as fresh ones are."""
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
    return load_run_config(trainer.config, [f"init_from={folder}"])


@pytest.fixture(scope="module")
def trained(trainer, config):
    """Every way on two ranks, in one pair of processes; one more ends after one step."""
    runs = [trainer.arguments(name, f"init_from={config.init_from}", *overrides) for name, overrides in WAYS.items()]
    one_step = [*runs[1], f"output={trainer.folder / 'one_step'}", "max_steps=1", f"schedule.steps={STEPS}"]
    # A loss in several chunks, so that the head's weight is gathered several times a step.
    trainer.run(2, *runs, one_step, chunk_tokens=50)
    return trainer


@pytest.fixture(scope="module")
def plain(config):
    """What plain PyTorch shows of the same steps, by tag, and its final model: one process, no DeepSpeed."""
    data = ShardFolder(config.data)
    model = build_model(config, data).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=config.weight_decay)
    stream = BatchStream(data, seed=config.seed, global_batch_rows=4, micro_batch_rows=4, rank=0, world_size=1,
                         loss_on=config.loss_on)  # fmt: skip
    means = TrainState.initial(model).running_means
    shown = defaultdict(list)
    for step in range(STEPS):
        (batch,) = stream.next_step()
        output = model(**batch, running_means=means)
        supervised, text = count_tokens(batch, model.config.pad_token_id).values()
        loss = total_loss(output.loss_sums, config.loss, supervised, text)
        optimizer.zero_grad()
        loss.backward()
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
    return shown, model


@pytest.mark.parametrize("way", WAYS)
def test_losses_gradient_norms_and_use_of_experts_are_those_of_plain_pytorch(trained, plain, way):
    scalars, (expected, _) = trained.scalars(way), plain
    for tag, values in expected.items():
        given = [scalars[tag][step] for step in range(1, STEPS + 1)]
        assert given == pytest.approx(values, rel=1e-4 if tag == "train/grad_norm" else 1e-5), tag
    losses = expected["train/loss"]
    assert losses[0] != pytest.approx(losses[-1], rel=0.01)  # something was learned, so equality says something


@torch.no_grad()
def test_the_bias_decides_for_many_tokens_from_the_first_step_on(config):
    """So that the equality above says something about the bias, too."""
    model = build_model(config, ShardFolder(config.data))
    for layer in model.model.layers:
        tokens = torch.randn(1000, 32)
        biased, _ = layer.moe.router(tokens)
        layer.moe.router.e_score_correction_bias.zero_()
        unbiased, _ = layer.moe.router(tokens)
        assert (biased.sort().values != unbiased.sort().values).any(-1).float().mean() > 0.1


@pytest.mark.parametrize("way", ["expert_parallel_1", "expert_parallel_2"])
def test_the_exported_weights_are_those_of_plain_pytorch(trained, plain, way):
    exported = load_run(trained.folder / way).state_dict()
    for name, parameter in plain[1].state_dict().items():
        torch.testing.assert_close(
            exported[name], parameter, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_every_expert_and_router_moves_in_one_step(trained, config):
    before = build_model(config, ShardFolder(config.data)).state_dict()
    after = load_run(trained.folder / "one_step").state_dict()
    moved = 0
    for name, weight in after.items():
        if ".experts." in name:
            for expert in range(len(weight)):
                # weight decay alone would move it by 1e-3 of itself, 1e-4 at most; an update moves single weights by the
                # rate, or somewhat less where gradients are as small as Adam's epsilon
                assert (weight[expert] - before[name][expert]).abs().max() > 4e-4, (name, expert)
                moved += 1
        elif ".router." in name or ".shared_experts." in name:
            assert (weight - before[name]).abs().max() > 1e-3, name
            moved += 1
    assert moved == 2 * (2 * 4 + 2 + 2)
