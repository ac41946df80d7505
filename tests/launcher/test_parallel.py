"""The same mathematics whatever runs it: experts on one rank or spread over two, with DeepSpeed or without."""

import pytest
import torch

from data_pipeline.loader import BatchStream
from data_pipeline.shards import ShardFolder
from launcher.checkpoint import TrainState
from launcher.config import load_run_config
from launcher.export import load_run
from launcher.model_source import build_model
from launcher.schedule import learning_rate
from model.loss import total_loss

STEPS = 5
WAYS = {
    "expert_parallel_1": ["expert_parallel_size=1"],
    "expert_parallel_2": ["expert_parallel_size=2"],
    "expert_parallel_2_accumulated": ["expert_parallel_size=2", "micro_batch_rows=1"],
    "expert_parallel_2_without_recomputation": ["expert_parallel_size=2", "activation_checkpointing=false"],
}


@pytest.fixture(scope="module")
def trained(trainer):
    """Every way on two ranks, in one pair of processes; the first also keeps a checkpoint after one step."""
    runs = [trainer.arguments(name, *overrides) for name, overrides in WAYS.items()]
    one_step = trainer.arguments("one_step", "expert_parallel_size=2", "max_steps=1", f"schedule.steps={STEPS}")
    # A loss in several chunks, so that the head's weight is gathered several times a step.
    trainer.run(2, *runs, one_step, chunk_tokens=50)
    return trainer


@pytest.fixture(scope="module")
def plain(trainer):
    """Losses, gradient norms and final model of the same steps in plain PyTorch, one process, no DeepSpeed."""
    config = load_run_config(trainer.config)
    data = ShardFolder(config.data)
    model = build_model(config, data).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=config.weight_decay)
    stream = BatchStream(data, seed=config.seed, global_batch_rows=4, micro_batch_rows=4, rank=0, world_size=1,
                         loss_on=config.loss_on)  # fmt: skip
    sizes = model.config
    means = TrainState.initial(sizes.num_hidden_layers, sizes.num_experts, sizes.embedding_target_ratio).running_means
    losses, norms = [], []
    for step in range(STEPS):
        (batch,) = stream.next_step()
        supervised, text = (batch["labels"][:, 1:] != -100).sum(), (batch["input_ids"] != sizes.pad_token_id).sum()
        output = model(**batch, running_means=means)
        loss = total_loss(output.loss_sums, config.loss, supervised, text)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        means = means.updated(output.statistics["routing"] / text, output.statistics["retained_ratio"] / text)
        losses.append(loss.item())
    return losses, norms, model


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradient_norms_are_those_of_plain_pytorch(trained, plain, way):
    losses, norms, _ = plain
    scalars = trained.scalars(way)
    for tag, expected, tolerance in (("train/loss", losses, 1e-5), ("train/grad_norm", norms, 1e-4)):
        given = [scalars[tag][step] for step in range(1, STEPS + 1)]
        assert given == pytest.approx(expected, rel=tolerance), tag
    assert losses[0] != pytest.approx(losses[-1], rel=0.01)  # something was learned, so equality says something


@pytest.mark.parametrize("way", ["expert_parallel_1", "expert_parallel_2"])
def test_the_exported_weights_are_those_of_plain_pytorch(trained, plain, way):
    exported = load_run(trained.folder / way).state_dict()
    for name, parameter in plain[2].state_dict().items():
        torch.testing.assert_close(
            exported[name], parameter, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_every_expert_and_router_moves_in_one_step(trained):
    config = load_run_config(trained.config)
    before = build_model(config, ShardFolder(config.data)).state_dict()
    after = load_run(trained.folder / "one_step").state_dict()
    moved = 0
    for name, weight in after.items():
        if ".experts." in name:
            for expert in range(len(weight)):
                # weight decay alone would move it by 1e-3 of itself; an update moves single weights by the rate
                assert (weight[expert] - before[name][expert]).abs().max() > 1e-3, (name, expert)
                moved += 1
        elif ".router." in name or ".shared_experts." in name:
            assert (weight - before[name]).abs().max() > 1e-3, name
            moved += 1
    assert moved == 2 * (2 * 4 + 1 + 2)
