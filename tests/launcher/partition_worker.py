"""One rank of a test: load a folder's weights as `init_from` does under ZeRO-3, and print the memory that it takes."""

import gc
import json
import sys
from pathlib import Path

import torch

from launcher.environment import detect_environment
from launcher.process import export_for_torch
from launcher.training.engine import build_engine, start_process_group
from launcher.training.weight_broadcast import fill_from_rank_0
from launcher.weight_files import WeightFiles
from model import LiquidConfig, LiquidForCausalLM


def resident(field: str) -> int:
    """Return the bytes of this process in memory now (`VmRSS`) or at its peak (`VmHWM`), mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main() -> None:
    folder, resolved = Path(sys.argv[1]), json.loads(sys.argv[2])
    environment = detect_environment()
    export_for_torch(environment)
    start_process_group(environment)
    before = resident("VmRSS")
    with torch.device("meta"):
        model = LiquidForCausalLM(LiquidConfig.from_pretrained(folder))
    model = fill_from_rank_0(model, WeightFiles(folder).read, resolved)
    engine = build_engine(model, resolved)
    peak = resident("VmHWM")
    gc.collect()
    held = sum(parameter.ds_tensor.nbytes for parameter in engine.module.parameters())
    print(json.dumps({"before": before, "peak": peak, "held": held}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
