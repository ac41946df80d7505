"""In a real bf16 engine the balancing bias keeps its small updates, which bf16 would round away."""

import json
import sys

import pytest

from tests import fork_server

STEPS, RATE = 100, 1e-3
MEASURE = """
import json, sys
import torch
import train
from data_pipeline.loading.reader import ShardFolder
from launcher.config_file import load_run_config
from launcher.training.setup.deepspeed_config import resolve_deepspeed_config
from launcher.training.engine import build_engine, start_process_group
from launcher.environment import detect_environment
from launcher.process import export_for_torch
from launcher.training.setup.model_source import build_model
from model.moe import balancing_bias, choose_experts, set_balancing_bias, updated_balancing_bias

steps, rate = int(sys.argv[1]), float(sys.argv[2])
options = train.parse_arguments(sys.argv[3:])
environment = detect_environment()
export_for_torch(environment)
start_process_group(environment)
config = load_run_config(options.config, options.overrides)
model = build_model(config, ShardFolder(config.data))
resolved, *_ = resolve_deepspeed_config(options.deepspeed_config, config, environment, model.config.num_experts)
engine = build_engine(model, resolved)
router = engine.module.model.layers[0].moe.router

bias = 0.5 + balancing_bias(engine.module)  # where neighbouring bf16 numbers are 4e-3 apart
load = torch.tensor([[3.0, 0, 0, 0]]).repeat(2, 1)
for _ in range(steps):
    bias = updated_balancing_bias(bias, load, rate)
    set_balancing_bias(engine.module, bias)

seen = []
router.register_forward_hook(lambda module, inputs, output: seen.append((module.gate(inputs[0]), output[1])))
ids = torch.randint(4, 1900, (4, 64), generator=torch.Generator().manual_seed(0))
output = engine(input_ids=ids, labels=ids)
logits, chosen = seen[0]
probabilities = logits.float().softmax(-1)
expected = choose_experts(probabilities, bias[0], 2)
unbiased = choose_experts(probabilities, torch.zeros(4), 2)
print("RESULT", json.dumps({
    "weights": str(logits.dtype),
    "router": type(router).__name__,
    "bias": router.e_score_correction_bias.tolist(),
    "chosen_as_expected": torch.equal(chosen, expected),
    "load": output.statistics["load"][0].tolist(),
    "counted": chosen.flatten().bincount(minlength=4).tolist(),
    "unbiased": unbiased.flatten().bincount(minlength=4).tolist(),
}))
"""


@pytest.fixture(scope="module")
def measured(trainer) -> dict:
    deepspeed_config = trainer.deepspeed_config("bf16", bf16={"enabled": True})
    arguments = trainer.arguments(
        "bf16", "activation_checkpointing=false", "precision.force=true", deepspeed_config=deepspeed_config
    )
    command = [sys.executable, "-c", MEASURE, str(STEPS), str(RATE), *arguments]
    result = fork_server.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.split("RESULT", 1)[1].splitlines()[0])


def test_a_hundred_small_updates_of_the_bias_reach_a_router_in_bf16(measured):
    assert (measured["weights"], measured["router"]) == ("torch.bfloat16", "TokenChoiceTopKRouter")
    away, towards = -1.5 * RATE * STEPS, 0.5 * RATE * STEPS
    assert measured["bias"] == pytest.approx([0.5 + away, *[0.5 + towards] * 3], abs=1e-5)


def test_the_router_chooses_with_the_bias_and_the_load_counts_its_choices(measured):
    assert measured["chosen_as_expected"]
    assert measured["load"] == measured["counted"]
    assert measured["counted"][0] < measured["unbiased"][0] / 2
