"""One rank of a test: train the given runs one after another, and record the gradients and weights of each.

Rank 0 writes `RUN/mathematics.pt`: the `gradients` of the steps in `GRADIENTS_OF` before clipping, and the `parameters`
after step `STEPS`. They have the plain model's names and shapes, however they were spread over the ranks.
"""

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_grad

import model.loss
import train
from data_pipeline.loading.loader import BatchStream
from launcher.training.resilience.leaving import end_process, leave_together

STEPS = 10
GRADIENTS_OF = (1, 2)
GLOBAL_ROWS, MICRO_ROWS = 8, 2
UNLABELLED_STEP, UNLABELLED, EMPTY = 2, range(4), range(4, 6)


def leave_labels_out(batches: list[dict[str, torch.Tensor]], first_row: int, pad: int) -> list[dict[str, torch.Tensor]]:
    """Remove the labels from half of a global batch's rows, and labels and text from two more.

    A rank then has no labels, on two ranks and on four. With two rows in a micro-batch, one micro-batch is all padding.
    """
    batches = [{name: rows.clone() for name, rows in batch.items()} for batch in batches]
    rows = (row for batch in batches for row in zip(*batch.values(), strict=True))
    for number, (ids, labels, positions) in enumerate(rows, start=first_row):
        if number in UNLABELLED or number in EMPTY:
            labels.fill_(-100)
        if number in EMPTY:
            ids.fill_(pad)
            positions.copy_(torch.arange(len(positions)))
    return batches


def leave_labels_out_of_one_step() -> None:
    step_at = BatchStream.step_at

    def changed(stream: BatchStream, position: int) -> list[dict[str, torch.Tensor]]:
        batches = step_at(stream, position)
        if position != (UNLABELLED_STEP - 1) * stream.global_batch_rows:
            return batches
        return leave_labels_out(
            batches, stream.rank * stream.accumulation * stream.micro_batch_rows, stream.data.pad_token_id
        )

    BatchStream.step_at = changed


def recording(build_engine, file: str):
    """Wrap `build_engine`: its engine records gradients and weights and writes them to `file`."""

    def build(*arguments, **options):
        engine = build_engine(*arguments, **options)
        kept = {"gradients": {}, "parameters": {}}
        take_step = engine.step

        def step(*arguments, **options):
            coming = engine.global_steps + 1
            if engine.is_gradient_accumulation_boundary() and coming in GRADIENTS_OF:
                kept["gradients"][coming] = whole(engine, safe_get_full_grad)
            result = take_step(*arguments, **options)
            if engine.global_steps == STEPS:
                kept["parameters"] = whole(engine, full_parameter)
                if dist.get_rank() == 0:
                    torch.save(kept, file)
            return result

        engine.step = step
        return engine

    return build


def full_parameter(parameter: torch.nn.Parameter) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.data.clone()


def whole(engine, full_tensor) -> dict[str, torch.Tensor]:
    """Return each parameter's whole tensor: `full_tensor` joins the data-parallel parts, this function those of experts."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        tensor = full_tensor(parameter).detach().float().contiguous()
        if ".experts.w" in name:
            group = groups._get_expert_parallel_group(parameter.group_name)
            slices = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
            dist.all_gather(slices, tensor, group=group)
            tensor = torch.cat(slices)
        tensors[name] = tensor.clone()
    return with_fused_experts(tensors)


def with_fused_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge AutoEP's w1 (gate), w3 (up) and w2 (down) into `gate_up_proj` and `down_proj`."""
    for name in [name for name in weights if name.endswith(".experts.w1")]:
        prefix = name.removesuffix("w1")
        gate, up = weights.pop(f"{prefix}w1"), weights.pop(f"{prefix}w3")
        weights[f"{prefix}gate_up_proj"] = torch.cat((gate, up), dim=1)
        weights[f"{prefix}down_proj"] = weights.pop(f"{prefix}w2")
    return weights


def main() -> None:
    leave_labels_out_of_one_step()
    model.loss.CHUNK_TOKENS = 50  # a loss in several chunks, so that the head's weight is gathered several times a step
    build_engine = train.build_engine
    for arguments in json.loads(sys.argv[1]):
        overrides = dict(override.split("=", 1) for override in train.parse_arguments(arguments).overrides)
        train.build_engine = recording(build_engine, f"{overrides['output']}/mathematics.pt")
        code = train.main(arguments)
        assert code == 0, f"{arguments} ended with {code}"
    leave_together()


if __name__ == "__main__":
    main()
    end_process(0)
