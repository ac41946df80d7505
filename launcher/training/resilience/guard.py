"""Count and report steps that are not finite or whose loss spikes, and end the run if it cannot recover.

DeepSpeed skips a step whose gradients are not finite, on all ranks together and in fp32, bf16 and fp16: weights and
moments stay as they were. This module also skips a step if only its loss is not finite, and checks the outcome of every
step.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launcher.config import RunConfig
from launcher.deepspeed_json import expert_parallel_size
from launcher.errors import ConfigurationError, TrainingError
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState, find_checkpoint
from launcher.training.checkpoints.going_back import make_newest
from launcher.training.checkpoints.restore import load_checkpoint
from launcher.training.checkpoints.universal import for_ranks
from launcher.training.monitoring import tags

if TYPE_CHECKING:  # importing this module must not import DeepSpeed
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from launcher.training.checkpoints.saver import CheckpointSaver
    from launcher.training.monitoring.monitor import Monitor

# Rollbacks in a row to one checkpoint. If they do not help, the cause is the weights and not the rows.
ROLLBACKS = 3
# Lower limit of the deviation, as a share of the median: otherwise a loss that hardly moves would spike all the time.
LEAST_DEVIATION = 0.01


def poison(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss; if it is not finite, its gradients become NaN, because DeepSpeed checks only gradients.

    A non-finite value can have finite gradients (a clamped one, for example), and DeepSpeed would then take the step.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def is_spike(loss: float, recent: list[float], factor: float) -> bool:
    """Return whether a loss exceeds the median of recent ones by more than `factor` median absolute deviations."""
    middle = median(recent)
    deviation = median(abs(value - middle) for value in recent)
    return loss - middle > factor * max(deviation, LEAST_DEVIATION * abs(middle))


class Guard:
    """Judge each step from sums that all ranks share, so that all ranks decide alike.

    Call `observe` after each step, then `wants_rollback`, which raises `TrainingError` if the run cannot continue, and
    `may_save` before a checkpoint.
    Rollbacks are counted here and not in the train state: a restarted run resumes from the checkpoint before them, meets
    the same rows, and may roll back just as often.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: RunConfig,
        run: RunFolder,
        monitor: Monitor,
        checkpoints: CheckpointSaver,
    ) -> None:
        if not hasattr(engine.optimizer, "overflow"):
            raise ConfigurationError(
                "zero_optimization.stage 0 in fp32 does not skip steps whose gradients are not finite; set stage 1, 2 or 3"
            )
        if engine.bfloat16_enabled() and not getattr(engine.optimizer, "check_grad_overflow", True):
            raise ConfigurationError(
                "bf16.check_grad_overflow is false in the JSON, so steps that are not finite would be taken; remove the key"
            )
        self.engine = engine
        self.config = config
        self.run = run
        self.monitor = monitor
        self.checkpoints = checkpoints
        self._rollbacks = 0  # in a row
        self._went_back_to: str | None = None  # the checkpoint of these rollbacks
        self._spike = self._hopeless = False
        self._not_finite = 0  # steps in a row, up to the last one
        self._scale: float | None = None  # fp16's, before the coming step
        self._take_scaler()

    def observe(self, state: TrainState, loss: float) -> dict[str, float]:
        """Judge the step that `state` follows, given the global batch's loss; return values for TensorBoard."""
        skipped, finite = self.engine.optimizer.overflow, math.isfinite(loss)
        # If the loss scale is too large, the gradients of a finite loss overflow; the scaler then lowers it until they fit.
        scaler = self._scaler
        by_scale = skipped and finite and scaler is not None
        self._hopeless = scaler is not None and by_scale and self._scale == scaler.min_scale
        self._scale = scaler and scaler.cur_scale
        self._not_finite = self._not_finite + 1 if skipped and not by_scale else 0
        state.skipped_steps += skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped and not by_scale else 0
        if skipped and not by_scale:
            what = "gradient" if finite else "loss"
            self.monitor.say(
                f"step {state.step} is skipped: its {what} is not finite ({self._rows(state)}; "
                f"{state.skipped_in_a_row} in a row, {state.skipped_steps} in all)"
            )
        self._spike = finite and not skipped and self._spikes(state, loss)
        if finite and not (self._spike and self.config.on_spike == "rollback"):
            state.recent_losses = [*state.recent_losses, loss][-self.config.spike.window :]
        return {tags.SKIPPED_STEPS: state.skipped_steps, tags.SPIKE: float(self._spike)}

    def may_save(self, state: TrainState) -> bool:
        """Return whether the weights may be saved; if not, report why.

        If the last steps were not finite, the weights may be the cause. Checkpoints of them would in time replace the
        last good one.
        """
        if self._not_finite:
            self.monitor.say(
                f"step {state.step} is not saved: the last {self._not_finite} steps were not finite; "
                f"the last checkpoint is {self._last_checkpoint()}"
            )
        return not self._not_finite

    def check_end(self, state: TrainState) -> None:
        """Raise `TrainingError` if the run's last steps were not finite, because its end is then not saved."""
        if self._not_finite:
            raise TrainingError(
                f"the last {self._not_finite} steps up to step {state.step} were not finite, so the end of the run is not "
                f"saved; the last checkpoint is {self._last_checkpoint()}; lower learning_rate, or inspect those rows"
            )

    def wants_rollback(self, state: TrainState) -> bool:
        """Return whether to roll back to the last checkpoint and skip the rows since then.

        Raises `TrainingError` if too many steps in a row were skipped, if the loss scale cannot go lower, or if earlier
        rollbacks did not help.
        """
        self._end_where_hopeless(state)
        spiked, self._spike = self._spike, False
        if not (spiked and self.config.on_spike == "rollback"):
            return False
        self.checkpoints.settle()  # a save that is still being hashed is the one to roll back to
        newest = self._newest()
        if newest is None:
            self.monitor.say("there is no checkpoint yet to roll back to; training continues")
            return False
        if newest != self._went_back_to:
            self._rollbacks, self._went_back_to = 0, newest
        if self._rollbacks == ROLLBACKS:
            raise TrainingError(
                f"the loss spiked again after {ROLLBACKS} rollbacks to {self._last_checkpoint()} (step {state.step}, "
                f"{self._rows(state)}): the rows are not the cause; lower learning_rate, raise spike.factor, or resume "
                "from an earlier checkpoint"
            )
        return True

    def roll_back(self, state: TrainState) -> TrainState:
        """Load the last checkpoint into the engine and return its state, with the position after the spike's rows.

        The stream of batches is already at that position.
        """
        chosen: list = [self._loadable() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(chosen, src=0)
        earlier = load_checkpoint(self.engine, chosen[0])
        self._not_finite = 0
        earlier.skipped_ranges = [*earlier.skipped_ranges, [earlier.position, state.position]]
        earlier.position = state.position
        earlier.skipped_steps = state.skipped_steps
        self._rollbacks += 1
        self._went_back_to = self._newest()  # a different one if the newest was damaged
        self._take_scaler()
        first, end = earlier.skipped_ranges[-1]
        self.monitor.say(f"rolled back to {chosen[0].name}; skipping the rows at positions {first} to {end - 1}")
        self.monitor.goes_back_to(earlier.step)
        return earlier

    @property
    def _scaler(self) -> DynamicLossScaler | None:
        """Return fp16's dynamic loss scaler, if there is one; loading a checkpoint replaces it."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None) if self.engine.fp16_enabled() else None
        return scaler if getattr(scaler, "dynamic", False) else None

    def _take_scaler(self) -> None:
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # `_end_where_hopeless` raises a better message
        self._scale = self._scaler and self._scaler.cur_scale

    def _spikes(self, state: TrainState, loss: float) -> bool:
        recent, settings = state.recent_losses, self.config.spike
        if len(recent) < settings.window or not is_spike(loss, recent, settings.factor):
            return False
        self.monitor.say(
            f"step {state.step}: the loss spikes to {loss:.3f}; the median of the last {len(recent)} steps is "
            f"{median(recent):.3f} ({self._rows(state)})"
        )
        return True

    def _end_where_hopeless(self, state: TrainState) -> None:
        if self._hopeless or state.skipped_in_a_row > self.config.max_skipped_in_a_row:
            self.checkpoints.settle()  # so that the message names the newest checkpoint
        if self._hopeless and (scaler := self._scaler) is not None:
            raise TrainingError(
                f"step {state.step}: fp16's loss scale is at its minimum ({scaler.min_scale:g}) and the gradients "
                "still overflow; train in bf16, or lower learning_rate, or lower fp16.min_loss_scale in the JSON; "
                f"the last checkpoint is {self._last_checkpoint()}"
            )
        if state.skipped_in_a_row > self.config.max_skipped_in_a_row:
            raise TrainingError(
                f"{state.skipped_in_a_row} steps in a row were not finite or had no token to learn, up to step {state.step} "
                f"({self._rows(state)}); the last checkpoint is {self._last_checkpoint()}; lower learning_rate, or inspect "
                "those rows; max_skipped_in_a_row sets how many are tolerated"
            )

    def _rows(self, state: TrainState) -> str:
        return f"rows at positions {state.position - self.config.global_batch_rows} to {state.position - 1}"

    def _loadable(self) -> Path:
        """Return the newest complete checkpoint, in its universal form if a different number of ranks wrote it.

        Damaged newer ones are renamed: under their own names they would keep their steps from being saved again.
        """
        checkpoint, passed_over = find_checkpoint(self.run, "auto")
        if checkpoint is None:
            raise TrainingError(
                f"the checkpoints in {self.run.checkpoints} are gone, so the run cannot roll back; start it again to begin anew"
            )
        checkpoint, renamed = make_newest(self.run, checkpoint)
        for note in (*passed_over, *renamed):
            self.monitor.say(note)
        return for_ranks(checkpoint, dist.get_world_size(), expert_parallel_size(self.engine.config))[0]

    def _newest(self) -> str | None:
        """Return the newest checkpoint's name as rank 0 sees it; a shared file system may show it to other ranks late."""
        found = [self.run.latest.read_text().strip() if self.run.latest.exists() else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _last_checkpoint(self) -> str:
        latest = self.run.latest
        return str(self.run.checkpoints / latest.read_text().strip()) if latest.exists() else "none"
