"""How fast `tiny` is beside transformers' `Lfm2Moe` of the same size: forward and backward, one thread.

    python -m tests.benchmarks model-step

The models and their losses are those of the quality benchmark. The models take turns; the optimizer is not measured.
"""

from __future__ import annotations

import functools

import torch

from tests.benchmarks.measurement import Options, Row, rates, seconds_of, take_turns
from tests.benchmarks.packed_rows import make_batch
from tests.benchmarks.quality_models import Trainee

ROWS, SEQ_LEN, VOCABULARY = 4, 512, 8192
REPEATS = 7
OTHERS = {"lfm2moe": "`Lfm2Moe`, 8 layers", "lfm2moe-6-layers": "`Lfm2Moe`, 6 wider layers"}


def measure(options: Options) -> list[Row]:
    """Measure tokens per second in fp32, and in bf16 on a CPU that computes it natively."""
    batch = make_batch(1 if options.quick else ROWS, SEQ_LEN, VOCABULARY)
    dtypes = [torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
    rows = []
    for dtype in dtypes:
        trainees = {name: Trainee(name, VOCABULARY, seed=0, dtype=dtype) for name in ("tiny", *OTHERS)}
        steps = {name: functools.partial(forward_and_backward, trainee, batch) for name, trainee in trainees.items()}
        take_turns(steps, 2)  # not counted: they allocate memory, and libraries choose their kernels
        seconds = take_turns(steps, options.repeats(REPEATS))
        speeds = {name: rates(batch["input_ids"].numel(), values) for name, values in seconds.items()}
        what = f"`tiny`, forward and backward in {str(dtype).removeprefix('torch.')}"
        rows += [Row(what, "tokens/s", speeds["tiny"], peer, speeds[name]) for name, peer in OTHERS.items()]
    return rows


def forward_and_backward(trainee: Trainee, batch: dict[str, torch.Tensor]) -> float:
    """Compute the loss and its gradients once; return the seconds."""
    trainee.model.zero_grad(set_to_none=True)
    return seconds_of(lambda: trainee.objective.loss(batch).backward())
