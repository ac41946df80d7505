"""Keys of the DeepSpeed JSON that AutoEP does not go with under ZeRO-3, by name, before a model is built."""

from __future__ import annotations

from launcher.errors import ConfigurationError
from launcher.settings.json_sections import value_at

# From DeepSpeed 0.19.8's engine, which refuses them only once the model and its process groups are there.
REFUSED_UNDER_ZERO_3 = {
    "sequence_parallel_size": (1, "sequence parallelism"),
    "zero_optimization.zero_hpz_partition_size": (1, "hpZ, a second copy of the weights in each node"),
    "zero_optimization.zero_quantized_gradients": (False, "quantized gradients"),
    "expert_parallel.expert_tensor_parallel_size": (1, "experts cut by tensor parallelism"),
    "tensor_parallel.autotp_size": (1, "tensor parallelism"),
    "moe": (None, "DeepSpeed's native mixture of experts"),
}


def refuse_json_keys(content: dict) -> None:
    """Raise `ConfigurationError` for the keys of a JSON with stage 3 and `expert_parallel` that cannot go with them."""
    if zero_stage(content) != 3 or not spreads_experts(content):
        return
    found = []
    for key, (harmless, meaning) in REFUSED_UNDER_ZERO_3.items():
        value = value_at(content, key)
        if value not in (None, harmless, "auto"):
            found.append(f"{key} ({meaning})")
    if found:
        raise ConfigurationError(
            f"the DeepSpeed JSON has {' and '.join(found)}, which expert parallelism under ZeRO-3 does not support; "
            "remove these keys, or take ds_configs/zero1_ep.json"
        )


def zero_stage(content: dict) -> int:
    """The ZeRO stage of a JSON; DeepSpeed's default is 0."""
    return value_at(content, "zero_optimization.stage") or 0


def spreads_experts(content: dict) -> bool:
    """Whether a JSON turns AutoEP on."""
    return bool(value_at(content, "expert_parallel.enabled"))
