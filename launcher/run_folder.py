"""Manage a run's folder: its description, its status, and a lock that keeps out a second job."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO

import yaml

from data_pipeline.errors import DataError
from launcher.attempts import add_attempt, code_version, differences
from launcher.config import RunConfig
from launcher.config_file import as_dict
from launcher.deepspeed_json import expert_parallel_size
from launcher.environment import Environment
from launcher.errors import ConfigurationError, OneSentenceError
from launcher.files import replace_text
from model import LiquidConfig

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "webdataset", "tokenizers", "numpy")
STATUS_EVERY = 60.0  # seconds between updates of the step in `status.json`
UNFINISHED = ("starting", "running")


class RunFolder:
    """A run's output; `model/` holds the model's configuration and tokenizer, `latest` the newest checkpoint's name."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self.latest = self.path / "latest"
        self._lock: IO | None = None
        self._status_time = 0.0

    def claim(self) -> None:
        """Create the folder, lock it until `release` or the process's end, and set its status to `starting`.

        Raises `ConfigurationError` if another job holds the lock, or if the folder cannot be written or locked.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            free = self._take_lock()
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to the run folder {self.path}: {error.strerror}; set another output"
            ) from error
        if not free:
            raise ConfigurationError(f"another job is training in {self.path}; wait for it, or set another output")
        for folder in self.checkpoints.glob("*.partial"):
            shutil.rmtree(folder)  # left by a job that died while saving, converting or deleting it
        self._note_killed_attempt()
        self.write_status("starting", self._last_status().get("step", 0))

    def _take_lock(self) -> bool:
        """Take the lock and return whether it was free. Raises `OSError`, or `ConfigurationError` if locks do not work."""
        lock = open(self.path / "lock", "w")  # noqa: SIM115 - held for the process's life
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        except OSError as error:
            lock.close()
            raise ConfigurationError(
                f"cannot lock {self.path}/lock ({error.strerror}), so a second job could write to the same run; mount the "
                "file system with locks (Lustre: -o flock), or set output to a folder on another one"
            ) from error
        self._lock = lock
        return True

    def refuse(self, error: BaseException) -> None:
        """Record a start that failed before the ranks met: the status becomes `failed`, with the reason.

        Writes nothing if the folder has no earlier run, or if another job holds it.
        """
        if self._lock is None:
            try:
                if not (self._last_status() and self._take_lock()):
                    return
            except (OSError, ConfigurationError):  # nothing can be written; the user sees `error`
                return
            self._note_killed_attempt()
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OneSentenceError | DataError):
            reason = str(error)
        self.write_status("failed", self._last_status().get("step", 0), reason.splitlines()[0])
        self.release()

    def release(self) -> None:
        """Release the lock, so that another job can use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def describe(
        self, config: RunConfig, deepspeed_config: dict, environment: Environment, checkpoint: str | None
    ) -> dict[str, list]:
        """Write `run.yaml`, with everything needed to repeat the run, and add this start to `attempts.jsonl`.

        checkpoint: the one that the run resumes from. Returns what changed since the start before, as
        `{"section.key": [before, now]}`.
        """
        description = {
            "config": as_dict(config),
            "deepspeed": deepspeed_config,
            "world_size": environment.world_size,
            "command": sys.argv,
            **code_version(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
        }
        before = self._description_before()
        replace_text(self.path / "run.yaml", yaml.safe_dump(description, sort_keys=False))
        changed = differences(before, description) if before else {}
        for name in ("command", "commit", "uncommitted_changes", "world_size"):
            changed.pop(name, None)
        facts = {name: description[name] for name in ("world_size", "commit", "uncommitted_changes", "command")}
        facts |= {"expert_parallel_size": expert_parallel_size(deepspeed_config)}
        facts |= {"changed": changed, "checkpoint": checkpoint}
        add_attempt(self.path, "begins", _who() | facts)
        return changed

    def _description_before(self) -> dict:
        try:
            return self.read_description()
        except ConfigurationError:  # missing in a new run; if broken, there is nothing to compare with
            return {}

    def read_description(self) -> dict:
        """Read the `run.yaml` of the last attempt. Raises `ConfigurationError` if it is missing or broken."""
        path = self.path / "run.yaml"
        try:
            description = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            description = " ".join(str(error).split())
        if not isinstance(description, dict) or "config" not in description:
            raise ConfigurationError(
                f"cannot read {path}, which describes how the run's checkpoints were trained ({description}); restore it, "
                "or set another output"
            )
        return description

    def began_with(self) -> str | None:
        """Return the folder of the weights that the run started from; None if it started from fresh weights."""
        return self.read_description()["config"].get("init_from")

    def model_config(self) -> LiquidConfig:
        """Read the configuration of the checkpoints' model. Raises `ConfigurationError` if it cannot be read."""
        try:
            return LiquidConfig.from_json_file(self.model / "config.json")
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"cannot read {self.model}/config.json, which describes the model of the checkpoints; restore it (an export "
                "of the run has a copy), or set another output"
            ) from error

    def keep_model_files(self, config: LiquidConfig, tokenizer: Path) -> None:
        """Copy the model's configuration and the tokenizer here, so that the run can be exported without its data."""
        self.model.mkdir(exist_ok=True)
        contents = {file.name: file.read_text() for file in tokenizer.iterdir()}
        contents["config.json"] = config.to_json_string(use_diff=True)
        for name, text in contents.items():
            replace_text(self.model / name, text)

    def write_status(self, state: str, step: int, reason: str = "", suspects: Sequence[str] = ()) -> None:
        """Write `status.json`, with the state `starting`, `running`, `stopped`, `done` or `failed`.

        The last three are also added to `attempts.jsonl`. suspects: hosts to avoid at the next start.
        If the disk is full, the old file is overwritten in place. If that also fails, only warn on stderr: the run, or
        the error that ends it, is more important.
        """
        status = {"state": state, "step": step, "reason": reason, **_who(), "suspects": [*suspects]}
        self._status_time = time.monotonic()
        self._put_status(status)
        if state not in UNFINISHED:
            add_attempt(self.path, "ended", status)

    def note_step(self, step: int) -> None:
        """Update the step in `status.json` every `STATUS_EVERY` seconds; only the rank that holds the lock does so."""
        if self._lock is not None and time.monotonic() - self._status_time > STATUS_EVERY:
            self.write_status("running", step)

    def _last_status(self) -> dict:
        try:
            return json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):  # missing, or half written at a power cut
            return {}

    def _note_killed_attempt(self) -> None:
        """Record that the previous attempt was killed if its status is unfinished although its lock is free."""
        status = self._last_status()
        if status.get("state") not in UNFINISHED:
            return
        host = status.get("host", "its host")
        what = "rank 0" if status["state"] == "running" else "a start"
        status |= {
            "state": "failed",
            "reason": f"{what} was killed, or {host} went down, before it could record how it ended",
        }
        print(
            f"the previous attempt did not end properly: last seen at step {status['step']} ({status.get('time')}), it was "
            f"killed, or {host} went down",
            flush=True,
        )
        self._put_status(status)
        add_attempt(self.path, "ended", status)

    def _put_status(self, status: dict) -> None:
        path, text = self.path / "status.json", json.dumps(status) + "\n"
        try:
            try:
                replace_text(path, text)
            except OSError:
                with open(path, "r+") as file:  # its disk block is already allocated
                    file.write(text)
                    file.truncate()
        except OSError as error:
            print(f"{path} could not be written ({error.strerror}): {text}", end="", file=sys.stderr, flush=True)


def _who() -> dict:
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
