"""Decide for `slurm/train.sbatch`: the run folder, whether to start, and what happens to the job afterwards.

    python -m launcher.cluster.batch_job folder ARGUMENTS OF train.py
    python -m launcher.cluster.batch_job begins RUN_FOLDER HOST...
    python -m launcher.cluster.batch_job checked RUN_FOLDER EXIT_CODE HOST...
    python -m launcher.cluster.batch_job ended RUN_FOLDER EXIT_CODE SIGNAL HOST...

Each command prints its answer on stdout:

- folder: the run folder;
- begins: `go` or `hold`;
- checked: `go`, `fail`, `hold` or `retry [HOST to avoid]...`;
- ended: `done`, `retry [HOST to avoid]...`, `hold` or `fail`.

The reason goes to stderr. All state is in the run folder, since a requeued job may start on another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launcher.config_file import add_run_arguments, load_run_config
from launcher.errors import ConfigurationError, one_sentence_errors
from launcher.exit_codes import HUNG, LOST

FRUITLESS_STARTS = 3  # in a row, without a new checkpoint between them


class JobLog:
    """The log of starts and ends of batch jobs in a run folder: `jobs.jsonl`, one line for each."""

    def __init__(self, folder: Path, job: str, restart: int) -> None:
        self.folder, self.job, self.restart = folder, job, restart
        self._file = folder / "jobs.jsonl"

    def note(self, event: str, **facts: Any) -> None:
        """Append a line for this job: the event (`begins` or `ended`), the time and the newest checkpoint."""
        line = {"event": event, "job": self.job, "restart": self.restart, "time": time.time()}
        line |= {"checkpoint": self.newest_checkpoint(), **facts}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ConfigurationError(f"cannot write {self._file}: {error.strerror}; set another output") from error

    def newest_checkpoint(self) -> str | None:
        """Return the checkpoint that `latest` names."""
        latest = self.folder / "latest"
        return latest.read_text().strip() if latest.exists() else None

    def fruitless(self) -> int:
        """Count this job's last consecutive starts without a new checkpoint.

        A hold resets the count: a user who releases the job has presumably fixed the cause.
        """
        count = 0
        for line in reversed(self._of_this_job()):
            if line.get("verdict") == "hold" or line["checkpoint"] != self.newest_checkpoint():
                break
            count += line["event"] == "begins"
        return count

    def began_at(self) -> float:
        """Return when this attempt started, in seconds since 1970."""
        return max((line["time"] for line in self._of_this_job() if line["event"] == "begins"), default=0.0)

    def _of_this_job(self) -> list[dict]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [event for event in map(_event, lines) if event.get("job") == self.job]


def begin(log: JobLog, hosts: list[str]) -> str:
    """Return `hold` if the last starts of this job made no progress, for example if a node died each time; else `go`."""
    if log.fruitless() >= FRUITLESS_STARTS:
        return _hold(log, "begins", hosts=hosts)
    log.note("begins", hosts=hosts)
    _preflight_report(log).unlink(missing_ok=True)
    return "go"


def check(log: JobLog, code: int, hosts: list[str]) -> str:
    """Decide from preflight's report and srun's exit `code` whether training may begin.

    A red line about settings ends the job, since another start would fail in the same way. A red line about machines
    requeues the job on other machines. If preflight did not finish, there is no report, and training begins.
    """
    file = _preflight_report(log)
    if not file.exists():
        _say(f"preflight did not finish (code {code}); training begins anyway")
        return "go"
    report = json.loads(file.read_text())
    if report["level"] != "red":
        return "go"
    if report["suspects"] is None:
        _say("error: the run would fail; preflight's table above says what to change")
        return _ended(log, "fail", code=code, signal="", state="preflight")
    suspects = _among(hosts, report["suspects"])
    _say(f"preflight found faulty machines (suspected: {', '.join(suspects) or 'no host'})")
    return _ended(log, " ".join(["retry", *suspects]), code=code, signal="", state="preflight")


def end(log: JobLog, code: int, signal: str, hosts: list[str]) -> str:
    """Decide what happens to the job after srun's exit `code`, and the `signal` that asked for a stop (empty: none).

    srun's code is the highest of all ranks, including those that `--kill-on-bad-exit` killed, so it is unreliable.
    `status.json` counts instead, if this attempt wrote it, and the stacks that this attempt's watchdogs wrote.
    """
    status = _own_status(log)
    state = status.get("state", "none")
    if state == "done":
        verdict = "done"
    elif state == "stopped" or _ended_before_training(state, code, signal):
        verdict = "retry"
    elif code == LOST or status.get("suspects"):
        # A signal during start-up kills the ranks that have no handler yet. Their machines are not at fault.
        suspects = [] if signal else _among(hosts, status.get("suspects", ()))
        _say(f"communication or a device failed (suspected: {', '.join(suspects) or 'no host'})")
        verdict = " ".join(["retry", *suspects])
    elif code == HUNG or _has_hung(log):
        _say(f"the run hung; the stacks of the ranks are in {log.folder}/stacks")
        verdict = "retry"
    else:
        _say(f"error: the run ended with code {code} and state '{state}'; the ranks' output above has the cause")
        verdict = "fail"
    return _ended(log, verdict, code=code, signal=signal, state=state)


def _ended(log: JobLog, verdict: str, **facts: Any) -> str:
    if verdict.startswith("retry") and log.fruitless() >= FRUITLESS_STARTS:
        return _hold(log, "ended", **facts)
    _note_verdict(log, "ended", verdict, **facts)
    return verdict


def _note_verdict(log: JobLog, event: str, verdict: str, **facts: Any) -> None:
    try:
        log.note(event, verdict=verdict, **facts)
    except ConfigurationError as error:  # for example a full disk: the verdict matters more than its log line
        _say(f"warning: {error}")


def _among(hosts: list[str], named: Iterable[str]) -> list[str]:
    """Return the job's hosts that are in `named`."""
    return [host for host in hosts if any(_is_same_host(host, name) for name in named)]


def _is_same_host(one: str, other: str) -> bool:
    """Whether two names can mean the same machine. One may include the domain, and the other not."""
    is_short = "." not in one or "." not in other
    return one == other or (is_short and one.partition(".")[0] == other.partition(".")[0])


def _preflight_report(log: JobLog) -> Path:
    return log.folder / "preflight.json"


def _event(line: str) -> dict:
    """Parse a line of the log; return nothing for a line that a power cut truncated."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _hold(log: JobLog, event: str, **facts: Any) -> str:
    _note_verdict(log, event, "hold", **facts)
    newest = log.newest_checkpoint() or "the beginning"
    _say(
        f"error: {FRUITLESS_STARTS} starts in a row got no further than {newest}, so the job is held; "
        "the log above says what ended them"
    )
    return "hold"


def _own_status(log: JobLog) -> dict:
    """Return `status.json` if this attempt wrote it; it may be left over from an earlier attempt."""
    file = log.folder / "status.json"
    status = json.loads(file.read_text()) if file.exists() else {}
    own = (status.get("job"), status.get("restart")) == (log.job, log.restart)
    return status if own else {}


def _ended_before_training(state: str, code: int, signal: str) -> bool:
    """Whether a stop signal ended the ranks while they were still starting, so that nothing was lost."""
    return state in ("none", "starting") and signal != "" and (code == 0 or code > 128)


def _has_hung(log: JobLog) -> bool:
    """Whether a watchdog of this attempt wrote stacks; rank 0's `status.json` does not cover the other ranks."""
    stacks = [file.stat() for file in (log.folder / "stacks").glob("rank-*.txt")]
    return any(stat.st_size > 0 and stat.st_mtime >= log.began_at() for stat in stacks)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def run_folder(arguments: list[str]) -> str:
    """Return the run folder that train.py uses for these arguments.

    Raises `ConfigurationError` if the configuration cannot be read or is invalid.
    """
    parser = argparse.ArgumentParser(prog="train.py")
    parser.add_argument("--deepspeed_config")
    add_run_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    return load_run_config(options.config, options.overrides).output


def main(arguments: list[str]) -> str:
    command, *rest = arguments
    if command == "folder":
        return run_folder(rest)
    folder, *rest = rest
    log = JobLog(Path(folder), os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0)))
    if command == "begins":
        return begin(log, rest)
    if command == "checked":
        code, *hosts = rest
        return check(log, int(code), hosts)
    code, signal, *hosts = rest
    return end(log, int(code), signal, hosts)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports may print, and stdout is reserved for the answer
    with one_sentence_errors(), answers:
        print(main(sys.argv[1:]), file=answers)
