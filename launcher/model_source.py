"""The model that a run begins with: a preset, a YAML file, or an exported folder."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline.shards import ShardFolder
from launcher.config import RunConfig
from launcher.errors import ConfigurationError
from model import LiquidConfig, LiquidForCausalLM


def build_model(config: RunConfig, data: ShardFolder) -> LiquidForCausalLM:
    """The model of `config.model`, sized for the data's tokenizer, or the weights in `config.init_from`.

    Every rank makes the same weights from `config.seed`. Raises `ConfigurationError` where the preset is unknown, the
    rows are longer than the model's positions, or the weights are for another vocabulary.
    """
    torch.manual_seed(config.seed)
    if config.init_from is not None:
        if not (Path(config.init_from) / "config.json").is_file():
            raise ConfigurationError(f"init_from={config.init_from} is not a model folder; make one with `lfm export`")
        model = LiquidForCausalLM.from_pretrained(config.init_from, dtype=torch.float32)
        if model.config.used_vocab_size != data.vocab_size:
            raise ConfigurationError(
                f"{config.init_from} knows {model.config.used_vocab_size} tokens and {config.data} was made with "
                f"{data.vocab_size}; prepare the data with that model's tokenizer (lfm prepare --tokenizer)"
            )
    else:
        try:
            model_config = LiquidConfig.from_preset(config.model).sized_for(data.vocab_size)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        model = LiquidForCausalLM(model_config)
    model.loss_weights = config.loss
    if data.seq_len > model.config.max_position_embeddings:
        raise ConfigurationError(
            f"{config.data} has rows of {data.seq_len} tokens, but the model has {model.config.max_position_embeddings} "
            "positions; prepare shorter rows or take a model with more"
        )
    return model
