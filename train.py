"""Train a Liquid Foundation Model with DeepSpeed.

    deepspeed train.py --deepspeed_config ds_configs/zero3.json [--config run.yaml] [key=value ...]

With nothing else given it trains the built-in sample (launcher/configs/sample.yaml), preparing it first.
"""

from __future__ import annotations

from launcher.training.loading import loaded  # before all that takes time to load

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from data_pipeline.loading.loader import BatchStream
from launcher.config import Loss, RunConfig
from launcher.config_file import add_run_arguments
from launcher.environment import Environment, detect_environment
from launcher.errors import one_sentence_errors
from launcher.exit_codes import DONE, STOPPED
from launcher.process import export_for_torch
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState
from launcher.training.checkpoints.restore import load_checkpoint
from launcher.training.checkpoints.saver import CheckpointSaver
from launcher.training.engine import (
    build_engine,
    engine_values,
    limit_collectives,
    set_learning_rate,
    start_process_group,
)
from launcher.training.monitoring import tags
from launcher.training.monitoring.monitor import Monitor
from launcher.training.monitoring.reduction import add_up
from launcher.training.monitoring.start_summary import start_summary
from launcher.training.monitoring.validation import Validation, open_validation_data
from launcher.training.plan import Plan, make_plan, share_plan
from launcher.training.resilience.data_loss import AgreedBatches
from launcher.training.resilience.due_validations import DueValidations
from launcher.training.resilience.failures import Failures, recognised_failures
from launcher.training.resilience.guard import Guard, poison
from launcher.training.resilience.leaving import end_process, leave_together
from launcher.training.resilience.stopping import StopRequest
from launcher.training.resilience.watchdog import Watchdog
from launcher.training.setup.data_source import open_run_data
from launcher.training.setup.model_source import build_model
from launcher.training.setup.schedule import learning_rate
from model.loss import total_loss
from model.metrics import count_tokens
from model.moe import set_balancing_bias, updated_balancing_bias

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

loaded()


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    options = parse_arguments(arguments)
    environment = detect_environment()
    export_for_torch(environment)
    plan = run = None
    if environment.is_main:
        plan, run = make_plan(options.config, options.overrides, options.deepspeed_config, environment)
    start_process_group(environment)
    plan = share_plan(plan)
    run = run or RunFolder(plan.config.output)
    failures = Failures(run)
    try:
        stopped = train(plan, run, environment, failures)
    except BaseException as error:
        failures.end(plan.step, error)  # before the first step; later failures are reported by the loop
        raise
    return STOPPED if stopped else DONE


def train(plan: Plan, run: RunFolder, environment: Environment, failures: Failures) -> bool:
    """Build what `plan` says and take its steps; return whether a signal has stopped them."""
    config = plan.config
    data = open_run_data(config)
    stream = BatchStream(
        data,
        seed=config.seed,
        global_batch_rows=config.global_batch_rows,
        micro_batch_rows=plan.deepspeed["train_micro_batch_size_per_gpu"],
        rank=environment.rank,
        world_size=environment.world_size,
        loss_on=config.loss_on,
    )
    model = build_model(config, data, plan.deepspeed, goes_on=run if plan.checkpoint else None)
    state = TrainState.initial(model)
    engine = build_engine(model, plan.deepspeed)
    if plan.checkpoint is not None:
        state = load_checkpoint(engine, plan.checkpoint)
    stream.position = state.position
    batches = AgreedBatches(stream)

    monitor = Monitor(run.tensorboard, state.step + 1, config, environment.is_main)
    monitor.watch(engine, data.seq_len)
    validation = Validation(config, open_validation_data(config, data), environment.rank, environment.world_size)
    for line in [*plan.notes, *start_summary(config, plan.deepspeed, model.config, data, environment)]:
        monitor.say(line)

    def report(reason: str) -> None:
        """Note why the run ends, if the process ends so suddenly that nothing below is reached."""
        if environment.is_main:
            run.write_status("failed", state.step, reason)

    checkpoints = CheckpointSaver(engine, run, data.fingerprint, config.keep_checkpoints, monitor.say)
    # Until here a signal ends the process at once. From now on ranks stop together at a step boundary.
    stop = StopRequest(report)
    watchdog = Watchdog(run.path, environment.rank, config.step_timeout_seconds, report)
    limit_collectives(watchdog.longest)
    guard = Guard(engine, config, run, monitor, checkpoints)
    validations = DueValidations(engine, validation, monitor, checkpoints, stop, watchdog, config.on_bad_shard)
    first_step = state.step + 1
    try:
        watchdog.begins("waiting for the other ranks", first=True)
        dist.barrier()  # all ranks handle signals now, so the run no longer counts as `starting`
        if environment.is_main and (state.step < config.max_steps or validations.is_missed(state)):
            run.write_status("running", state.step)
        validations.make_up(state)
        while state.step < config.max_steps and not stop.agreed:
            watchdog.begins(f"step {state.step + 1}", first=state.step + 1 == first_step)
            train_step(engine, batches, state, config, monitor, stop, guard)
            run.note_step(state.step)
            checkpoints.publish_when_written()
            if guard.wants_rollback(state):
                # This verifies the whole checkpoint and may convert it, so it has the first step's time limit.
                watchdog.begins(f"going back from step {state.step}", first=True)
                state = guard.roll_back(state)
                continue
            validations.validate_if_due(state)
            due = state.step % config.checkpoint_every == 0 or state.step == config.max_steps or stop.agreed
            if due and guard.may_save(state):
                watchdog.begins(f"saving step {state.step}")
                monitor.saved(state.step, checkpoints.save(state))
        watchdog.begins("finishing the last save")
        checkpoints.finish()
        batches.raise_lost()
        validations.raise_lost()
        if not stop.agreed:
            guard.check_end(state)
    except BaseException as error:
        failures.end(state.step, error)
        raise
    finally:
        batches.close()
        monitor.close()
        watchdog.close()
    outcome = "stopped" if stop.agreed else "done"
    if environment.is_main:
        run.write_status(outcome, state.step, "signal" if stop.agreed else "")
        monitor.say(f"{outcome} at step {state.step}: run {run.path}, logs {run.tensorboard}")
        run.release()
    return bool(stop.agreed)


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's micro-batches of one step, and what all ranks together know of the step.

    supervised: tokens with a label, over all ranks. tokens: those that are not padding. bad_rows: rows of bad shards.
    is_lost: whether a rank could not read its rows. must_stop: whether a rank was asked to stop.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    supervised: float
    tokens: float
    bad_rows: float
    is_lost: bool
    must_stop: bool


def train_step(
    engine: DeepSpeedEngine,
    batches: AgreedBatches,
    state: TrainState,
    config: RunConfig,
    monitor: Monitor,
    stop: StopRequest,
    guard: Guard,
) -> None:
    """Take one global batch through the engine and advance `state`."""
    monitor.step_begins(state.step + 1)
    batch = agree_on_batch(engine, batches, stop)
    stop.agreed = batch.must_stop or batch.is_lost
    if batch.is_lost:
        return  # the checkpoint is that of the step before
    state.step += 1
    state.position = batches.position
    if batch.supervised == 0:
        monitor.say(f"step {state.step} is skipped: its batch has no supervised token (loss_on={config.loss_on})")
        # A batch of bad shards alone has no text, and is no fault of the run's settings.
        state.skipped_in_a_row += int(batch.tokens > 0)
        return

    set_learning_rate(engine, learning_rate(config, state.step - 1))
    totals = forward_backward(engine, batch, state, config.loss, monitor)
    state.tokens += int(batch.tokens)
    state.running_means = state.running_means.updated(
        (totals["routing"] / batch.tokens).float(), (totals["retained_ratio"] / batch.tokens).float()
    )
    balance_experts(engine, state, totals, config.balancing_rate)
    loss = total_loss(totals, config.loss, batch.supervised, batch.tokens).item()
    values = engine_values(engine) | guard.observe(state, loss)
    values[tags.BIAS_MAX] = torch.tensor(state.balancing_bias).abs().max().item()
    values[tags.BAD_SHARD_ROWS] = batch.bad_rows
    values[tags.DATA_SECONDS] = batches.seconds_waited
    monitor.step_ended(state.step, totals, batch.supervised, batch.tokens, values)


def agree_on_batch(engine: DeepSpeedEngine, batches: AgreedBatches, stop: StopRequest) -> GlobalBatch:
    """Move the next micro-batches to the device, and add up over all ranks what must be known before the first backward.

    The loss is a mean over the global batch's tokens, so their number is needed first.
    """
    device, pad = engine.device, engine.module.config.pad_token_id
    micro_batches = [{name: rows.to(device) for name, rows in batch.items()} for batch in batches.next_step()]
    flags = {"stop": stop.requested(device), "lost": batches.lost(device)}
    counts = add_up(
        [count_tokens(batch, pad) | flags | {"bad_rows": count_empty_rows(batch, pad)} for batch in micro_batches]
    )
    supervised, tokens, bad_rows, lost, asked = (
        counts[name].item() for name in ("supervised", "tokens", "bad_rows", "lost", "stop")
    )
    return GlobalBatch(micro_batches, supervised, tokens, bad_rows, lost > 0, asked > 0)


def forward_backward(
    engine: DeepSpeedEngine, batch: GlobalBatch, state: TrainState, weights: Loss, monitor: Monitor
) -> dict[str, torch.Tensor]:
    """Run all micro-batches and the optimizer; return the loss and routing sums over all ranks.

    DeepSpeed averages gradients over ranks and micro-batches; the factor `scale` turns that mean into a sum.
    """
    scale = dist.get_world_size() * len(batch.micro_batches)
    sums = []
    for rows in batch.micro_batches:
        with monitor.timed("forward"):
            output = engine(**rows, running_means=state.running_means)
        with monitor.timed("backward"):
            loss = total_loss(output.loss_sums, weights, batch.supervised, batch.tokens)
            engine.backward(scale * poison(loss))
        monitor.backward_ended()
        with monitor.timed("optimizer"):
            engine.step()
        sums.append(output.loss_sums | output.statistics)
    return add_up(sums)


def balance_experts(engine: DeepSpeedEngine, state: TrainState, totals: dict[str, torch.Tensor], rate: float) -> None:
    """Move each router's bias by `rate` towards experts that got less than their share of the tokens.

    The update also runs after an fp16 overflow, whose step leaves the weights as they are. It is skipped if the forward
    pass was not finite, because its routing is meaningless.
    """
    if totals["routing"].isfinite().all():
        bias = updated_balancing_bias(torch.tensor(state.balancing_bias), totals["load"], rate)
        set_balancing_bias(engine.module, bias)
        state.balancing_bias = bias.tolist()


def count_empty_rows(batch: dict[str, torch.Tensor], pad: int) -> torch.Tensor:
    """Count the rows of a micro-batch that are all padding: those of bad shards, if `on_bad_shard` is skip."""
    return (batch["input_ids"] == pad).all(dim=1).sum()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Run keys (data, output, model, max_steps, resume, ...): launcher/configs/README.md.",
    )
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON, usually ds_configs/zero3.json")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    add_run_arguments(parser)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    with one_sentence_errors(), recognised_failures():
        code = main()
        leave_together()
    end_process(code)
