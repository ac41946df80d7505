"""The key `attention` chooses among the model's implementations, which train alike."""

import dataclasses

import pytest

from launcher.config import RunConfig
from launcher.config_file import load_run_config
from launcher.environment import Environment
from launcher.errors import ConfigurationError
from launcher.training.plan import make_plan
from launcher.training.preflight.findings import GREEN, RED
from launcher.training.preflight.machine import check_attention
from model.attention import IMPLEMENTATIONS

STEPS = 3


def test_the_key_names_every_implementation_of_the_model():
    (declared,) = (field.metadata["key"] for field in dataclasses.fields(RunConfig) if field.name == "attention")
    assert declared.one_of == ("auto", *IMPLEMENTATIONS)


def test_every_implementation_that_trains_here_has_the_same_curve(trainer):
    names = [
        name for name in ("auto", *IMPLEMENTATIONS) if check_attention(name, Environment(0, 1, 0, 1, "")).level == GREEN
    ]
    assert len(names) >= 4
    runs = [trainer.arguments(name, f"max_steps={STEPS}", f"attention={name}") for name in names]
    (process,) = trainer.run(1, *runs)
    for name in names:
        assert f"attention {'block_local' if name == 'auto' else name}\n" in process.stdout
        for tag, curve in trainer.scalars("auto").items():
            if tag.startswith("train/"):
                assert trainer.scalars(name)[tag] == pytest.approx(curve, rel=1e-3), (name, tag)


def test_another_name_is_refused_with_the_choices(trainer):
    with pytest.raises(ConfigurationError, match="attention is 'flash'; it must be 'auto' or 'block_local' or 'sdpa'"):
        load_run_config(trainer.config, ["attention=flash"])


def test_what_this_device_cannot_train_is_refused_before_the_start(trainer):
    here = Environment(0, 1, 0, 1, "")
    if here.device.type != "cpu":
        pytest.skip("flex attention trains on this device")
    assert check_attention("flex_attention", here).level == RED
    with pytest.raises(ConfigurationError, match="has no backward pass on a CPU; set attention=auto"):
        make_plan(
            str(trainer.config),
            [f"output={trainer.folder / 'flex'}", "attention=flex_attention"],
            str(trainer.fp32),
            here,
        )
