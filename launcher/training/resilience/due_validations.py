"""Decide which steps are validated, and repeat a validation that a signal or lost data interrupted.

The step itself is saved in either case. When the run resumes from it, the validation runs before the next step.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from data_pipeline.errors import DataError
from launcher.training.checkpoints.checkpoint import TrainState
from launcher.training.checkpoints.saver import CheckpointSaver
from launcher.training.monitoring.monitor import Monitor
from launcher.training.monitoring.validation import Validation
from launcher.training.resilience.stopping import StopRequest
from launcher.training.resilience.watchdog import Watchdog

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class DueValidations:
    """Run the validations that are due; all ranks call every method but `is_missed` at the same step boundary."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        validation: Validation,
        monitor: Monitor,
        checkpoints: CheckpointSaver,
        stop: StopRequest,
        watchdog: Watchdog,
        on_bad_shard: str,
    ) -> None:
        self._engine = engine
        self._may_skip = on_bad_shard == "skip"
        self._validation = validation
        self._monitor = monitor
        self._checkpoints = checkpoints
        self._stop = stop
        self._watchdog = watchdog
        self._lost: str | None = None

    def is_missed(self, state: TrainState) -> bool:
        """Return whether the step that the run resumes from should have been validated and was not."""
        return 0 < state.step != state.validated_step and self._validation.is_due(state.step)

    def make_up(self, state: TrainState) -> None:
        """If the resumed step missed its validation, validate it now and record that in its checkpoint."""
        missed = [self.is_missed(state)]
        dist.broadcast_object_list(missed, src=0)  # a shared file system may show another rank an older manifest
        if not missed[0]:
            return
        self._monitor.say(f"step {state.step} was saved without its validation; validating it now")
        self._validate(state, first=True)
        if state.validated_step == state.step:
            self._monitor.flush()  # a later start that finds the record will not write these points again
            self._checkpoints.note(state)

    def validate_if_due(self, state: TrainState) -> None:
        """Evaluate every held-out row once and record the result in `state`; nothing else changes.

        If a signal interrupts it, its result is discarded. If held-out rows cannot be read, then with `on_bad_shard`
        skip the run continues without this validation; otherwise all ranks stop, and `raise_lost` says why.
        """
        if self._validation.is_due(state.step) and not self._stop.agreed:
            self._validate(state)

    def _validate(self, state: TrainState, first: bool = False) -> None:
        engine, what = self._engine, f"validating at step {state.step}"
        begin = time.perf_counter()
        try:
            with self._watchdog.at_each_forward(engine.module, what, first):
                found = self._validation.run(engine, interrupted=lambda: self._stop.agree(engine.device))
        except DataError as error:
            self._give_up(state.step, error)
            return
        if found is None:
            self._monitor.say(f"{what} was interrupted: the run was asked to stop")
            return
        result, answers = found
        is_best = state.note_validation(result.cross_entropy, self._validation.of)
        self._monitor.validated(state.step, result, is_best, answers, time.perf_counter() - begin)

    def _give_up(self, step: int, error: DataError) -> None:
        if self._may_skip:
            self._monitor.say(f"skipping the validation of step {step}, because on_bad_shard is skip: {error}")
            return
        self._lost = (
            f"{error}; step {step} is saved, and the next start repeats this validation and resumes from there; "
            "set on_bad_shard=skip to continue without the unreadable rows"
        )
        self._stop.agreed = True

    def raise_lost(self) -> None:
        """Raise `DataError` on all ranks if a validation could not read its rows."""
        if self._lost is not None:
            raise DataError(self._lost)
