"""Fresh weights are the seed's, bit for bit, and only one rank holds them whole in fp32 during the start."""

import json
import sys

import pytest
import yaml

from tests.launcher.trainer import start
from tests.small_model import SIZES

BEGIN = """
import json, sys
from pathlib import Path
import deepspeed
import torch
import train
from launcher.config_file import load_run_config
from launcher.training.engine import start_process_group
from launcher.environment import detect_environment
from launcher.process import export_for_torch
from launcher.training.setup.data_source import open_run_data
from launcher.training.setup.deepspeed_config import resolve_deepspeed_config
from launcher.training.setup.model_source import build_model

def peak():
    # Not getrusage: a new process inherits the peak of the process that started it.
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

options = train.parse_arguments(sys.argv[1:])
environment = detect_environment()
export_for_torch(environment)
start_process_group(environment)
config = load_run_config(options.config, options.overrides)
data = open_run_data(config)
resolved, config, _ = resolve_deepspeed_config(options.deepspeed_config, config, environment, 4)
before = peak()
model = build_model(config, data, resolved)
rise = peak() - before
plain = build_model(config, data).state_dict()
differing = []
for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
    with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        if not torch.equal(tensor, plain.pop(name).to(tensor.dtype)):
            differing.append(name)
numbers = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
tied = all(name in model.all_tied_weights_keys for name in plain)
print("RESULT", json.dumps({"rise": rise, "whole": 4 * numbers, "differing": differing, "tied": tied}))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(3, "fp32"), (3, "bf16"), (1, "bf16")])
def test_fresh_weights_are_the_seeds_and_only_rank_0_holds_them_whole(trainer, tmp_path, stage, precision):
    """Whole means in fp32: under ZeRO-1 each rank trains with all weights, but in 16 bits."""
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump({**SIZES, "num_hidden_layers": 16, "moe_intermediate_size": 4000}))
    zero = json.loads(trainer.fp32.read_text())["zero_optimization"] | {"stage": stage}
    sections = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    path = trainer.deepspeed_config(f"{precision}_{stage}", zero_optimization=zero, **sections)
    arguments = trainer.arguments("begun", f"model={model}", "precision.force=true", deepspeed_config=path)
    results = start(2, [sys.executable, "-c", BEGIN, *arguments], patience=30)
    assert [result.returncode for result in results] == [0, 0], results[0].stdout
    first, second = (json.loads(result.stdout.split("RESULT ")[1].splitlines()[0]) for result in results)
    assert first["differing"] == second["differing"] == [] and first["tied"]
    assert first["rise"] > first["whole"] > 80e6
    assert second["rise"] < 0.8 * second["whole"], second
