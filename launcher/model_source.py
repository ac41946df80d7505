"""The model that a run begins with: a preset, a YAML file, or an exported folder."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline.shards import ShardFolder
from launcher.config import RunConfig
from launcher.errors import ConfigurationError
from model import LiquidConfig, LiquidForCausalLM


def model_config(config: RunConfig, data: ShardFolder) -> LiquidConfig:
    """The sizes of the run's model: of the weights in `init_from`, or of `model`, sized for the data's tokenizer.

    Raises `ConfigurationError` where the preset is unknown, the rows are longer than the model's positions, or the
    weights are for another vocabulary.
    """
    if config.init_from is not None:
        if not (Path(config.init_from) / "config.json").is_file():
            raise ConfigurationError(f"init_from={config.init_from} is not a model folder; make one with `lfm export`")
        sizes = LiquidConfig.from_pretrained(config.init_from)
        if sizes.used_vocab_size != data.vocab_size:
            raise ConfigurationError(
                f"{config.init_from} knows {sizes.used_vocab_size} tokens and {config.data} was made with "
                f"{data.vocab_size}; prepare the data with that model's tokenizer (lfm prepare --tokenizer)"
            )
    else:
        try:
            sizes = LiquidConfig.from_preset(config.model).sized_for(data.vocab_size)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
    if data.seq_len > sizes.max_position_embeddings:
        raise ConfigurationError(
            f"{config.data} has rows of {data.seq_len} tokens, but the model has {sizes.max_position_embeddings} "
            "positions; prepare shorter rows or take a model with more"
        )
    return sizes


def build_model(config: RunConfig, data: ShardFolder) -> LiquidForCausalLM:
    """The model that a run begins with; every rank makes the same weights, from `init_from` or from `seed`."""
    sizes = model_config(config, data)
    torch.manual_seed(config.seed)
    if config.init_from is not None:
        model = LiquidForCausalLM.from_pretrained(config.init_from, dtype=torch.float32)
    else:
        model = LiquidForCausalLM(sizes)
    model.loss_weights = config.loss
    return model
