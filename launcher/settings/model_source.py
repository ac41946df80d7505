"""The model that a run begins with: a preset, a YAML file, or an exported folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from data_pipeline.loading.reader import RowReader
from data_pipeline.tokens.tokenization import fingerprint
from launcher.config import RunConfig
from launcher.errors import ConfigurationError
from model import LiquidConfig, LiquidForCausalLM


def model_config(config: RunConfig, data: RowReader) -> LiquidConfig:
    """The sizes of the run's model: of the weights in `init_from`, or of `model`, sized for the data's tokenizer.

    Raises `ConfigurationError` where the preset is unknown, the rows are longer than the model's positions, or the
    weights are for another tokenizer.
    """
    if config.init_from is not None:
        if not any(Path(config.init_from).glob("*.safetensors")):
            raise ConfigurationError(f"init_from={config.init_from} is not a model folder; make one with `lfm export`")
        sizes = LiquidConfig.from_pretrained(config.init_from)
        if fingerprint(AutoTokenizer.from_pretrained(config.init_from)) != data.tokenizer_fingerprint:
            raise ConfigurationError(
                f"{data.location} was made with another tokenizer than that of {config.init_from}; prepare it with the "
                f"model's own: lfm prepare ... --tokenizer {config.init_from}"
            )
    else:
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        try:
            sizes = LiquidConfig.from_preset(config.model).sized_for(data.vocab_size, **special)
        except (ValueError, TypeError) as error:  # the strict dataclass raises either for a value of a wrong type
            raise ConfigurationError(f"model {config.model}: {' '.join(str(error).split())}") from error
    if data.seq_len > sizes.max_position_embeddings:
        raise ConfigurationError(
            f"{data.location} has rows of {data.seq_len} tokens, but the model has {sizes.max_position_embeddings} "
            "positions; prepare shorter rows or take a model with more"
        )
    return sizes


def build_model(config: RunConfig, data: RowReader) -> LiquidForCausalLM:
    """The model that a run begins with; every rank makes the same weights, from `init_from` or from `seed`."""
    sizes = model_config(config, data)
    torch.manual_seed(config.seed)
    if config.init_from is not None:
        model = LiquidForCausalLM.from_pretrained(config.init_from, dtype=torch.float32)
    else:
        model = LiquidForCausalLM(sizes)
    model.loss_weights = config.loss
    return model
