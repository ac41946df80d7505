"""Describe what a checkpoint holds beside the weights, and choose the one to resume from.

A checkpoint is `checkpoints/<tag>/`: DeepSpeed's files and `manifest.json`. The manifest is written last, so a checkpoint
is complete or not there. It holds every file's size and sha256, the train state, the fingerprint of the data and the
number of ranks that wrote it. `latest` names the newest checkpoint.

`saver.py` writes checkpoints, `restore.py` loads one into an engine, `universal.py` converts one for another number of
ranks, and `going_back.py` renames later ones.
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
    """Everything that a step depends on beside the weights and the optimizer.

    - `step`: steps attempted.
    - `position`: rows of the endless stream consumed.
    - `tokens`: non-padding tokens seen.
    - `mean_routing` `[L][E]`, `mean_retained_ratio`: the running means that two loss terms are expanded around.
    - `balancing_bias` `[L][E]`: the exact bias of the routers; their own copy may have been rounded by a cast.
    - `skipped_ranges`: positions `[first, end)` that rollbacks skipped.
    - `skipped_steps`: steps whose loss or gradients were not finite.
    - `skipped_in_a_row`: such steps in a row, up to the last one. Overflows of fp16's loss scale do not count; steps
      without a supervised token do.
    - `recent_losses`: the losses that a spike is measured against.
    - `validated_step`: the last validated step, 0 if there is none.
    - `validation_metric`: its cross entropy, None if not finite.
    - `validation_of`: the rows and labels that it was measured on.
    - `best_metric`, `best_step`: the lowest cross entropy so far on these, and its step.

    Converting fp32 values to Python floats or JSON and back is exact.
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
        """Return the state before the first step; exported weights keep the bias that they were trained with."""
        state = cls(0, 0, 0, [], 0.0, balancing_bias(model).tolist())
        sizes = model.config
        state.running_means = RunningMeans.initial(
            sizes.num_hidden_layers, sizes.num_experts, sizes.embedding_target_ratio
        )
        return state

    def note_validation(self, cross_entropy: float, of: str) -> bool:
        """Record this step's cross entropy on the rows and labels `of`, and return whether it is the lowest on these.

        A value that is not finite is never the best: no later value would compare as lower.
        """
        if self.validation_of not in ("", of):
            self.best_metric = self.best_step = None  # measured on other rows or labels
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
    """Return the checkpoints that have a manifest, newest first, without those renamed to `left-...`."""
    folders = [path.parent for path in run.checkpoints.glob(f"step-*/{MANIFEST}")]
    return sorted((folder for folder in folders if step_in_name(folder.name) is not None), reverse=True)


def has_checkpoints(run: RunFolder) -> bool:
    """Return whether the folder contains any checkpoint, including renamed ones.

    If it does, training either resumes from it or is refused.
    """
    return any(run.checkpoints.glob(f"step-*/{MANIFEST}")) or any(run.checkpoints.glob(f"left-*/{MANIFEST}"))


def step_in_name(name: str) -> int | None:
    """Return the step in a checkpoint's name, renamed or not; None if it is not a checkpoint's name."""
    match = re.fullmatch(r"step-(\d{8,})|left-step-(\d{8,})(?:-\d+)?", name)
    return int(match[1] or match[2]) if match else None


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder. Raises `ValueError` if it is not named as one."""
    step = step_in_name(folder.name)
    if step is None:
        raise ValueError(f"{folder} is not named as a checkpoint")
    return step


def best_checkpoint(complete: list[Path]) -> Path | None:
    """Return the checkpoint whose own step had the lowest cross entropy, or None; `complete` lists the newest first.

    Steps that were validated but not saved are ignored, and so are results on rows or labels that differ from those of the
    newest result. Checkpoints from before `validation_of` was recorded count, so that a run keeps its best one when this code
    is updated.
    """
    measured = [(*found, folder) for folder in complete if (found := _own_validation(folder)) is not None]
    alike = [(metric, folder) for of, metric, folder in measured if of in ("", measured[0][0])]
    return min(alike, default=(None, None))[1]


def _own_validation(checkpoint: Path) -> tuple[str, float] | None:
    """Return what a checkpoint's own step was validated on, and its cross entropy; None without a finite one."""
    try:
        state = read_manifest(checkpoint)["train_state"]
        if "validation_metric" not in state:  # an older format, which has it only if it was the best
            own = state.get("best_metric") if state.get("best_step") == state["step"] else None
        else:
            own = state["validation_metric"] if state["validated_step"] == state["step"] else None
    except (ValueError, KeyError):  # damaged, so never the best
        return None
    return (state.get("validation_of", ""), own) if own is not None else None


def universal_folder(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's universal form."""
    return checkpoint.with_name(f"universal-{checkpoint.name}")


def find_checkpoint(run: RunFolder, resume: str) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, and a message for each newer one that is damaged.

    resume: `auto` takes the newest whose files match its manifest, `best` the best by validation, `never` none; anything
    else is a checkpoint's tag or path.
    Raises `ConfigurationError` if `never` meets a run with checkpoints, if the named checkpoint is damaged, or if `best`
    finds no validated one.
    """
    complete = complete_checkpoints(run)
    left = sorted(path.parent.name for path in run.checkpoints.glob(f"left-*/{MANIFEST}"))
    if resume in ("auto", "never") and left and not complete:
        raise ConfigurationError(
            f"all checkpoints of {run.path} were set aside ({', '.join(left)}); set resume={left[-1]} to resume from one, "
            "or delete them to start over"
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
                f"{run.path} has no best checkpoint, because none of its saved steps was validated; set validate_every so "
                "that steps are saved and validated together, or resume from the newest with resume=auto"
            )
        resume = best.name
    if resume != "auto":
        folder = Path(resume) if Path(resume).is_dir() else run.checkpoints / resume
        if folder.resolve().parent != run.checkpoints.resolve() or step_in_name(folder.name) is None:
            raise ConfigurationError(
                f"{resume} is not a checkpoint of {run.path}; resume continues the run in output, "
                "and init_from starts a new run from exported weights"
            )
        if fault := find_fault(folder):
            raise ConfigurationError(f"cannot resume from {resume}: {fault}; resume=auto takes the newest whole one")
        return folder, []
    passed_over: list[str] = []
    for folder in complete:
        fault = find_fault(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"skipping the damaged checkpoint {folder.name}: {fault}")
    if passed_over:
        raise ConfigurationError(
            f"{run.path} has no complete checkpoint ({passed_over[0]}); set another output, or delete {run.checkpoints} "
            "to start over"
        )
    return None, []


def read_train_state(folder: Path) -> TrainState:
    """Return the train state of a checkpoint; one from before `validated_step` was recorded counts as validated."""
    saved = read_manifest(folder)["train_state"]
    return TrainState(**{"validated_step": saved["step"], **saved})
