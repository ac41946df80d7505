"""What checkpoints hold of weights and moments, compared bit for bit."""

import torch

from launcher.tools.export.export import load_run


def tensors(content, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in a nest of dictionaries and lists, by their path."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    found = {}
    for key, value in items:
        if isinstance(value, torch.Tensor | dict | list | tuple):
            found |= tensors(value, f"{name}.{key}")
    return found


def saved(folder, step: int) -> dict[str, torch.Tensor]:
    """Every tensor that all ranks saved of weights and moments at a step."""
    found = {}
    for path in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.pt")):
        # Buffers hold the balancing bias, which moves with the routers' choices and not with gradients.
        state = {
            name: value
            for name, value in tensors(torch.load(path, weights_only=False)).items()
            if "e_score_correction_bias" not in name
        }
        found |= {f"{path.name}{name}": value for name, value in state.items()}
    assert any("exp_avg" in name for name in found)
    return found


def differing(folder, step: int, other: int) -> list[str]:
    first, second = saved(folder, step), saved(folder, other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def differing_runs(folder, other, step: int) -> list[str]:
    """The weights and moments that are not the same bits in the last checkpoints of two runs.

    fp32_flat_groups are the weights again, but with padding at their ends, which DeepSpeed leaves as it finds it.
    """
    weights = [load_run(run).state_dict() for run in (folder, other)]
    states = [{k: v for k, v in saved(run, step).items() if "fp32_flat_groups" not in k} for run in (folder, other)]
    differing = []
    for first, second in (weights, states):
        assert first.keys() == second.keys()
        differing += [name for name, value in first.items() if not torch.equal(value, second[name])]
    return differing
