"""Compare the weights and moments in checkpoints bit for bit."""

import torch

from launcher.tools.export.export import load_run


def tensors(content, name: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors in nested dictionaries and lists, by their path."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    found = {}
    for key, value in items:
        if isinstance(value, torch.Tensor | dict | list | tuple):
            found |= tensors(value, f"{name}.{key}")
    return found


def saved(folder, step: int) -> dict[str, torch.Tensor]:
    """Return the weights and moments that all ranks saved at a step."""
    found = {}
    for path in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.pt")):
        # The balancing bias is left out: it follows the routers' choices and not the gradients.
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
    """Return the names of weights and moments that differ in the last checkpoints of two runs.

    fp32_flat_groups is left out: it holds the weights again, with padding at the end that DeepSpeed does not initialise.
    """
    weights = [load_run(run).state_dict() for run in (folder, other)]
    states = [{k: v for k, v in saved(run, step).items() if "fp32_flat_groups" not in k} for run in (folder, other)]
    differing = []
    for first, second in (weights, states):
        assert first.keys() == second.keys()
        differing += [name for name, value in first.items() if not torch.equal(value, second[name])]
    return differing
