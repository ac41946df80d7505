"""Keys inside the sections of a DeepSpeed JSON: known ones, and values that this training loop can take.

DeepSpeed ignores unknown keys of some sections, answers those of others with a traceback, and takes values that change what
is computed. A wrong key ends a run here, by its name.
"""

from __future__ import annotations

import difflib
import json

from launcher.errors import ConfigurationError

# Of DeepSpeed 0.19.8's AutoEP (module_inject/auto_ep_config.py), without `load_balance_coeff`, which it refuses itself.
EXPERT_PARALLEL = (
    "async_split_plan", "autoep_size", "combine_impl", "comm_backend", "comm_max_tokens_per_rank", "comm_num_sm",
    "comm_qp_margin", "disable_triton_grouped_mm", "enabled", "expert_activation", "expert_pattern",
    "expert_tensor_parallel_size", "expert_w1", "expert_w2", "expert_w3", "gate_up_impl", "has_shared_experts",
    "load_balance_coeff", "moe_layer_pattern", "num_expert_groups", "num_experts_attr", "num_limited_groups", "preset_model",
    "route_norm", "route_scale", "routed_scaling_factor", "router_pattern", "row_weighting_impl", "score_apply", "score_func",
    "shared_experts_gate_pattern", "shared_experts_pattern", "top_k", "top_k_attr", "use_grouped_mm",
    "validate_folding_routing",
)  # fmt: skip
ACTIVATION_CHECKPOINTING = (
    "enabled", "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints",
    "synchronize_checkpoint_boundary", "profile",
)  # fmt: skip
OPTIMIZER = ("type", "params", "legacy_fusion")
ADAM = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
    "torch_adam", "adam_w_mode", "bias_correction", "set_grad_none", "fp32_optimizer_states",
)  # fmt: skip
# The only value that goes with this loop, and what another one would do.
FIXED = {
    "managed_gradient_accumulation": (True, "each micro-batch would be a step of the optimizer"),
    "gradient_allreduce_op": ("mean", "the loss is scaled for a mean over the ranks"),
    "pipeline": (None, "the model is not cut into stages"),
    "weight_quantization": (None, "nothing would be quantized"),
    "hybrid_engine": (None, "it is for inference between steps"),
    "compile.deepcompile": (False, "it was never run with this model"),
    "activation_checkpointing.partition_activations": (False, "it is for tensor parallelism"),
    "activation_checkpointing.cpu_checkpointing": (False, "DeepSpeed's checkpoint function fails with it here"),
    "activation_checkpointing.contiguous_memory_optimization": (False, "it is for partitioned activations"),
}


def check_sections(content: dict, path: str) -> None:
    """Raise `ConfigurationError` for a key that its section does not have, and for a value that the loop cannot take."""
    for location, (allowed, why) in FIXED.items():
        value = value_at(content, location)
        if value is not None and value != allowed:
            fix = "leave it out" if allowed is None else f"leave it out, or write {json.dumps(allowed)}"
            raise ConfigurationError(f"{location} is {json.dumps(value)} in {path}: {why}; {fix}")
    for section, known in _known_keys(content).items():
        for key in value_at(content, section) or {}:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ConfigurationError(
                    f"{path} has {section}.{key}, which is no key of that section; did you mean {section}.{nearest}?"
                )


def _known_keys(content: dict) -> dict[str, tuple[str, ...]]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {
        "expert_parallel": EXPERT_PARALLEL,
        "activation_checkpointing": ACTIVATION_CHECKPOINTING,
        "optimizer": OPTIMIZER,
        "zero_optimization": _fields(DeepSpeedZeroConfig),
        "fp16": _fields(DeepSpeedFP16Config),
        "bf16": _fields(DeepSpeedBF16Config),
    }
    if str(value_at(content, "optimizer.type")).lower() in ("adam", "adamw"):
        known["optimizer.params"] = ADAM
    return known


def _fields(model) -> tuple[str, ...]:
    """The names and aliases that one of DeepSpeed's own sections takes."""
    fields = model.model_fields
    return (*fields, *(field.alias for field in fields.values() if field.alias))


def value_at(content: dict, location: str):
    """Give the value at `section.key`; None if it is not there."""
    for part in location.split("."):
        if not isinstance(content, dict) or part not in content:
            return None
        content = content[part]
    return content
