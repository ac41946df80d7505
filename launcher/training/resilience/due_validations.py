"""Which steps are validated, and what becomes of a validation that a signal or lost data kept from its end.

The step is saved all the same. The start that goes on from it makes the validation up before it takes another step.
"""

from __future__ import annotations

import time

import torch.distributed as dist

from data_pipeline.errors import DataError
from launcher.config import RunConfig
from launcher.training.checkpoints.checkpoint import TrainState
from launcher.training.checkpoints.saver import CheckpointSaver
from launcher.training.monitoring.monitor import Monitor
from launcher.training.monitoring.validation import Validation
from launcher.training.resilience.stopping import StopRequest
from launcher.training.resilience.watchdog import Watchdog


class DueValidations:
    """Validates where it is due; every method but `is_missed` is called by all ranks at the same step boundary."""

    def __init__(
        self,
        engine,
        config: RunConfig,
        validation: Validation,
        monitor: Monitor,
        checkpoints: CheckpointSaver,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self._engine = engine
        self._may_skip = config.on_bad_shard == "skip"
        self._validation = validation
        self._monitor = monitor
        self._checkpoints = checkpoints
        self._stop = stop
        self._watchdog = watchdog
        self._lost: str | None = None

    def is_missed(self, state: TrainState) -> bool:
        """Whether the step that a start goes on from should have been validated and was not."""
        return 0 < state.step != state.validated_step and self._validation.is_due(state.step)

    def make_up(self, state: TrainState) -> None:
        """Validate the step that the run goes on from where that was missed, and note it in that step's checkpoint."""
        missed = [self.is_missed(state)]
        dist.broadcast_object_list(missed, src=0)  # a shared file system may show another rank an older manifest
        if not missed[0]:
            return
        self._monitor.say(f"step {state.step} was saved without its validation, which is made up now")
        self._validate(state, first=True)
        if state.validated_step == state.step:
            self._monitor.flush()  # a start that finds the note will not make these points again
            self._checkpoints.note(state)

    def validate_if_due(self, state: TrainState) -> None:
        """Look at every held-out row once, and note in `state` where it is the best so far; nothing else changes.

        A signal interrupts it, and then it counts for nothing. Where held-out rows cannot be read the run goes on
        without this validation (`on_bad_shard` is skip), or all ranks are to stop, and `raise_lost` says why.
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
            self._monitor.say(f"{what} is broken off: the run was asked to stop")
            return
        result, answers = found
        is_best = state.note_validation(result.cross_entropy, self._validation.of)
        self._monitor.validated(state.step, result, is_best, answers, time.perf_counter() - begin)

    def _give_up(self, step: int, error: DataError) -> None:
        if self._may_skip:
            self._monitor.say(f"on_bad_shard is skip, so step {step} goes without its validation: {error}")
            return
        self._lost = (
            f"{error}; step {step} is saved and training goes on there, with this validation first, when it is started "
            "again; on_bad_shard=skip does without what cannot be read"
        )
        self._stop.agreed = True

    def raise_lost(self) -> None:
        """Raise `DataError` on all ranks where a validation could not read its rows."""
        if self._lost is not None:
            raise DataError(self._lost)
