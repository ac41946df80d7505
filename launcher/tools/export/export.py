"""Convert a run's checkpoint to a Hugging Face folder, one parameter at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig

from launcher.errors import ConfigurationError, DiskError
from launcher.run_folder import RunFolder
from launcher.tools.export.custom_code import AUTO_MAP, FILES, write_custom_code
from launcher.tools.export.model_card import model_card
from launcher.training.checkpoints.checkpoint import TrainState, find_checkpoint, read_train_state
from launcher.training.checkpoints.weights import CheckpointWeights
from launcher.weight_files import write_shards
from model import LiquidConfig, LiquidForCausalLM

# The files of an export. A folder that contains anything else is not replaced.
EXPORTED = re.compile(
    r"config\.json|generation_config\.json|README\.md|model.*\.safetensors(\.index\.json)?|tokenizer.*|.*\.jinja|"
    + "|".join(map(re.escape, sorted(FILES)))
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BIAS = re.compile(r"model\.layers\.(\d+)\.moe\.router\.e_score_correction_bias")


def export(
    run: str | Path,
    out: str | Path,
    tag: str = "auto",
    dtype: str = "fp32",
    max_shard_bytes: int = 2 * 10**9,
    custom_code: bool = False,
) -> Path:
    """Write the checkpoint `tag` of a run (by default its newest) as a Hugging Face folder, and return the folder.

    Holds at most one parameter in memory and, while gathering a layer's experts, one rank's share of them.
    Raises `ConfigurationError` if the run has no complete checkpoint, if `out` contains other files, or if the
    weights do not fit `dtype`; raises `DiskError` if `out` cannot be written.
    """
    out = Path(out).resolve()  # the partial folder must be beside `out` and never in it, even for `out/.`
    _check_target(out)
    checkpoint, state, model = _open(run, tag)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Write beside the target first, so that an interrupted export never looks complete.
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            _write_weights(partial, checkpoint, state, model, DTYPES[dtype], max_shard_bytes)
            _write_descriptions(partial, RunFolder(run), checkpoint, state, model, DTYPES[dtype], custom_code)
            readable = 0o666 & ~_umask()  # mkdtemp makes folders that only their owner can read
            for file in partial.iterdir():
                file.chmod(readable)
            partial.chmod(readable | (readable & 0o444) >> 2)
            _replace(out, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DiskError(f"cannot write the model to {out}: {error.strerror or error}") from error
    return out


def _check_target(out: Path) -> None:
    """Raise `ConfigurationError` if the folder cannot be replaced or contains anything but an export."""
    if out.is_file():
        raise ConfigurationError(f"{out} is a file; name a folder for the model")
    if out == Path.cwd() or out in Path.cwd().parents:
        raise ConfigurationError(
            f"{out} is the current folder or one of its parents; name another folder for the model"
        )
    if out.is_mount():
        raise ConfigurationError(f"{out} is a mount point and cannot be replaced; name a folder inside it")
    foreign = [path.name for path in out.iterdir() if not EXPORTED.fullmatch(path.name)] if out.exists() else []
    if foreign or (out.exists() and any(out.iterdir()) and not list(out.glob("*.safetensors"))):
        what = foreign[0] if foreign else "no weights"
        raise ConfigurationError(f"{out} is not an earlier export (it has {what}); export to an empty or new folder")


def _replace(out: Path, new: Path) -> None:
    """Move `new` to `out`; delete the old folder only afterwards."""
    if not out.exists():
        new.rename(out)
        return
    aside = new.with_name(f"{new.name}.old")
    out.rename(aside)
    try:
        new.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside)


def load_run(run: str | Path, tag: str = "auto") -> LiquidForCausalLM:
    """Load the model of a run's checkpoint, in fp32 on the CPU and in evaluation mode."""
    checkpoint, state, model = _open(run, tag)
    weights = CheckpointWeights(checkpoint)
    model.to_empty(device="cpu")
    for name, target in model.state_dict(keep_vars=True).items():
        if name not in model.all_tied_weights_keys:
            _fill(name, target, weights, state)
    model.tie_weights()
    return model.eval()


def _open(run: str | Path, tag: str) -> tuple[Path, TrainState, LiquidForCausalLM]:
    """Return a checkpoint of the run, its train state, and the model without weights."""
    folder = RunFolder(run)
    checkpoint, passed_over = find_checkpoint(folder, tag)
    for note in passed_over:
        print(note, file=sys.stderr)
    if checkpoint is None:
        raise ConfigurationError(
            f"{run} has no complete checkpoint yet; train it first, or give a run folder that has one"
        )
    config = LiquidConfig.from_pretrained(folder.model)
    # Drop the rows that only pad the embedding table: other tools would treat them as tokens.
    config.vocab_size = config.used_vocab_size or config.vocab_size
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return checkpoint, read_train_state(checkpoint), model


def _fill(name: str, target: torch.Tensor, weights: CheckpointWeights, state: TrainState) -> None:
    """Copy a parameter, or a router's bias, into `target`."""
    if found := BIAS.fullmatch(name):  # the engine's copy may be rounded; the train state has the exact values
        target.copy_(torch.tensor(state.balancing_bias[int(found[1])]))
    else:
        weights.copy_into(target, name)
        if target.dtype == torch.float16 and not target.isfinite().all():
            raise ConfigurationError(f"{name} has values outside the range of fp16; export with --dtype bf16 or fp32")


def _write_weights(
    folder: Path, checkpoint: Path, state: TrainState, model: LiquidForCausalLM, dtype: torch.dtype, max_bytes: int
) -> None:
    weights = CheckpointWeights(checkpoint)
    tensors = {
        name: (tuple(tensor.shape), torch.float32 if BIAS.fullmatch(name) else dtype)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    write_shards(folder, tensors, lambda name, target: _fill(name, target, weights, state), max_bytes)


def _write_descriptions(
    folder: Path,
    run: RunFolder,
    checkpoint: Path,
    state: TrainState,
    model: LiquidForCausalLM,
    dtype: torch.dtype,
    custom_code: bool,
) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.auto_map = AUTO_MAP if custom_code else {}
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if custom_code:
        write_custom_code(folder)
    for name in TOKENIZER_FILES:
        if (source := run.model / name).is_file():
            shutil.copyfile(source, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = config.max_position_embeddings  # other tools truncate at this length
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(run, checkpoint, state, model, custom_code), encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
