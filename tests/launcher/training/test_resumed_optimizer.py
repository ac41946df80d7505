"""A resumed run's optimizer has its moments and steps from the checkpoint, and its settings from the user."""

import shutil

import pytest
import torch

STEPS, RESUMED_AT = 6, 3
COMMON = [f"schedule.steps={STEPS}", f"max_steps={STEPS}", "checkpoint_every=3", "expert_parallel_size=2"]


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 3], ids="zero_{}".format)
def stage(request, trainer):
    """An undisturbed run of two ranks, and a function that resumes a copy of it at step 3."""
    name = f"zero_{request.param}"
    path = trainer.deepspeed_config(name, zero_optimization={"stage": request.param})
    trainer.run(2, trainer.arguments(f"{name}_whole", *COMMON, deepspeed_config=path))

    def resumed(other: str, world_size: int, *changes: str) -> dict[int, float]:
        folder = trainer.folder / f"{name}_{other}"
        shutil.copytree(trainer.folder / f"{name}_whole", folder)
        common = [*COMMON, f"resume=step-{RESUMED_AT:08d}", *changes]
        trainer.run(world_size, trainer.arguments(folder.name, *common, deepspeed_config=path))
        return losses(trainer, folder.name)

    return trainer, losses(trainer, f"{name}_whole"), resumed, name


def losses(trainer, output: str) -> dict[int, float]:
    return trainer.scalars(output)["train/loss"]


def test_a_changed_weight_decay_applies_from_the_next_update_on(stage):
    _, whole, resumed, _ = stage
    decayed = resumed("decayed", 2, "weight_decay=50")
    assert decayed[RESUMED_AT + 1] == whole[RESUMED_AT + 1]  # the loss of the saved weights
    for step in range(RESUMED_AT + 2, STEPS + 1):
        assert decayed[step] != pytest.approx(whole[step], rel=1e-3), step


def test_a_changed_clipping_applies_from_the_next_update_on(stage):
    """Under ZeRO-1 DeepSpeed would use the checkpoint's value."""
    _, whole, resumed, _ = stage
    clipped = resumed("clipped", 2, "gradient_clipping=1e-9")  # so small that Adam's eps outweighs the gradients
    assert clipped[RESUMED_AT + 1] == whole[RESUMED_AT + 1]
    for step in range(RESUMED_AT + 2, STEPS + 1):
        assert clipped[step] != pytest.approx(whole[step], rel=1e-3), step


def test_on_the_same_number_of_ranks_resuming_is_exact(stage):
    _, whole, resumed, _ = stage
    assert resumed("same", 2) == whole


def test_on_another_number_of_ranks_adam_keeps_its_step_count(stage):
    trainer, whole, resumed, name = stage
    assert resumed("alone", 1) == pytest.approx(whole, rel=1e-5)
    steps = set()
    for file in (trainer.folder / f"{name}_alone" / "checkpoints" / f"step-{STEPS:08d}").glob("*optim_states.pt"):
        saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
        states = saved.get("optimizer_state_dict") or saved["base_optimizer_state"]
        steps |= {float(state["step"]) for state in states["state"].values()}
    assert steps == {float(STEPS)}
