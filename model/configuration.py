"""The model's configuration: every size that shapes a parameter, validated on construction."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from model.cache import LAYER_TYPE, NUMBER_OF_STATES

PRESET_FOLDER = Path(__file__).parent / "configs"
VOCABULARY_MULTIPLE = 128
BLOCK_LOCAL = "block_local"  # the attention function that model/attention.py registers
AT_LEAST_ONE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "deformable_taps", "deformable_groups", "moe_intermediate_size", "shared_expert_intermediate_size",
    "memory_hidden_size", "memory_num_layers", "memory_stride", "memory_every", "embedding_components",
)  # fmt: skip
# With 1, a component would see only the current token and its cache would be empty. For max_position_embeddings, the
# embedding divides by its logarithm.
AT_LEAST_TWO = ("sliding_window", "deformable_range", "embedding_kernel_size", "max_position_embeddings")
POSITIVE = ("rms_norm_eps", "rope_theta", "embedding_temperature")
EXPERT_SIZES = ("hidden_size", "moe_intermediate_size")
EXPERT_MULTIPLE = 8  # 8 bf16 values are 16 bytes
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@strict
class LiquidConfig(PreTrainedConfig):
    """Sizes of a Liquid Foundation Model.

    Two numbers describe the vocabulary. `used_vocab_size` is the number of tokens that the tokenizer knows. `vocab_size`
    is the number of rows of the table and the head: in training, `used_vocab_size` rounded up to a multiple of 128; in
    an exported folder, `used_vocab_size` itself. Ids from `used_vocab_size` upwards get a logit lower than any token's.

    Raises `ValueError`, naming the fix, if the sizes do not fit together.
    """

    model_type = "liquid"
    keys_to_ignore_at_inference = ["past_key_values", "loss_sums", "statistics"]

    vocab_size: int = 50304
    used_vocab_size: int | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 12
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    # attention
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    sliding_window: int = 512
    rope_theta: float = 10_000.0

    # deformable convolution
    deformable_taps: int = 4
    deformable_range: int = 16
    deformable_groups: int = 8

    # mixture of experts
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 1024
    shared_expert_intermediate_size: int = 512

    # LSTM memory
    memory_hidden_size: int = 256
    memory_num_layers: int = 2
    memory_stride: int = 16
    memory_every: int = 4

    # adaptively compressed embedding
    embedding_kernel_size: int = 4
    embedding_components: int = 512
    embedding_minimum_ratio: float = 0.25
    embedding_target_ratio: float = 0.75
    embedding_temperature: float = 4.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.used_vocab_size is None:
            self.used_vocab_size = self.vocab_size
        super().__post_init__(attn_implementation=kwargs.pop("attn_implementation", None) or BLOCK_LOCAL, **kwargs)
        self._validate()

    @property
    def token_count(self) -> int:
        """The number of tokens that the tokenizer knows: `used_vocab_size`, which is set on construction."""
        return self.vocab_size if self.used_vocab_size is None else self.used_vocab_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer, from which transformers' caches derive its states (model/cache.py)."""
        return [LAYER_TYPE] * self.num_hidden_layers

    @property
    def number_of_conv_states(self) -> int:
        """The number of convolution and recurrent states that transformers' caches allocate in each layer."""
        return NUMBER_OF_STATES

    @classmethod
    def from_preset(cls, name_or_path: str, **overrides: Any) -> LiquidConfig:
        """Read a preset (model/configs) or a YAML file of fields; keyword arguments override both.

        Raises `ValueError` if there is no such preset or file, or if the file is invalid or sets an unknown field.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = PRESET_FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            raise ValueError(
                f"model {name_or_path!r} is neither a preset ({', '.join(preset_names())}) nor an existing YAML file; "
                "name a preset or give the path of a YAML file with model fields"
            )
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must be a mapping of model fields to values")
        fields = {**content, **overrides}
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"{path} sets {', '.join(unknown)}, unknown to the model; remove or rename it")
        return cls(**fields)

    def sized_for(self, used_vocab_size: int, **overrides: Any) -> LiquidConfig:
        """Return a copy whose table fits a tokenizer of `used_vocab_size` tokens (rounded up to 128)."""
        padded = -(-used_vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        fields = {name: getattr(self, name) for name in own_fields()}
        return type(self)(**{**fields, "vocab_size": padded, "used_vocab_size": used_vocab_size, **overrides})

    def _validate(self) -> None:
        self._validate_ranges()
        self._validate_multiples()
        self._validate_special_ids()

    def _validate_ranges(self) -> None:
        for least, names in ((1, AT_LEAST_ONE), (2, AT_LEAST_TWO)):
            for name in names:
                require(getattr(self, name) >= least, f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in POSITIVE:
            value = getattr(self, name)
            require(0.0 < value < math.inf, f"{name} is {value}; it must be a finite number above 0")
        require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and num_experts ({self.num_experts})",
        )
        require(
            0 < self.token_count <= self.vocab_size,
            f"used_vocab_size ({self.used_vocab_size}) must lie between 1 and vocab_size ({self.vocab_size})",
        )
        require(
            0.0 <= self.embedding_minimum_ratio < self.embedding_target_ratio < 1.0,
            f"embedding_minimum_ratio ({self.embedding_minimum_ratio}) must be below embedding_target_ratio "
            f"({self.embedding_target_ratio}), and both must lie in [0, 1)",
        )

    def _validate_multiples(self) -> None:
        for divided, divisor in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
            ("hidden_size", "deformable_groups"),
        ):
            quotient, rest = divmod(getattr(self, divided), getattr(self, divisor))
            require(
                rest == 0 and quotient > 0,
                f"{divided} ({getattr(self, divided)}) must be a multiple of {divisor} ({getattr(self, divisor)})",
            )
        require(
            self.head_dim % 2 == 0,
            f"hidden_size / num_attention_heads is {self.head_dim}; it must be even for the rotary positions",
        )
        for name in EXPERT_SIZES:
            require(
                getattr(self, name) % EXPERT_MULTIPLE == 0,
                f"{name} ({getattr(self, name)}) must be a multiple of {EXPERT_MULTIPLE}: the experts' grouped matrix "
                "product needs rows of a multiple of 16 bytes",
            )

    def _validate_special_ids(self) -> None:
        last = self.token_count - 1
        for name in SPECIAL_IDS:
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                require(
                    token is None or 0 <= token <= last,
                    f"{name} ({token}) must lie between 0 and used_vocab_size - 1 ({last}); use the tokenizer's id or None",
                )


def require(condition: bool, message: str) -> None:
    """Raise `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def own_fields() -> list[str]:
    """List the fields that `LiquidConfig` adds or redefines, in order."""
    return [name for name in LiquidConfig.__annotations__ if name in LiquidConfig.__dataclass_fields__]


def preset_names() -> list[str]:
    """List the presets that `from_preset` knows."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))
