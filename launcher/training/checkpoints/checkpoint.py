"""Checkpoints that are whole or not there, what they hold beside the weights, and which to resume from.

A checkpoint is `checkpoints/<tag>/`: DeepSpeed's files and `manifest.json`, which is written last and holds every
file's size and sha256, the train state, the fingerprint of the data and how many ranks wrote it. `latest` names the
newest one. `saver.py` writes them, `restore.py` puts one into an engine, `universal.py` converts them for another number
of ranks, `going_back.py` sets later ones aside.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.manifest import MANIFEST, find_fault, read_manifest
from model import LiquidForCausalLM
from model.loss import RunningMeans
from model.moe import balancing_bias


@dataclass
class TrainState:
    """All that a step depends on beside the weights and the optimizer.

    `step`: steps attempted; `position`: rows of the endless stream consumed; `tokens`: non-padding tokens seen;
    `mean_routing` `[L][E]` and `mean_retained_ratio`: the running means that two loss terms are expanded around;
    `balancing_bias` `[L][E]`: what the routers choose with, of which they hold a copy that a cast may have rounded.
    `skipped_ranges`: positions `[first, end)` that a rollback went past; `skipped_steps`: how many had a loss or gradients
    that were not finite; `skipped_in_a_row`: how many of them just now, without those of fp16's scale, and with those whose
    text had no supervised token; `recent_losses`:
    those that a spike is measured against.
    `validated_step`: the last step that was validated, 0 if none was; `validation_metric`: its cross entropy, if finite, and
    `validation_of`: on which rows and labels; `best_metric` and `best_step`: the lowest cross entropy so far on these.
    fp32 values as Python floats and back are exact, in JSON too.
    """

    step: int
    position: int
    tokens: int
    mean_routing: list[list[float]]
    mean_retained_ratio: float
    balancing_bias: list[list[float]]
    skipped_ranges: list[list[int]] = field(default_factory=list)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    best_metric: float | None = None
    best_step: int | None = None
    validated_step: int = 0
    validation_metric: float | None = None
    validation_of: str = ""

    @classmethod
    def initial(cls, model: LiquidForCausalLM) -> TrainState:
        """The state before the first step; exported weights bring the bias that they were trained with."""
        state = cls(0, 0, 0, [], 0.0, balancing_bias(model).tolist())
        sizes = model.config
        state.running_means = RunningMeans.initial(
            sizes.num_hidden_layers, sizes.num_experts, sizes.embedding_target_ratio
        )
        return state

    def note_validation(self, cross_entropy: float, of: str) -> bool:
        """Note this step's cross entropy on the rows and labels `of`, and tell whether it is the lowest so far on these.

        One that is not finite is never the best: nothing could be better than it afterwards.
        """
        if self.validation_of not in ("", of):
            self.best_metric = self.best_step = None  # measured on something else
        self.validated_step, self.validation_of = self.step, of
        self.validation_metric = cross_entropy if math.isfinite(cross_entropy) else None
        is_best = math.isfinite(cross_entropy) and (self.best_metric is None or cross_entropy < self.best_metric)
        if is_best:
            self.best_metric, self.best_step = cross_entropy, self.step
        return is_best

    @property
    def running_means(self) -> RunningMeans:
        return RunningMeans(torch.tensor(self.mean_routing), torch.tensor(self.mean_retained_ratio))

    @running_means.setter
    def running_means(self, means: RunningMeans) -> None:
        self.mean_routing = means.routing.tolist()
        self.mean_retained_ratio = means.retained_ratio.item()


def complete_checkpoints(run: RunFolder) -> list[Path]:
    """Checkpoints that have a manifest, newest first; without those that were set aside."""
    folders = [path.parent for path in run.checkpoints.glob(f"step-*/{MANIFEST}")]
    return sorted((folder for folder in folders if step_in_name(folder.name) is not None), reverse=True)


def has_checkpoints(run: RunFolder) -> bool:
    """Whether a start in this folder goes on from a checkpoint, whole or set aside, or is refused for their sake."""
    return any(run.checkpoints.glob(f"step-*/{MANIFEST}")) or any(run.checkpoints.glob(f"left-*/{MANIFEST}"))


def step_in_name(name: str) -> int | None:
    """The step of a checkpoint, set aside or not, by its name; None for what is no checkpoint's name."""
    match = re.fullmatch(r"step-(\d{8,})|left-step-(\d{8,})(?:-\d+)?", name)
    return int(match[1] or match[2]) if match else None


def best_checkpoint(complete: list[Path]) -> Path | None:
    """The checkpoint whose own step had the lowest cross entropy, of checkpoints given newest first; None if there is none.

    Steps that were validated but not saved do not count, nor what was measured on other rows or labels than the newest.
    Checkpoints from before that was noted do count, or a run would lose its best one when this code is updated.
    """
    measured = [(*found, folder) for folder in complete if (found := _own_validation(folder)) is not None]
    alike = [(metric, folder) for of, metric, folder in measured if of in ("", measured[0][0])]
    return min(alike, default=(None, None))[1]


def _own_validation(checkpoint: Path) -> tuple[str, float] | None:
    """On what a checkpoint's own step was validated, and its cross entropy; None if there is none that is finite."""
    try:
        state = read_manifest(checkpoint)["train_state"]
        if "validation_metric" not in state:  # of before these were noted: known if it was the best so far
            own = state.get("best_metric") if state.get("best_step") == state["step"] else None
        else:
            own = state["validation_metric"] if state["validated_step"] == state["step"] else None
    except (ValueError, KeyError):  # a damaged one is not the best
        return None
    return (state.get("validation_of", ""), own) if own is not None else None


def universal_folder(checkpoint: Path) -> Path:
    """Where the universal form of a checkpoint is kept."""
    return checkpoint.with_name(f"universal-{checkpoint.name}")


def find_checkpoint(run: RunFolder, resume: str) -> tuple[Path | None, list[str]]:
    """What to resume from, and which newer checkpoints were passed over, and why.

    `auto` takes the newest whose files are what its manifest says, `best` the best by validation, `never` none, anything
    else is a checkpoint's tag or path. Raises `ConfigurationError` where `never` meets a run that has checkpoints, a
    named one is not whole, or nothing was validated.
    """
    complete = complete_checkpoints(run)
    left = sorted(path.parent.name for path in run.checkpoints.glob(f"left-*/{MANIFEST}"))
    if resume in ("auto", "never") and left and not complete:
        raise ConfigurationError(
            f"{run.path} has no checkpoint but those that were set aside ({', '.join(left)}); resume={left[-1]} goes on from "
            "one, or delete them to begin anew"
        )
    if resume == "never":
        if complete:
            raise ConfigurationError(
                f"resume=never, but {run.path} has checkpoints up to {complete[0].name}; "
                "set another output, or delete the folder"
            )
        return None, []
    if resume == "best":
        best = best_checkpoint(complete)
        if best is None:
            raise ConfigurationError(
                f"{run.path} has no best checkpoint, since none of its saved steps was validated; set validate_every so "
                "that steps are saved and validated together, or take the newest with auto"
            )
        resume = best.name
    if resume != "auto":
        folder = Path(resume) if Path(resume).is_dir() else run.checkpoints / resume
        if folder.resolve().parent != run.checkpoints.resolve() or step_in_name(folder.name) is None:
            raise ConfigurationError(
                f"{resume} is not a checkpoint of {run.path}; resume goes on with the run in output, "
                "and init_from begins a new one with exported weights"
            )
        if fault := find_fault(folder):
            raise ConfigurationError(f"cannot resume from {resume}: {fault}; resume=auto takes the newest whole one")
        return folder, []
    passed_over = []
    for folder in complete:
        fault = find_fault(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"checkpoint {folder.name} is passed over: {fault}")
    if passed_over:
        raise ConfigurationError(
            f"{run.path} has no whole checkpoint ({passed_over[0]}); set another output, or delete {run.checkpoints} "
            "to begin anew"
        )
    return None, []


def read_train_state(folder: Path) -> TrainState:
    """The train state of a checkpoint; one from before `validated_step` was noted counts as validated."""
    saved = read_manifest(folder)["train_state"]
    return TrainState(**{"validated_step": saved["step"], **saved})
