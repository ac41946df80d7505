"""The keys that a DeepSpeed JSON may have, and the values that this training loop supports.

DeepSpeed ignores unknown keys in some sections, crashes on them in others, and accepts values that change what is computed.
So a run refuses every key that is not listed here. A test trains with each listed key.
"""

from __future__ import annotations

import difflib
import json

from launcher.deepspeed_json import value_at
from launcher.errors import ConfigurationError

SECTIONS = ("optimizer", "zero_optimization", "fp16", "bf16", "expert_parallel", "activation_checkpointing")
# What AutoEP needs to know about the model in `model/`: where its experts are, and how its router works.
AUTOEP = {
    "moe_layer_pattern": r"model\.layers\.\d+\.moe",
    "router_pattern": "router",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "num_experts_attr": "num_experts",
    "top_k_attr": "num_experts_per_tok",
    "has_shared_experts": True,
    "shared_experts_pattern": "shared_experts",
    "score_func": "softmax",
    "score_apply": "post",
    "route_norm": True,
}
KEYS = {
    "": (
        *SECTIONS, "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "managed_gradient_accumulation", "gradient_allreduce_op", "prescale_gradients",
        "gradient_predivide_factor", "communication_data_type", "data_types", "use_data_before_expert_parallelism",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_python_gc", "steps_per_print", "log_level",
        "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers", "flops_profiler", "comms_logger",
    ),
    "zero_optimization": (
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights", "offload_optimizer",
        "offload_param", "sub_group_size", "round_robin_gradients", "parameter_alignment", "ignore_unused_parameters",
        "memory_efficient_linear", "log_trace_cache_warnings", "enable_sanity_checks", "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
        "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
    ),
    "zero_optimization.offload_optimizer": ("device", "pin_memory"),
    "zero_optimization.offload_param": ("device", "pin_memory"),
    "fp16": (
        "enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
        "min_loss_scale",
    ),
    "bf16": ("enabled",),
    "expert_parallel": ("enabled", "autoep_size", "use_grouped_mm", *AUTOEP),
    "activation_checkpointing": (
        "enabled", "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints",
        "synchronize_checkpoint_boundary", "profile",
    ),
    "optimizer": ("type", "params"),
    "optimizer.params": ("lr", "betas", "eps", "weight_decay", "torch_adam", "fused", "foreach", "adam_w_mode"),
}  # fmt: skip
# DeepSpeed's name (lower case) and the spelling in a JSON. Checkpoints of the other optimizers cannot be resumed on another
# number of ranks, and some of them have no CPU kernel.
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW"}
# Keys that DeepSpeed knows but this project does not support, and why.
NOT_TAKEN = {
    "scheduler": "a run sets the rate of each step from its own learning_rate, warmup_steps and schedule",
    "tensorboard": "a run writes its own TensorBoard figures",
    "wandb": "a run writes its own TensorBoard figures",
    "csv_monitor": "a run writes its own TensorBoard figures",
    "comet": "a run writes its own TensorBoard figures",
    "checkpoint": "a run saves its own checkpoints, as set by checkpoint_every and keep_checkpoints",
    "datastates_ckpt": "a run saves its own checkpoints, as set by checkpoint_every and keep_checkpoints",
    "data_efficiency": "the batches come from the run's own data",
    "dataloader_drop_last": "the batches come from the run's own data",
    "vocabulary_size": "it comes from the tokenizer",
    "moe": "the expert_parallel section distributes the experts",
    "pipeline": "pipeline parallelism is not implemented",
    "tensor_parallel": "tensor parallelism is not implemented",
    "sequence_parallel_size": "sequence parallelism is not implemented",
    "hybrid_engine": "it is for generation between training steps",
    "torch_autocast": "the precision is that of the weights, set by bf16 or fp16",
    "compile": "it is untested with this model",
    "zero_optimization.zero_hpz_partition_size": "it does not work with expert parallelism under ZeRO-3",
    "zero_optimization.zero_quantized_gradients": "it does not work with expert parallelism under ZeRO-3",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
}
# Keys with a single supported value, and why other values are refused.
FIXED = {
    "managed_gradient_accumulation": (True, "the optimizer would step after each micro-batch"),
    "gradient_allreduce_op": ("mean", "the loss is scaled for a mean over ranks"),
    "activation_checkpointing.partition_activations": (False, "it is for tensor parallelism"),
    "activation_checkpointing.cpu_checkpointing": (False, "DeepSpeed's checkpoint function fails with it"),
    "activation_checkpointing.contiguous_memory_optimization": (False, "it is for partitioned activations"),
    "zero_optimization.offload_optimizer.device": ("cpu", "only offloading to host memory is supported"),
    "zero_optimization.offload_param.device": ("cpu", "only offloading to host memory is supported"),
    **{f"expert_parallel.{key}": (value, "the model requires another value") for key, value in AUTOEP.items()},
}
# The same, under ZeRO-1 and 2 only.
FIXED_BELOW_3 = {
    "zero_optimization.contiguous_gradients": (True, "gradients of experts are wrong without it"),
    "zero_optimization.reduce_scatter": (True, "DeepSpeed requires it for experts under ZeRO-1 and 2"),
}
# The same, under ZeRO-2 and 3 only.
FIXED_ABOVE_1 = {
    "prescale_gradients": (False, "DeepSpeed supports it under ZeRO-1 only"),
    "gradient_predivide_factor": (1.0, "DeepSpeed supports it under ZeRO-1 only"),
}


def check_keys(content: dict, path: str) -> None:
    """Raise `ConfigurationError` for a key or value that is not supported."""
    for section, keys in KEYS.items():
        found = value_at(content, section) if section else content
        for key, value in found.items() if isinstance(found, dict) else ():
            is_off = isinstance(value, dict) and value.get("enabled") is False
            if key not in keys and not is_off:
                raise ConfigurationError(_refusal(f"{section}.{key}".lstrip("."), section, keys, path))
    stage = value_at(content, "zero_optimization.stage")
    fixed = FIXED | (FIXED_ABOVE_1 if stage in (2, 3) else {}) | (FIXED_BELOW_3 if stage in (1, 2) else {})
    for location, (allowed, why) in fixed.items():
        section, _, key = location.rpartition(".")
        found = value_at(content, section) if section else content
        if isinstance(found, dict) and key in found and found[key] != allowed:
            raise ConfigurationError(
                f"{location} is {json.dumps(found[key])} in {path}: {why}; remove it, or write {json.dumps(allowed)}"
            )


def _refusal(location: str, section: str, known: tuple[str, ...], path: str) -> str:
    if location in NOT_TAKEN:
        return f"{path} has {location}, which is not supported: {NOT_TAKEN[location]}; remove it"
    key = location.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"{path} has {location}, which is not a key that it may have; did you mean {f'{section}.{near[0]}'.lstrip('.')}?"
    return f"{path} has {location}, which is not supported: it is untested with this training loop; remove it"
