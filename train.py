"""Train a Liquid Foundation Model with DeepSpeed.

    deepspeed train.py --deepspeed_config ds_configs/zero3.json [--config run.yaml] [key=value ...]

With nothing else given it trains the built-in sample (launcher/configs/sample.yaml), preparing it first.
"""

from __future__ import annotations

import argparse
import signal
import sys

import torch
import torch.distributed as dist

from data_pipeline.loader import BatchStream
from data_pipeline.shards import ShardFolder
from launcher.checkpoint import TrainState, load_checkpoint, save_checkpoint
from launcher.config import DEFAULT_CONFIG
from launcher.engine import build_engine, expert_parallel_size, loss_scale, set_learning_rate, start_process_group
from launcher.environment import detect_environment, export_for_torch
from launcher.errors import one_sentence_errors
from launcher.model_source import build_model
from launcher.monitor import Monitor, loss_values
from launcher.plan import make_plan, share_plan
from launcher.run_folder import RunFolder
from launcher.schedule import learning_rate
from model.loss import total_loss

STOPPED_AT_A_SIGNAL = 75


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    environment = detect_environment()
    export_for_torch(environment)
    plan = run = None
    if environment.is_main:
        plan, run = make_plan(options.config, options.overrides, options.deepspeed_config, environment)
    start_process_group(environment)
    plan = share_plan(plan)
    config = plan.config

    data = ShardFolder(config.data)
    stream = BatchStream(
        data, seed=config.seed, global_batch_rows=config.global_batch_rows,
        micro_batch_rows=plan.deepspeed["train_micro_batch_size_per_gpu"], rank=environment.rank,
        world_size=environment.world_size, loss_on=config.loss_on,
    )  # fmt: skip
    model = build_model(config, data)
    sizes = model.config
    engine = build_engine(model, plan.deepspeed)
    state = TrainState.initial(sizes.num_hidden_layers, sizes.num_experts, sizes.embedding_target_ratio)
    if plan.checkpoint is not None:
        state = load_checkpoint(engine, plan.checkpoint)
    stream.position = state.position

    folder = run or RunFolder(config.output)
    monitor = Monitor(folder.tensorboard, state.step + 1, config.max_steps, environment.is_main)
    for note in plan.notes:
        monitor.say(note)
    if state.step >= config.max_steps:
        monitor.say(f"{folder.path} is at step {state.step} already; set max_steps above that to go on")
    elif environment.is_main:
        folder.write_status("running", state.step)
    # Only now: while ranks still wait for one another, a signal should end them at once, not at a step boundary.
    stop, stopped = StopRequest(), False
    outcome = "failed"
    try:
        while state.step < config.max_steps and not stopped:
            monitor.step_begins()
            stopped = train_step(engine, stream, state, config, environment, monitor, stop)
            if state.step % config.checkpoint_every == 0 or state.step == config.max_steps or stopped:
                save_checkpoint(
                    engine,
                    folder,
                    state,
                    environment,
                    data.fingerprint,
                    expert_parallel_size(engine),
                    config.keep_checkpoints,
                )
        outcome = "stopped" if stopped else "done"
    finally:
        monitor.close()
        if environment.is_main:
            reasons = {"done": "", "stopped": "signal", "failed": repr(sys.exception())}
            folder.write_status(outcome, state.step, reasons[outcome])
    if environment.is_main:
        monitor.say(f"{outcome} at step {state.step}: run {folder.path}, logs {folder.tensorboard}")
        folder.release()
    dist.barrier()
    return STOPPED_AT_A_SIGNAL if stopped else 0


def train_step(engine, stream, state, config, environment, monitor, stop) -> bool:
    """Take one global batch through the engine and advance `state`; True when a rank was asked to stop.

    The loss is a mean over the global batch's tokens, so their number is agreed on before the first backward. DeepSpeed
    averages gradients over ranks and micro-batches: the factor `world · accumulation` turns its average into our sum.
    """
    micro_batches = stream.next_step()
    pad = engine.module.config.pad_token_id
    counts = torch.tensor(
        [
            sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches),
            sum(int((batch["input_ids"] != pad).sum()) for batch in micro_batches),
            int(stop.requested),
        ],
        device=environment.device, dtype=torch.float64,
    )  # fmt: skip
    dist.all_reduce(counts)
    supervised, tokens, stops = counts.tolist()
    state.step += 1
    state.position = stream.position
    if supervised == 0:
        monitor.say(f"step {state.step} is skipped: its batch has no supervised token (loss_on={config.loss_on})")
        return stops > 0
    rate = learning_rate(config, state.step - 1)
    set_learning_rate(engine, rate)

    scale = environment.world_size * len(micro_batches)
    means = state.running_means
    totals = None
    for batch in micro_batches:
        batch = {name: tensor.to(environment.device, non_blocking=True) for name, tensor in batch.items()}
        output = engine(**batch, running_means=means)
        engine.backward(scale * total_loss(output.loss_sums, config.loss, supervised, tokens))
        engine.step()
        sums = {**output.loss_sums, **output.statistics}
        flat = torch.cat([value.detach().double().flatten() for value in sums.values()])
        totals = flat if totals is None else totals + flat
    dist.all_reduce(totals)
    parts = totals.cpu().split([value.numel() for value in sums.values()])
    totals = {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts, strict=True)}

    routing, ratio = totals["routing"] / tokens, totals["retained_ratio"] / tokens
    state.running_means = means.updated(routing.float(), ratio.float())
    state.tokens += int(tokens)
    values = loss_values({name: total.item() for name, total in totals.items() if not total.dim()}, supervised, tokens)
    values["train/loss"] = sum(config.loss.of(tag.removeprefix("train/")) * value for tag, value in values.items())
    values |= {"train/learning_rate": rate, "train/grad_norm": float(engine.get_global_grad_norm()),
               "model/retained_ratio": ratio.item()}  # fmt: skip
    if (fp16_scale := loss_scale(engine)) is not None:
        values["train/loss_scale"] = fp16_scale
    monitor.step_ended(state.step, values, totals["load"], int(tokens))
    return stops > 0


class StopRequest:
    """SIGTERM or SIGUSR1 ask for a stop at the next step boundary, with a checkpoint."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._request)

    def _request(self, number, frame) -> None:
        self.requested = True


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Run keys (data, output, model, max_steps, resume, ...): launcher/config.py and the README.",
    )  # fmt: skip
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON, usually ds_configs/zero3.json")
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), help="run configuration, YAML (default: the sample)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run configuration")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    with one_sentence_errors():
        code = main()
    dist.destroy_process_group()
    sys.exit(code)
