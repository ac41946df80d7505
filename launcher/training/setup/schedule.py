"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from launcher.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of attempted step `step` (from 0).

    A linear warm-up over `warmup_steps`, then `schedule.cycles` cosine cycles from the peak to `minimum_ratio` of it,
    each `multiplier` times as long as the one before; the last ends at `schedule.steps`, and the minimum holds after
    it. Equal to torch's `CosineAnnealingWarmRestarts` stepped once a step after the warm-up.
    """
    peak, schedule = config.learning_rate, config.schedule
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    minimum = peak * schedule.minimum_ratio
    annealed = (schedule.steps or config.max_steps) - config.warmup_steps
    passed = step - config.warmup_steps
    if passed >= annealed:
        return minimum
    lengths = [schedule.multiplier**cycle for cycle in range(schedule.cycles)]
    length = annealed / sum(lengths)  # of the first cycle
    while passed >= length:
        passed, length = passed - length, length * schedule.multiplier
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * passed / length)) / 2
