"""From a run's checkpoint to a Hugging Face folder."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig

from launcher.checkpoints.checkpoint import find_checkpoint, read_train_state
from launcher.checkpoints.universal import convert
from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from model import LiquidConfig, LiquidForCausalLM

# What an export consists of; a folder with anything else in it is not replaced.
EXPORTED = re.compile(
    r"config\.json|generation_config\.json|model.*\.safetensors(\.index\.json)?|tokenizer.*|.*\.jinja"
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export(run: str | Path, out: str | Path, tag: str = "auto") -> Path:
    """Write the checkpoint `tag` of a run (its newest by default) as a Hugging Face folder; returns the folder.

    Raises `ConfigurationError` where the run has no whole checkpoint or `out` holds something else.
    """
    out = Path(out)
    if out.is_file():
        raise ConfigurationError(f"{out} is a file; name a folder for the model")
    foreign = [path.name for path in out.iterdir() if not EXPORTED.fullmatch(path.name)] if out.exists() else []
    if foreign or (out.exists() and any(out.iterdir()) and not list(out.glob("*.safetensors"))):
        what = foreign[0] if foreign else "no weights"
        raise ConfigurationError(f"{out} is not an earlier export (it has {what}); export to an empty or a new folder")
    model = load_run(run, tag)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target first, so that an interrupted export never looks like a whole one.
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(partial)
        for name in TOKENIZER_FILES:
            if (source := RunFolder(run).model / name).is_file():
                shutil.copyfile(source, partial / name)
        readable = 0o666 & ~_umask()  # temporary folders and safetensors are the owner's alone otherwise
        for file in partial.iterdir():
            file.chmod(readable)
        partial.chmod(readable | (readable & 0o444) >> 2)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_run(run: str | Path, tag: str = "auto") -> LiquidForCausalLM:
    """The model of a run's checkpoint, in fp32 on the CPU, ready to generate."""
    folder = RunFolder(run)
    checkpoint, _ = find_checkpoint(folder, tag)
    if checkpoint is None:
        raise ConfigurationError(
            f"{run} has no whole checkpoint yet; train it first, or give a run folder that has one"
        )
    config = LiquidConfig.from_pretrained(folder.model)
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    weights = _consolidated_weights(checkpoint)
    for name, parameter in model.state_dict().items():
        if name in weights:
            # DeepSpeed keeps parameters flat, padded at the end to a multiple of the ranks.
            weights[name] = weights[name].flatten()[: parameter.numel()].view(parameter.shape)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    # DeepSpeed's universal form has no buffers, and theirs may be rounded: the true bias is the train state's.
    for layer, bias in enumerate(read_train_state(checkpoint).balancing_bias):
        weights[f"model.layers.{layer}.moe.router.e_score_correction_bias"] = torch.tensor(bias)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
    )  # fmt: skip
    return model.eval()


def _consolidated_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter in fp32 under the model's own names, the experts in shape and the others possibly flat.

    DeepSpeed keeps a checkpoint in each rank's pieces; its universal form holds one file a parameter, with the experts
    of all ranks together. (Its two simpler converters refuse expert parallelism under ZeRO-3.)
    """
    with tempfile.TemporaryDirectory(prefix=".universal.", dir=checkpoint.parent) as temporary:
        universal = Path(temporary) / "universal"  # the converter writes beside its output folder, too
        convert(checkpoint, universal)
        files = {file.parent.name: file for file in (universal / "zero").glob("*/fp32.pt")}
        contents = {name: torch.load(file, weights_only=True) for name, file in files.items()}
    weights = {name: value["param"] if isinstance(value, dict) else value for name, value in contents.items()}
    return _with_fused_experts(weights)


def _with_fused_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """AutoEP's w1 (gate), w3 (up) and w2 (down) back into `gate_up_proj` and `down_proj`."""
    for name in [name for name in weights if name.endswith(".experts.w1")]:
        prefix = name.removesuffix("w1")
        gate, up = weights.pop(f"{prefix}w1"), weights.pop(f"{prefix}w3")
        weights[f"{prefix}gate_up_proj"] = torch.cat((gate, up), dim=1)
        weights[f"{prefix}down_proj"] = weights.pop(f"{prefix}w2")
    return weights
