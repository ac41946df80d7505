"""Activation checkpointing recomputes layers and lowers the memory of a step."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # test_same_mathematics.py has fast tests with recomputation

MEASURE = """
import gc, json, sys
import torch
import train
from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.reader import ShardFolder
from launcher.config_file import load_run_config
from launcher.training.setup.deepspeed_config import resolve_deepspeed_config
from launcher.training.engine import build_engine, start_process_group
from launcher.environment import detect_environment
from launcher.process import export_for_torch
from launcher.training.setup.model_source import build_model

options = train.parse_arguments(sys.argv[1:])
environment = detect_environment()
export_for_torch(environment)
start_process_group(environment)
config = load_run_config(options.config, options.overrides)
data = ShardFolder(config.data)
model = build_model(config, data)
resolved, config, _ = resolve_deepspeed_config(options.deepspeed_config, config, environment, model.config.num_experts)
engine = build_engine(model, resolved)
forwards = 0
def count(*_):
    global forwards
    forwards += 1
for layer in engine.module.model.layers:
    layer.attention.register_forward_pre_hook(count)
ids = torch.randint(4, 1900, (8, 512), generator=torch.Generator().manual_seed(0))
saved = 0
def pack(tensor):
    global saved
    saved += tensor.nbytes
    return tensor
with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
    loss = engine(input_ids=ids, labels=ids).loss
kept = saved
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak after the forward: what remains is kept for the backward
loss_value = loss.item()
engine.backward(loss)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("RESULT", json.dumps({"forwards": forwards, "kept": kept, "loss": loss_value,
                            "peak": int(status["VmHWM"].split()[0]) * 1024}))
"""


@pytest.fixture(scope="module")
def measured(trainer):
    results = {}
    for recompute in ("true", "false"):
        arguments = trainer.arguments("memory", f"activation_checkpointing={recompute}", "model=tiny")
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed tensors go back to the system at once
        )
        assert result.returncode == 0, result.stdout + result.stderr
        results[recompute] = json.loads(result.stdout.split("RESULT", 1)[1].splitlines()[0])
    return results


def test_every_layer_is_recomputed_in_the_backward_pass(measured):
    layers = 4
    assert measured["true"]["forwards"] == 2 * layers
    assert measured["false"]["forwards"] == layers


def test_the_loss_is_the_same(measured):
    assert measured["true"]["loss"] == pytest.approx(measured["false"]["loss"], rel=1e-6)


def test_less_is_kept_for_the_backward_pass_and_the_peak_is_lower(measured):
    assert measured["true"]["kept"] < measured["false"]["kept"] / 3
    assert measured["true"]["peak"] < measured["false"]["peak"] - 100e6
