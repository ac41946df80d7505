"""The learning rate as a pure function of the step, so that a checkpoint need not hold its state."""

from __future__ import annotations

import math

from launcher.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of step `step` (from 0, counting skipped steps).

    A linear warm-up over `warmup_steps` is followed by `schedule.cycles` cosine cycles from the peak to `minimum_ratio` of
    it. Each cycle is `multiplier` times as long as the previous one, and the last ends at `schedule.steps`; after it the
    minimum is kept. After the warm-up this equals torch's `CosineAnnealingWarmRestarts`, stepped once a step.
    """
    peak, schedule = config.learning_rate, config.schedule
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    minimum = peak * schedule.minimum_ratio
    annealed = (schedule.steps or config.max_steps) - config.warmup_steps
    passed = float(step - config.warmup_steps)
    if passed >= annealed:
        return minimum
    lengths = [schedule.multiplier**cycle for cycle in range(schedule.cycles)]
    length = annealed / sum(lengths)  # of the first cycle
    while passed >= length:
        passed, length = passed - length, length * schedule.multiplier
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * passed / length)) / 2
