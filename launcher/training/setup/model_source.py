"""The model that a run begins with: a preset, a YAML file, or an exported folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from data_pipeline.loading.reader import RowReader
from data_pipeline.tokens.tokenization import fingerprint
from launcher.config import RunConfig
from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.training.weight_broadcast import fill_from_rank_0
from launcher.weight_files import WeightFiles
from model import LiquidConfig, LiquidForCausalLM

TABLE = "model.embed_tokens.weight"


def model_config(config: RunConfig, data: RowReader, goes_on: RunFolder | None = None) -> LiquidConfig:
    """The sizes of the run's model: of the weights in `init_from`, or of `model`, sized for the data's tokenizer.

    goes_on: the run, where it has checkpoints. What it began with then counts, and of exported weights its own note of
    the sizes: their folder may be gone, and the checkpoint has what became of them.
    Raises `ConfigurationError` where the preset is unknown, the rows are longer than the model's positions, or the
    weights are for another tokenizer.
    """
    init_from = goes_on.began_with() if goes_on else config.init_from
    if init_from is not None:
        sizes = goes_on.model_config() if goes_on else _exported_sizes(Path(init_from), data)
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


def _exported_sizes(folder: Path, data: RowReader) -> LiquidConfig:
    """The configuration of an exported folder, once its weights and its tokenizer are found to go with it and the data."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigurationError(f"init_from={folder} is not a model folder; make one with `lfm export`")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != LiquidConfig.model_type:
            raise ConfigurationError(
                f"init_from={folder} is a model of the type {kind!r}; only {LiquidConfig.model_type!r} can be gone on with"
            )
        sizes = LiquidConfig.from_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"init_from={folder}: {' '.join(str(error).split())}") from error
    if not (folder / "tokenizer.json").is_file():
        raise ConfigurationError(
            f"init_from={folder} has no tokenizer.json, so that nobody knows its ids; export again"
        )
    if (
        fingerprint(AutoTokenizer.from_pretrained(folder).backend_tokenizer) != data.tokenizer_fingerprint
        or sizes.used_vocab_size != data.vocab_size
    ):
        raise ConfigurationError(
            f"{data.location} was made with another tokenizer than that of {folder}; prepare it with the "
            f"model's own: lfm prepare ... --tokenizer {folder}"
        )
    with torch.device("meta"):
        model = LiquidForCausalLM(sizes)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = WeightFiles(folder).shapes
    for name in sorted(wanted.keys() - model.all_tied_weights_keys.keys() | (found.keys() - wanted.keys())):
        if wanted.get(name) != found.get(name):
            raise ConfigurationError(
                f"init_from={folder}: {name} has the shape {found.get(name)} in its weights and {wanted.get(name)} by its "
                "config.json; the two are not of one export"
            )
    # An export's table has the tokens alone, a run's is rounded up.
    return sizes if sizes.vocab_size > sizes.used_vocab_size else sizes.sized_for(sizes.used_vocab_size)


def build_model(
    config: RunConfig, data: RowReader, resolved: dict | None = None, goes_on: RunFolder | None = None
) -> LiquidForCausalLM:
    """The model that a run begins with, of the weights in `init_from` or of fresh ones made from `seed`.

    With the resolved JSON all ranks call this together and have them from rank 0, as they are trained; without it they
    are whole, in fp32, in this process. Where the run `goes_on`, zeros await the checkpoint's.
    """
    sizes = model_config(config, data, goes_on)
    torch.manual_seed(config.seed)
    if resolved is not None:
        with torch.device("meta"):
            model = LiquidForCausalLM(sizes)
        read = None
        if dist.get_rank() == 0:
            read = _reader_of_zeros(model) if goes_on else _reader_of_initial_weights(config, sizes)
        model = fill_from_rank_0(model, read, resolved)
    elif config.init_from is None:
        model = LiquidForCausalLM(sizes)
    else:
        model = LiquidForCausalLM(sizes)
        read = _reader_of_initial_weights(config, sizes)
        model.load_state_dict(
            {name: read(name) for name in model.state_dict() if name not in model.all_tied_weights_keys}, strict=False
        )
    model.loss_weights = config.loss
    return model


def _reader_of_zeros(model: LiquidForCausalLM) -> Callable[[str], torch.Tensor]:
    """Give a function from a weight's name to zeros of its shape."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return lambda name: torch.zeros(shapes[name])


def _reader_of_initial_weights(config: RunConfig, sizes: LiquidConfig) -> Callable[[str], torch.Tensor]:
    """Give a function from a weight's name to the weight; each can be had once."""
    if config.init_from is not None:
        files = WeightFiles(Path(config.init_from))

        def read(name: str) -> torch.Tensor:
            tensor = files.read(name)
            if name != TABLE:
                return tensor
            return torch.nn.functional.pad(tensor, (0, 0, 0, sizes.vocab_size - len(tensor)))

        return read
    # All at once, as a seed's random numbers come one after another; what is taken from them is freed with its reader.
    return LiquidForCausalLM(sizes).state_dict().pop
