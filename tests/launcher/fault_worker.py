"""One rank of a test: train a run with faults at chosen steps or positions, on one rank or on all."""

import ctypes
import json
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import launcher.run_folder
import launcher.training.resilience.guard
import launcher.training.resilience.watchdog
import train
from launcher.errors import one_sentence_errors
from launcher.training.checkpoints.checkpoint import complete_checkpoints, find_checkpoint
from launcher.training.resilience.failures import recognised_failures
from launcher.training.resilience.leaving import end_process, leave_together

build_engine, train_step = train.build_engine, train.train_step


def build_with_faults(faults: list[dict]):
    """Patch the training so that each fault happens at its `steps` or `positions`, on its `rank` or on every rank."""
    now = {"step": 0, "position": 0}

    def due(*kinds: str) -> list[dict]:
        rank = dist.get_rank()
        return [
            fault
            for fault in faults
            if fault["kind"] in kinds
            and fault.get("rank", rank) == rank
            and (now["step"] in fault.get("steps", []) or now["position"] in fault.get("positions", []))
        ]

    def before(module, arguments):
        for fault in due("hang", "hang_in_c", "kill", "sleep", "terminate"):
            print(f"{fault['kind']} begins", flush=True)
            if fault["kind"] in ("kill", "terminate"):
                os.kill(os.getpid(), signal.SIGKILL if fault["kind"] == "kill" else signal.SIGTERM)
            elif fault["kind"] == "hang_in_c":
                ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
            else:
                time.sleep(fault.get("seconds", 1000))

    def spoil(module, arguments, output):
        for _ in due("nan"):
            output.data.mul_(math.nan)

    def spoil_loss(module, arguments, output):
        for _ in due("infinite"):
            output.loss_sums["z_loss"] = output.loss_sums["z_loss"] + math.inf  # with finite gradients
        for _ in due("spike"):
            output.loss_sums["cross_entropy"] = 20 * output.loss_sums["cross_entropy"]

    def find_after_damage(run, resume):
        for _ in due("damage"):  # just before a rollback looks for its checkpoint
            path = next(complete_checkpoints(run)[0].glob("*optim_states.pt"))
            content = bytearray(path.read_bytes())
            content[1000] ^= 1
            path.write_bytes(content)
        return find_checkpoint(run, resume)

    def build(model, resolved):
        norm = model.model.layers[0].convolution_norm
        norm.register_forward_hook(spoil)
        model.register_forward_pre_hook(before)
        model.register_forward_hook(spoil_loss)
        return build_engine(model, resolved)

    def step(engine, batches, state, *others):
        now.update(step=state.step + 1, position=state.position)
        if due("unlabelled"):  # from this step on
            take = batches.next_step
            batches.next_step = lambda: [{**b, "labels": torch.full_like(b["labels"], -100)} for b in take()]
        train_step(engine, batches, state, *others)

    train.build_engine, train.train_step = build, step
    launcher.training.resilience.guard.find_checkpoint = find_after_damage


def main() -> int:
    arguments, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    if options.get("claim_fp16"):
        get_accelerator().is_fp16_supported = lambda: True
    launcher.training.resilience.watchdog.GRACE = options.get("grace", launcher.training.resilience.watchdog.GRACE)
    launcher.run_folder.STATUS_EVERY = options.get("status_every", launcher.run_folder.STATUS_EVERY)
    if options.get("save_always"):
        launcher.training.resilience.guard.Guard.may_save = lambda *_: True
    build_with_faults(options.get("faults", []))
    with one_sentence_errors(), recognised_failures():
        code = train.main(arguments)
        leave_together()
    return code


if __name__ == "__main__":
    end_process(main())
