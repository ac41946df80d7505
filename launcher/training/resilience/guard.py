"""Steps that went wrong: not finite, or a spike of the loss; counted, shown, and where it must be, the end of the run.

DeepSpeed skips a step whose gradients are not finite, on all ranks together: weights and moments stay, in fp32, bf16 and
fp16. This module makes it skip where only the loss is not finite, and looks at what has become of each step.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launcher.config import RunConfig
from launcher.errors import ConfigurationError, TrainingError
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState, find_checkpoint
from launcher.training.checkpoints.going_back import make_newest
from launcher.training.checkpoints.restore import load_checkpoint
from launcher.training.checkpoints.universal import for_ranks

if TYPE_CHECKING:  # reading this module must not wait for DeepSpeed
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from launcher.training.checkpoints.saver import CheckpointSaver
    from launcher.training.monitoring.monitor import Monitor

ROLLBACKS = 3  # in a row from one checkpoint; where they do not help, the weights are to blame and not the rows
# Of the median: the least that a deviation counts as, so that a loss that hardly moves does not spike at every breath.
LEAST_DEVIATION = 0.01


def poison(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with gradients that are not finite where it is not: DeepSpeed looks at gradients alone.

    A value that is not finite can have finite gradients (a clamped one, say), and then its step would be taken.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def is_spike(loss: float, recent: list[float], factor: float) -> bool:
    """Whether a loss is above the median of recent ones by `factor` times their median absolute deviation."""
    middle = median(recent)
    deviation = median(abs(value - middle) for value in recent)
    return loss - middle > factor * max(deviation, LEAST_DEVIATION * abs(middle))


class Guard:
    """What all ranks find out alike about each step, from sums that they share.

    `observe` after each step, then `wants_rollback`, which ends a run that cannot go on with a `TrainingError`, and
    `may_save` before a checkpoint.
    The rollbacks are counted here and not in the train state: a run that is started again goes on from the checkpoint
    before them, meets the same rows, and goes back from them just as often.
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
                "zero_optimization.stage 0 in fp32 takes steps whose gradients are not finite; set stage 1, 2 or 3"
            )
        if engine.bfloat16_enabled() and not getattr(engine.optimizer, "check_grad_overflow", True):
            raise ConfigurationError(
                "bf16.check_grad_overflow is false in the JSON, which takes steps that are not finite; leave it out"
            )
        self.engine = engine
        self.config = config
        self.run = run
        self.monitor = monitor
        self.checkpoints = checkpoints
        self._rollbacks, self._went_back_to = 0, None  # how many in a row, and to which checkpoint
        self._spike = self._hopeless = False
        self._not_finite = 0  # how many steps in a row just now
        self._take_scaler()

    def observe(self, state: TrainState, loss: float) -> dict[str, float]:
        """Look at the step that `state` is behind, with the global batch's loss; returns values for TensorBoard."""
        skipped, finite = self.engine.optimizer.overflow, math.isfinite(loss)
        # Too large a loss scale overflows the gradients of a finite loss, and sinks until it fits.
        by_scale = skipped and finite and self._scaler is not None
        self._hopeless = by_scale and self._scale == self._scaler.min_scale
        self._scale = self._scaler and self._scaler.cur_scale
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
        return {"train/skipped_steps": state.skipped_steps, "train/spike": float(self._spike)}

    def may_save(self, state: TrainState) -> bool:
        """Whether the weights may be saved, and say so if not.

        If the last steps were not finite, the weights may be the cause. A checkpoint of them would in the end push out
        the last good one.
        """
        if self._not_finite:
            self.monitor.say(
                f"step {state.step} is not saved: the last {self._not_finite} steps were not finite; "
                f"the last checkpoint is {self._last_checkpoint()}"
            )
        return not self._not_finite

    def check_end(self, state: TrainState) -> None:
        """Raise `TrainingError` if the run's last steps were not finite, so that its end was not saved."""
        if self._not_finite:
            raise TrainingError(
                f"the last {self._not_finite} steps up to step {state.step} were not finite, so the end of the run is not "
                f"saved; the last checkpoint is {self._last_checkpoint()}; lower learning_rate, or look at those rows"
            )

    def wants_rollback(self, state: TrainState) -> bool:
        """Whether to leave the rows since the last checkpoint behind.

        Raises `TrainingError` where too many steps in a row were skipped, the loss scale cannot sink further, or going
        back did not help.
        """
        self._end_where_hopeless(state)
        spiked, self._spike = self._spike, False
        if not (spiked and self.config.on_spike == "rollback"):
            return False
        self.checkpoints.settle()  # a save that is still being hashed is the one to go back to
        newest = self._newest()
        if newest is None:
            self.monitor.say("there is no checkpoint yet to go back to: the run goes on")
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
        """Load the last checkpoint into the engine and return its state, whose position is behind the spike's rows.

        The stream of batches stands there already.
        """
        chosen = [self._loadable() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(chosen, src=0)
        earlier = load_checkpoint(self.engine, chosen[0])
        self._not_finite = 0
        earlier.skipped_ranges = [*earlier.skipped_ranges, [earlier.position, state.position]]
        earlier.position = state.position
        earlier.skipped_steps = state.skipped_steps
        self._rollbacks, self._went_back_to = self._rollbacks + 1, self._newest()  # another one where that was damaged
        self._take_scaler()
        first, end = earlier.skipped_ranges[-1]
        self.monitor.say(f"back to {chosen[0].name}, and past the rows at positions {first} to {end - 1}")
        self.monitor.goes_back_to(earlier.step)
        return earlier

    @property
    def _scaler(self) -> DynamicLossScaler | None:
        """fp16's dynamic loss scaler; loading a checkpoint puts another in its place."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None) if self.engine.fp16_enabled() else None
        return scaler if getattr(scaler, "dynamic", False) else None

    def _take_scaler(self) -> None:
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # the sentence in `_end_where_hopeless` says what to change
        self._scale = self._scaler and self._scaler.cur_scale

    def _spikes(self, state: TrainState, loss: float) -> bool:
        recent, settings = state.recent_losses, self.config.spike
        if len(recent) < settings.window or not is_spike(loss, recent, settings.factor):
            return False
        self.monitor.say(
            f"step {state.step}: the loss spikes to {loss:.3f}, and the median of the last {len(recent)} is "
            f"{median(recent):.3f} ({self._rows(state)})"
        )
        return True

    def _end_where_hopeless(self, state: TrainState) -> None:
        if self._hopeless or state.skipped_in_a_row > self.config.max_skipped_in_a_row:
            self.checkpoints.settle()  # so that what is named is all that there is
        if self._hopeless:
            raise TrainingError(
                f"step {state.step}: fp16's loss scale is at its minimum ({self._scaler.min_scale:g}) and the gradients "
                "overflow still; train in bf16, or lower learning_rate, or lower fp16.min_loss_scale in the JSON; "
                f"the last checkpoint is {self._last_checkpoint()}"
            )
        if state.skipped_in_a_row > self.config.max_skipped_in_a_row:
            raise TrainingError(
                f"{state.skipped_in_a_row} steps in a row were not finite or had no token to learn, up to step {state.step} "
                f"({self._rows(state)}); the last checkpoint is {self._last_checkpoint()}; lower learning_rate, or look at "
                "those rows; max_skipped_in_a_row sets how many are tolerated"
            )

    def _rows(self, state: TrainState) -> str:
        return f"rows at positions {state.position - self.config.global_batch_rows} to {state.position - 1}"

    def _loadable(self) -> Path:
        """The newest whole checkpoint, in its universal form where this run went on from other ranks' and has none yet.

        Damaged ones after it are set aside: under their names their steps would not be saved again.
        """
        checkpoint, passed_over = find_checkpoint(self.run, "auto")
        checkpoint, renamed = make_newest(self.run, checkpoint)
        for note in (*passed_over, *renamed):
            self.monitor.say(note)
        experts_over = self.engine.config.get("expert_parallel", {}).get("autoep_size", 1)
        return for_ranks(checkpoint, dist.get_world_size(), experts_over)[0]

    def _newest(self) -> str | None:
        """The newest checkpoint's name, as rank 0 sees it: a shared file system may show a new file late to the others."""
        found = [self.run.latest.read_text().strip() if self.run.latest.exists() else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _last_checkpoint(self) -> str:
        latest = self.run.latest
        return str(self.run.checkpoints / latest.read_text().strip()) if latest.exists() else "none"
