"""One rank of a test: train a run, then write its engine's logits for some tokens to `logits.pt` in the run folder."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train
from launcher.training.resilience.leaving import end_process, leave_together

TOKENS = torch.randint(4, 1900, (2, 40), generator=torch.Generator().manual_seed(0))


def main() -> None:
    arguments, engines, build = json.loads(sys.argv[1]), [], train.build_engine

    def build_and_keep(*given):
        engines.append(build(*given))
        return engines[-1]

    train.build_engine = build_and_keep
    assert train.main(arguments) == 0
    (engine,) = engines
    engine.eval()
    with torch.no_grad():
        logits = engine(TOKENS).logits
    if dist.get_rank() == 0:
        overrides = dict(override.split("=", 1) for override in train.parse_arguments(arguments).overrides)
        torch.save(logits, Path(overrides["output"]) / "logits.pt")
    leave_together()


if __name__ == "__main__":
    main()
    end_process(0)
