"""The sizes of a model that has every part and trains in seconds."""

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
    "deformable_taps": 3,
    "deformable_range": 6,
    "deformable_groups": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "memory_hidden_size": 12,
    "memory_num_layers": 2,
    "memory_stride": 4,
    "memory_every": 2,
    "embedding_components": 16,
    "embedding_temperature": 1.0,
}
