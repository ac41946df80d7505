"""How fast is a step of torch's fused AdamW, the optimizer of ds_configs/, beside others on the same parameters?

    python -m tests.benchmarks optimizer

DeepSpeed's own FusedAdam is compared only if it is compiled already, which takes a C++ compiler and two minutes.
"""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import functools
import os
from pathlib import Path

import torch

from launcher.environment import detect_environment
from launcher.process import export_for_torch
from model import LiquidConfig, LiquidForCausalLM
from tests.benchmarks.measurement import Goal, Options, Row, rates, seconds_of, take_turns

VOCABULARY = 50_266  # LED's
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WARM_UP, REPEATS = 3, 40


def measure(options: Options) -> list[Row]:
    """Measure steps per second of `tiny` in fp32, one thread."""
    missing = ""
    optimizers = {
        "ours": torch.optim.AdamW(parameters(), **SETTINGS, fused=True),
        "torch": torch.optim.AdamW(parameters(), **SETTINGS, foreach=True),
    }
    if is_compiled("fused_adam"):
        from deepspeed.ops.adam import FusedAdam

        optimizers["deepspeed"] = FusedAdam(parameters(), **SETTINGS)
    else:
        missing = "its operator is not compiled here"
    steps = {name: functools.partial(seconds_of, optimizer.step) for name, optimizer in optimizers.items()}
    take_turns(steps, WARM_UP)
    speeds = {name: rates(1, seconds) for name, seconds in take_turns(steps, options.repeats(REPEATS)).items()}
    ours = "AdamW step of `tiny`, torch's fused", "steps/s", speeds["ours"]
    return [
        Row(*ours, "`torch.optim.AdamW(foreach=True)`", speeds["torch"]),
        Row(*ours, "DeepSpeed's FusedAdam", speeds.get("deepspeed", ()), Goal(at_least=0.95), missing),
    ]


def parameters() -> list[torch.nn.Parameter]:
    """Return parameters of the model's shapes, with gradients."""
    with torch.device("meta"):
        model = LiquidForCausalLM(LiquidConfig.from_preset("tiny").sized_for(VOCABULARY))
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(each.shape, generator=generator)) for each in model.parameters()]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def is_compiled(operator: str) -> bool:
    """Whether DeepSpeed's operator is compiled in this environment."""
    export_for_torch(detect_environment())
    return any(Path(os.environ.get("TORCH_EXTENSIONS_DIR", "")).glob(f"{operator}/*.so"))
