"""The model that a run starts with: a preset, a YAML file, or an exported folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from data_pipeline.loading.row_reader import RowReader
from data_pipeline.tokens.tokenization import fingerprint
from launcher.config import RunConfig
from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.training.weight_broadcast import fill_from_rank_0
from launcher.weight_files import WeightFiles
from model import LiquidConfig, LiquidForCausalLM
from model.loss import LossWeights

TABLE = "model.embed_tokens.weight"


def model_config(config: RunConfig, data: RowReader, goes_on: RunFolder | None = None) -> LiquidConfig:
    """Return the sizes of the run's model: those of `init_from`, or of `model` with the vocabulary of the data's tokenizer.

    goes_on: the run, if it has checkpoints. It then keeps what it started with. If that was an exported folder, its sizes
    are read from the run folder, since the exported one may be gone.
    Raises `ConfigurationError` if the preset is unknown, the rows are longer than the model's positions, or the weights
    are for another tokenizer.
    """
    init_from = goes_on.began_with() if goes_on else config.init_from
    if init_from is not None:
        sizes = goes_on.model_config() if goes_on else _exported_sizes(Path(init_from), data)
    else:
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        preset = preset_sizes(config.model)
        with _model_errors(f"model {config.model}"):
            sizes = preset.sized_for(data.vocab_size, **special)
    if data.seq_len > sizes.max_position_embeddings:
        raise ConfigurationError(
            f"{data.location} has rows of {data.seq_len} tokens, but the model has {sizes.max_position_embeddings} "
            "positions; prepare shorter rows, or use a model with more positions"
        )
    return sizes


def preset_sizes(name_or_path: str) -> LiquidConfig:
    """Return the sizes of a preset or YAML file as it stands. Raises `ConfigurationError` if it is unknown or invalid."""
    with _model_errors(f"model {name_or_path}"):
        return LiquidConfig.from_preset(name_or_path)


@contextmanager
def _model_errors(what: str) -> Iterator[None]:
    """Turn the errors of a model's configuration into a `ConfigurationError` that names `what`."""
    try:
        yield
    except (ValueError, TypeError) as error:  # the strict dataclass raises one of these for a value of the wrong type
        raise ConfigurationError(f"{what}: {' '.join(str(error).split())}") from error


def _exported_sizes(folder: Path, data: RowReader) -> LiquidConfig:
    """Return the configuration of an exported folder, after checking that its weights and tokenizer fit it and the data."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigurationError(f"init_from={folder} is not a model folder; create one with `lfm export`")
    with _model_errors(f"init_from={folder}"):
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != LiquidConfig.model_type:
            raise ConfigurationError(
                f"init_from={folder} has model_type {kind!r}; use a folder exported by this project "
                f"(model_type {LiquidConfig.model_type!r})"
            )
        sizes = LiquidConfig.from_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigurationError(
            f"init_from={folder} has no tokenizer.json, so the meaning of its token ids is unknown; export it again"
        )
    if (
        fingerprint(AutoTokenizer.from_pretrained(folder).backend_tokenizer) != data.tokenizer_fingerprint
        or sizes.used_vocab_size != data.vocab_size
    ):
        raise ConfigurationError(
            f"{data.location} was prepared with another tokenizer than that of init_from={folder}; prepare it with the "
            f"model's tokenizer (lfm prepare ... --tokenizer {folder})"
        )
    with torch.device("meta"):
        model = LiquidForCausalLM(sizes)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = WeightFiles(folder).shapes
    for name in sorted(wanted.keys() - model.all_tied_weights_keys.keys() | (found.keys() - wanted.keys())):
        if wanted.get(name) != found.get(name):
            raise ConfigurationError(
                f"init_from={folder}: {name} has the shape {found.get(name)} in its weights and {wanted.get(name)} by its "
                "config.json; use the files of a single export"
            )
    # An exported embedding table has a row for each token only; a run's table is rounded up.
    return sizes if sizes.vocab_size > sizes.used_vocab_size else sizes.sized_for(sizes.used_vocab_size)


def build_model(
    config: RunConfig, data: RowReader, resolved: dict | None = None, goes_on: RunFolder | None = None
) -> LiquidForCausalLM:
    """Build the model that a run starts with, with the weights in `init_from` or fresh ones from `seed`.

    resolved: the resolved JSON. All ranks then call this together and receive the weights from rank 0, in the precision
    and partitioning of training. Without it the weights are whole, in fp32, in this process.
    goes_on: the run, if it resumes. The weights are then zeros, which the checkpoint replaces.
    """
    sizes = model_config(config, data, goes_on)
    torch.manual_seed(config.seed)
    if resolved is not None:
        with torch.device("meta"):
            model = LiquidForCausalLM(sizes)
        read = None
        if dist.get_rank() == 0:
            read = _reader_of_zeros(model) if goes_on else _reader_of_initial_weights(config.init_from, sizes)
        model = fill_from_rank_0(model, read, resolved)
    elif config.init_from is None:
        model = LiquidForCausalLM(sizes)
    else:
        model = LiquidForCausalLM(sizes)
        read = _reader_of_initial_weights(config.init_from, sizes)
        model.load_state_dict(
            {name: read(name) for name in model.state_dict() if name not in model.all_tied_weights_keys}, strict=False
        )
    model.loss_weights = LossWeights(**asdict(config.loss))
    if config.attention != "auto":
        model.set_attn_implementation(config.attention)
    return model


def _reader_of_zeros(model: LiquidForCausalLM) -> Callable[[str], torch.Tensor]:
    """Return a function that returns zeros in the shape of the named weight."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return lambda name: torch.zeros(shapes[name])


def _reader_of_initial_weights(init_from: str | None, sizes: LiquidConfig) -> Callable[[str], torch.Tensor]:
    """Return a function that returns the named initial weight. It can be called once for each weight."""
    if init_from is not None:
        files = WeightFiles(Path(init_from))

        def read(name: str) -> torch.Tensor:
            tensor = files.read(name)
            if name != TABLE:
                return tensor
            return torch.nn.functional.pad(tensor, (0, 0, 0, sizes.vocab_size - len(tensor)))

        return read
    # All weights are created at once, because they share one sequence of random numbers. `pop` lets each one be freed.
    return LiquidForCausalLM(sizes).state_dict().pop
