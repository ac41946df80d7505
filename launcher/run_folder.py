"""A run's folder: what it was started with, how it stands, and a lock against a second live job."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import yaml

from launcher.config import RunConfig, as_dict
from launcher.environment import Environment
from launcher.errors import ConfigurationError
from model import LiquidConfig

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "webdataset", "tokenizers", "numpy")


class RunFolder:
    """What a run leaves behind; `model/` holds its configuration and tokenizer, `latest` the newest checkpoint's name."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self.latest = self.path / "latest"

    def claim(self) -> None:
        """Make the folder and hold its lock until `release` or the process's end.

        Raises `ConfigurationError` where another job holds it, or the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")  # noqa: SIM115 - held for the process's life
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to the run folder {self.path}: {error.strerror}; set output"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"another job is training in {self.path}; wait for it, or set another output"
            ) from error
        for folder in self.checkpoints.glob("*.partial"):
            shutil.rmtree(folder)  # left by a job that died while saving, converting or deleting it
        self._note_killed_attempt()

    def release(self) -> None:
        """Let another job have the folder."""
        self._lock.close()

    def describe(self, config: RunConfig, deepspeed_config: dict, environment: Environment) -> None:
        """Write `run.yaml`: all that is needed to repeat the run."""
        description = {
            "config": as_dict(config),
            "deepspeed": deepspeed_config,
            "world_size": environment.world_size,
            "command": sys.argv,
            "commit": _commit(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
        }
        replace_text(self.path / "run.yaml", yaml.safe_dump(description, sort_keys=False))

    def read_description(self) -> dict:
        """What the last attempt wrote to `run.yaml`."""
        return yaml.safe_load((self.path / "run.yaml").read_text())

    def keep_model_files(self, config: LiquidConfig, tokenizer: Path) -> None:
        """Keep the model's configuration and the tokenizer, so that the run can be exported without its data."""
        self.model.mkdir(exist_ok=True)
        contents = {file.name: file.read_text() for file in tokenizer.iterdir()}
        contents["config.json"] = config.to_json_string(use_diff=True)
        for name, text in contents.items():
            replace_text(self.model / name, text)

    def write_status(self, state: str, step: int, reason: str = "", suspects: list[str] = ()) -> None:
        """Write `status.json`: `running`, `stopped`, `done` or `failed`, and where it is an end, a line of `attempts.jsonl`.

        suspects: hosts to do without next time. Where the disk is full the old file is written over in place; where even
        that fails, a line on stderr says so: the run, or the error that ends it, is more important.
        """
        status = {
            "state": state,
            "step": step,
            "reason": reason,
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "host": socket.gethostname(),
            "suspects": [*suspects],
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self._put_status(status)
        if state != "running":
            self._add_attempt(status)

    def _note_killed_attempt(self) -> None:
        """Say of an attempt that still counts as running, now that its lock is free, that it was killed."""
        try:
            status = json.loads((self.path / "status.json").read_text())
        except (FileNotFoundError, ValueError):
            return
        if status["state"] != "running":
            return
        host = status.get("host", "its host")
        status |= {
            "state": "failed",
            "reason": f"rank 0 was killed, or {host} went down: it could not write how it ended",
        }
        print(
            f"the attempt before this one, begun at step {status['step']}, was killed or lost with {host}", flush=True
        )
        self._put_status(status)
        self._add_attempt(status)

    def _put_status(self, status: dict) -> None:
        path, text = self.path / "status.json", json.dumps(status) + "\n"
        try:
            try:
                replace_text(path, text)
            except OSError:
                with open(path, "r+") as file:  # its block is there already
                    file.write(text)
                    file.truncate()
        except OSError as error:
            print(f"{path} could not be written ({error.strerror}): {text}", end="", file=sys.stderr, flush=True)

    def _add_attempt(self, status: dict) -> None:
        path = self.path / "attempts.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(status) + "\n")
        except OSError as error:
            print(f"{path} could not be written ({error.strerror})", file=sys.stderr, flush=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    if shutil.which("git") is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
