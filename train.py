"""Train a Liquid Foundation Model with DeepSpeed.

    deepspeed train.py --deepspeed_config ds_configs/zero3.json [--config run.yaml] [key=value ...]

With nothing else given it trains the built-in sample (launcher/configs/sample.yaml), preparing it first.
"""

from __future__ import annotations

from launcher.training.loading import loaded  # before all that takes time to load

import argparse

import torch
import torch.distributed as dist

from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.prefetch import Prefetcher
from launcher.config_file import add_run_arguments
from launcher.environment import detect_environment
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
from launcher.training.monitoring.monitor import Monitor
from launcher.training.monitoring.reduction import add_up
from launcher.training.monitoring.validation import Validation, open_validation_data
from launcher.training.plan import make_plan, share_plan
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

loaded()


def main(arguments: list[str] | None = None) -> int:
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
        failures.end(plan.step, error)  # where it has not got to its first step; the loop tells its own
        raise
    return STOPPED if stopped else DONE


def train(plan, run, environment, failures) -> bool:
    """Build what `plan` says and take its steps; tells whether a signal has stopped them."""
    config = plan.config
    data = open_run_data(config)
    stream = BatchStream(
        data, seed=config.seed, global_batch_rows=config.global_batch_rows,
        micro_batch_rows=plan.deepspeed["train_micro_batch_size_per_gpu"], rank=environment.rank,
        world_size=environment.world_size, loss_on=config.loss_on,
    )  # fmt: skip
    model = build_model(config, data, plan.deepspeed, goes_on=run if plan.checkpoint else None)
    state = TrainState.initial(model)
    engine = build_engine(model, plan.deepspeed)
    if plan.checkpoint is not None:
        state = load_checkpoint(engine, plan.checkpoint)
    stream.position = state.position
    batches = AgreedBatches(Prefetcher(stream))

    monitor = Monitor(run.tensorboard, state.step + 1, config, environment.is_main)
    monitor.watch(engine, data.seq_len)
    validation = Validation(config, open_validation_data(config, data), environment.rank, environment.world_size)
    for note in plan.notes:
        monitor.say(note)

    def report(reason: str) -> None:  # where the end is so sudden that nothing below is reached
        if environment.is_main:
            run.write_status("failed", state.step, reason)

    checkpoints = CheckpointSaver(engine, run, data.fingerprint, config.keep_checkpoints, monitor.say)
    # Only now: while ranks still wait for one another, a signal should end them at once, not at a step boundary.
    stop = StopRequest(report)
    watchdog = Watchdog(run.path, environment.rank, config.step_timeout_seconds, report)
    limit_collectives(watchdog.longest)
    guard = Guard(engine, config, run, monitor, checkpoints)
    validations = DueValidations(engine, config, validation, monitor, checkpoints, stop, watchdog)
    first_step = state.step + 1
    try:
        watchdog.begins("waiting for the other ranks", first=True)
        dist.barrier()  # a signal that kills a rank before it listens has to find the run still `starting`
        if environment.is_main and (state.step < config.max_steps or validations.is_missed(state)):
            run.write_status("running", state.step)
        validations.make_up(state)
        while state.step < config.max_steps and not stop.agreed:
            watchdog.begins(f"step {state.step + 1}", first=state.step + 1 == first_step)
            train_step(engine, batches, state, config, monitor, stop, guard)
            run.note_step(state.step)
            checkpoints.publish_when_written()
            if guard.wants_rollback(state):
                watchdog.begins(f"going back from step {state.step}", first=True)  # verifies it all, may convert it
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


def train_step(engine, batches, state, config, monitor, stop, guard) -> None:
    """Take one global batch through the engine and advance `state`.

    The loss is a mean over the global batch's tokens, so their number is agreed on before the first backward, and with
    it whether to stop. DeepSpeed averages gradients over ranks and micro-batches; the factor `scale` makes that a sum.
    """
    monitor.step_begins(state.step + 1)
    micro_batches = [{name: rows.to(engine.device) for name, rows in batch.items()} for batch in batches.next_step()]
    pad = engine.module.config.pad_token_id
    flags = {"stop": stop.requested(engine.device), "lost": batches.lost(engine.device)}
    counts = add_up([
        count_tokens(batch, pad) | flags | {"bad_rows": count_empty_rows(batch, pad)} for batch in micro_batches
    ])  # fmt: skip
    supervised, tokens, stop.agreed = (counts[name].item() for name in ("supervised", "tokens", "stop"))
    if counts["lost"] > 0:
        stop.agreed = 1.0  # with a checkpoint of the step before, whose state this is
        return
    state.step += 1
    state.position = batches.position
    if supervised == 0:
        monitor.say(f"step {state.step} is skipped: its batch has no supervised token (loss_on={config.loss_on})")
        state.skipped_in_a_row += int(tokens > 0)  # not where all its rows are of bad shards
        return
    set_learning_rate(engine, learning_rate(config, state.step - 1))

    scale = dist.get_world_size() * len(micro_batches)
    means, sums = state.running_means, []
    for batch in micro_batches:
        with monitor.timed("forward"):
            output = engine(**batch, running_means=means)
        with monitor.timed("backward"):
            engine.backward(scale * poison(total_loss(output.loss_sums, config.loss, supervised, tokens)))
        monitor.backward_ended()
        with monitor.timed("optimizer"):
            engine.step()
        sums.append(output.loss_sums | output.statistics)
    totals = add_up(sums)

    state.tokens += int(tokens)
    state.running_means = means.updated(
        (totals["routing"] / tokens).float(), (totals["retained_ratio"] / tokens).float()
    )
    bias = torch.tensor(state.balancing_bias)
    # Also where fp16's gradients overflowed and the weights stayed; not where the forward did, whose choices mean nothing.
    if totals["routing"].isfinite().all():
        bias = updated_balancing_bias(bias, totals["load"], config.balancing_rate)
        set_balancing_bias(engine.module, bias)
        state.balancing_bias = bias.tolist()
    values = {**engine_values(engine), "balance/bias_max": bias.abs().max().item()}
    values |= {"data/bad_shard_rows": counts["bad_rows"].item(), "perf/data_seconds": batches.seconds_waited}
    values |= guard.observe(state, total_loss(totals, config.loss, supervised, tokens).item())
    monitor.step_ended(state.step, totals, supervised, tokens, values)


def count_empty_rows(batch: dict[str, torch.Tensor], pad: int) -> torch.Tensor:
    """The rows of a micro-batch that are all padding, as those of a bad shard come where `on_bad_shard` is skip."""
    return (batch["input_ids"] == pad).all(dim=1).sum()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Run keys (data, output, model, max_steps, resume, ...): launcher/configs/README.md.",
    )  # fmt: skip
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON, usually ds_configs/zero3.json")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    add_run_arguments(parser)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    with one_sentence_errors(), recognised_failures():
        code = main()
        leave_together()
    end_process(code)
