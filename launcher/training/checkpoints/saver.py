"""Save checkpoints without waiting for the disk; a full disk does not end the run.

1. DeepSpeed writes `<tag>.partial/` while training waits.
2. Each rank hashes and syncs its own files in a thread.
3. At the first step boundary after all ranks are done, rank 0 writes the manifest, renames the folder and replaces
   `latest`.
4. Older checkpoints are deleted.

A failure on any rank fails that one save, on all ranks together.
"""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - sets variables that DeepSpeed reads on import

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from data_pipeline.files import sync_folder
from launcher.deepspeed_json import expert_parallel_size
from launcher.errors import DiskError
from launcher.files import replace_text
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState, best_checkpoint, complete_checkpoints
from launcher.training.checkpoints.manifest import MANIFEST, describe_durably, write_manifest
from launcher.training.checkpoints.universal import note_train_state


class FileWriter(TorchCheckpointEngine):
    """Write DeepSpeed's files of one save, and record the first failure instead of raising it.

    If a rank left DeepSpeed's save early, the others would wait in its collectives. `files`: the names that this rank
    has written; `error`: why a file could not be written, or None.
    """

    def __init__(self, config: deepspeed.DeepSpeedConfig):
        super().__init__(config)
        self.files: list[str] = []
        self.error: str | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = str(error)

    def save(self, state_dict: dict, path: str) -> None:
        if self.error is not None:
            return
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self.error = f"{os.path.basename(path)}: {_reason(error, path)}"
            for name in (*self.files, os.path.basename(path)):  # free their space on the full disk
                Path(path).with_name(name).unlink(missing_ok=True)
        else:
            self.files.append(os.path.basename(path))


def _reason(error: Exception, path: str) -> str:
    """Return the operating system's error for a failed write, from one more write: torch only says that a file is short."""
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
    except OSError as cause:
        return cause.strerror or str(cause)
    return str(error).splitlines()[0]


@dataclass
class PendingSave:
    """A save whose files are written but that is not published yet.

    `described` yields this rank's part of the manifest, and an error (None if there was none).
    """

    tag: str
    manifest: dict
    described: Future[tuple[dict, str | None]]


class CheckpointSaver:
    """Save the checkpoints of a run; all ranks call every method at the same step boundary.

    seconds_blocked: how long training has waited for the newest save so far.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        run: RunFolder,
        data_fingerprint: str,
        keep: int,
        say: Callable[[str], None],
    ):
        self.seconds_blocked = 0.0
        self._engine = engine
        self._run = run
        self._fingerprint = data_fingerprint
        self._keep = keep
        self._say = say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: PendingSave | None = None
        self._failure: str | None = None  # of the newest save
        # DeepSpeed's recovery script does not support parallel experts under ZeRO-3, but `lfm export` does. Copying the
        # script could also fail on rank 0 alone.
        engine._copy_recovery_script = lambda folder: None

    def save(self, state: TrainState) -> float | None:
        """Write the files of the checkpoint of `state.step` unless it exists; settle a pending save first.

        Returns the seconds that training waited, or None if the checkpoint already existed.
        """
        begun = time.perf_counter()
        self.settle()
        tag = f"step-{state.step:08d}"
        if self._is_saved(tag, state.step):
            return None
        started = time.perf_counter()
        partial = self._run.checkpoints / f"{tag}.partial"
        writer = self._engine.checkpoint_engine = FileWriter(self._engine._config)
        # The other ranks wait for rank 0 inside save_checkpoint before they write.
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # left by a failed attempt; remaining files are overwritten
        self._engine.save_checkpoint(str(self._run.checkpoints), tag=partial.name, save_latest=False)
        manifest = {
            "train_state": asdict(state),
            "data_fingerprint": self._fingerprint,
            "world_size": dist.get_world_size(),
            "expert_parallel_size": expert_parallel_size(self._engine.config),
        }
        described = self._thread.submit(_describe_written, partial, writer)
        self._pending = PendingSave(tag, manifest, described)
        self.seconds_blocked = time.perf_counter() - started
        return time.perf_counter() - begun

    def note(self, state: TrainState) -> None:
        """Add the validation result, which came after the save, to the checkpoint of `state.step`."""
        if dist.get_rank() != 0:
            return
        folder = self._run.checkpoints / f"step-{state.step:08d}"
        try:
            note_train_state(folder, asdict(state))
            delete_old(self._run, self._keep)
        except (OSError, ValueError) as error:  # reported only: the other ranks do not wait for the outcome
            self._say(f"the validation could not be recorded in {folder}: {error}; the next checkpoint will hold it")

    def _is_saved(self, tag: str, step: int) -> bool:
        """Return whether rank 0 finds nothing to save; replacing a checkpoint would leave a moment without one."""
        saved = torch.tensor(float(step == 0 or (self._run.checkpoints / tag / MANIFEST).is_file()))
        saved = saved.to(self._engine.device)
        dist.broadcast(saved, src=0)
        return bool(saved.item())

    def publish_when_written(self) -> None:
        """Publish the pending save if all ranks' files are on the disk."""
        if self._pending is None:
            return
        started = time.perf_counter()
        unwritten = torch.tensor(float(not self._pending.described.done()), device=self._engine.device)
        dist.all_reduce(unwritten)
        self.seconds_blocked += time.perf_counter() - started
        if unwritten.item() == 0:
            self.settle()

    def settle(self, last: bool = False) -> None:
        """Wait for a pending save and publish it, or remove it if a rank failed.

        `last`: this is the final save. If it failed, `finish` reports that, because no later save makes up for it.
        """
        if self._pending is None:
            return
        started = time.perf_counter()
        pending, self._pending = self._pending, None
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, pending.described.result())
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error]
        verdict = [errors[0] if errors else None]
        if dist.get_rank() == 0:
            if not errors:
                files = {name: description for part, _ in parts for name, description in part.items()}
                verdict = [self._publish(pending, files)]
            if verdict[0]:
                shutil.rmtree(self._run.checkpoints / f"{pending.tag}.partial", ignore_errors=True)
        dist.broadcast_object_list(verdict, src=0)
        self._failure = verdict[0] and f"{pending.tag} could not be saved to {self._run.checkpoints} ({verdict[0]})"
        self.seconds_blocked += time.perf_counter() - started
        if self._failure and not last:
            self._say(
                f"checkpoint {self._failure}; training continues, and the next checkpoint is attempted on schedule"
            )
        elif not self._failure:
            self._say(f"checkpoint {pending.tag} is saved; training waited {self.seconds_blocked:.2f} s for it")

    def finish(self) -> None:
        """Wait for the last save. Raises `DiskError` if it failed, because the run's end would be lost."""
        self.settle(last=True)
        self._thread.shutdown()
        if self._failure:
            complete = complete_checkpoints(self._run)
            newest = f"the newest one is {complete[0].name}" if complete else "there is none yet"
            raise DiskError(
                f"the last checkpoint {self._failure}; {newest}; free disk space there and start again to resume"
            )

    def _publish(self, pending: PendingSave, files: dict[str, dict]) -> str | None:
        """On rank 0, write the manifest, rename, update `latest` and delete old checkpoints; return a failure or None."""
        folder = self._run.checkpoints / pending.tag
        partial = folder.with_name(f"{pending.tag}.partial")
        try:
            write_manifest(partial, {**pending.manifest, "files": files})
            if folder.exists():
                shutil.rmtree(folder)  # a folder without a manifest
            os.rename(partial, folder)
            sync_folder(self._run.checkpoints)
            replace_text(self._run.latest, f"{pending.tag}\n")
        except OSError as error:
            return f"rank 0: {error.strerror or error}"
        try:
            delete_old(self._run, self._keep)
        except OSError as error:
            self._say(f"an old checkpoint could not be deleted: {error}")
        return None


def _describe_written(partial: Path, writer: FileWriter) -> tuple[dict, str | None]:
    if writer.error is None:
        try:
            return describe_durably(partial, writer.files), None
        except OSError as error:  # some file systems report a full disk only on sync
            writer.error = str(error)
    return {}, writer.error


def delete_old(run: RunFolder, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the best; delete converted ones whose checkpoint is gone."""
    complete = complete_checkpoints(run)
    best = best_checkpoint(complete)
    for old in complete[keep:]:
        if old != best:
            _delete(old)
    for universal in run.checkpoints.glob("universal-*[0-9]"):
        if not run.checkpoints.joinpath(universal.name.removeprefix("universal-")).exists():
            _delete(universal)


def _delete(folder: Path) -> None:
    # The next start deletes `.partial` folders, so a crash never leaves a half-deleted checkpoint under its own name.
    shutil.rmtree(folder.rename(folder.with_suffix(".partial")))
