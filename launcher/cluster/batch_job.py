"""What `slurm/train.sbatch` asks: which run folder, whether to start at all, and what becomes of the job afterwards.

    python -m launcher.cluster.batch_job folder ARGUMENTS OF train.py
    python -m launcher.cluster.batch_job begins RUN_FOLDER HOST...
    python -m launcher.cluster.batch_job checked RUN_FOLDER EXIT_CODE HOST...
    python -m launcher.cluster.batch_job ended RUN_FOLDER EXIT_CODE SIGNAL HOST...

It answers on stdout: the folder; `go` or `hold`; `go`, `fail`, `hold` or `retry [HOST to avoid]...`; `done`,
`retry [HOST to avoid]...`, `hold` or `fail`. Why, it says on stderr. All it knows is in the run folder: a job that comes
back may be another machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from launcher.config_file import add_run_arguments, load_run_config
from launcher.errors import ConfigurationError, one_sentence_errors
from launcher.exit_codes import HUNG, LOST

FRUITLESS_STARTS = 3  # in a row, without a new checkpoint between them


class Attempts:
    """The starts and ends of batch jobs in a run folder: `jobs.jsonl`, a line for each."""

    def __init__(self, folder: Path, job: str, restart: int) -> None:
        self.folder, self.job, self.restart = folder, job, restart
        self._file = folder / "jobs.jsonl"

    def note(self, event: str, **facts) -> None:
        """Append a line: `begins` or `ended`, of this job, now, at the newest checkpoint."""
        line = {"event": event, "job": self.job, "restart": self.restart, "time": time.time()}
        line |= {"checkpoint": self.newest_checkpoint(), **facts}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ConfigurationError(f"cannot write {self._file}: {error.strerror}; set output") from error

    def newest_checkpoint(self) -> str | None:
        """What `latest` names."""
        latest = self.folder / "latest"
        return latest.read_text().strip() if latest.exists() else None

    def fruitless(self) -> int:
        """How many starts of this job in a row, up to the last, have brought no checkpoint beyond the newest.

        A hold begins a new count: whoever releases the job has mended something.
        """
        count = 0
        for line in reversed(self._of_this_job()):
            if line.get("verdict") == "hold" or line["checkpoint"] != self.newest_checkpoint():
                break
            count += line["event"] == "begins"
        return count

    def began_at(self) -> float:
        """When this start began, in seconds since 1970."""
        return max((line["time"] for line in self._of_this_job() if line["event"] == "begins"), default=0.0)

    def _of_this_job(self) -> list[dict]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [event for event in map(_event, lines) if event.get("job") == self.job]


def begin(attempts: Attempts, hosts: list[str]) -> str:
    """`hold` where the last starts of this job came to nothing, as where its node died each time; else `go`."""
    if attempts.fruitless() >= FRUITLESS_STARTS:
        return _hold(attempts, "begins", hosts=hosts)
    attempts.note("begins", hosts=hosts)
    _preflight_report(attempts).unlink(missing_ok=True)
    return "go"


def check(attempts: Attempts, code: int, hosts: list[str]) -> str:
    """Whether training may begin, by what preflight has written and srun's exit `code`.

    A red line about settings ends the job, for another start would find the same; one about machines sends it to others.
    Where preflight itself was cut short there is no answer, and the training finds out what is wrong.
    """
    file = _preflight_report(attempts)
    if not file.exists():
        _say(f"preflight came to no end (code {code}); the training begins all the same")
        return "go"
    report = json.loads(file.read_text())
    if report["level"] != "red":
        return "go"
    if report["suspects"] is None:
        _say("error: the run would fail; preflight says above what to change")
        return _ended(attempts, "fail", code=code, signal="", state="preflight")
    suspects = _among(hosts, report["suspects"])
    _say(f"preflight finds machines that will not do (suspected: {', '.join(suspects) or 'no host'})")
    return _ended(attempts, " ".join(["retry", *suspects]), code=code, signal="", state="preflight")


def end(attempts: Attempts, code: int, signal: str, hosts: list[str]) -> str:
    """What becomes of the job after srun's exit `code`, and a `signal` (empty: none) that had asked for a stop.

    srun's code is the highest of its ranks', those among them that `--kill-on-bad-exit` killed, so it lies; what counts
    is `status.json`, where this very attempt wrote it, and the stacks that its watchdogs left.
    """
    status = _own_status(attempts)
    state = status.get("state", "none")
    if state == "done":
        verdict = "done"
    elif state == "stopped" or _ended_before_training(state, code, signal):
        verdict = "retry"
    elif code == LOST or status.get("suspects"):
        # A signal that comes while ranks start kills those that do not listen yet: no fault of their machines.
        suspects = [] if signal else _among(hosts, status.get("suspects", ()))
        _say(f"communication failed, or a device did (suspected: {', '.join(suspects) or 'no host'})")
        verdict = " ".join(["retry", *suspects])
    elif code == HUNG or _has_hung(attempts):
        _say(f"the run hung; every rank's stack is in {attempts.folder}/stacks")
        verdict = "retry"
    else:
        _say(f"error: the run ended with code {code} and state '{state}'; the ranks' lines above say why")
        verdict = "fail"
    return _ended(attempts, verdict, code=code, signal=signal, state=state)


def _ended(attempts: Attempts, verdict: str, **facts) -> str:
    if verdict.startswith("retry") and attempts.fruitless() >= FRUITLESS_STARTS:
        return _hold(attempts, "ended", **facts)
    _note_verdict(attempts, "ended", verdict, **facts)
    return verdict


def _note_verdict(attempts: Attempts, event: str, verdict: str, **facts) -> None:
    try:
        attempts.note(event, verdict=verdict, **facts)
    except ConfigurationError as error:  # a full disk; what the job does next counts for more than the line about it
        _say(f"warning: {error}")


def _among(hosts: list[str], named: Iterable[str]) -> list[str]:
    """Those of the job's hosts that are named."""
    return [host for host in hosts if any(_is_same_host(host, name) for name in named)]


def _is_same_host(one: str, other: str) -> bool:
    """Whether two names can mean one machine: SLURM and the machine itself may differ in giving the domain or not."""
    is_short = "." not in one or "." not in other
    return one == other or (is_short and one.partition(".")[0] == other.partition(".")[0])


def _preflight_report(attempts: Attempts) -> Path:
    return attempts.folder / "preflight.json"


def _event(line: str) -> dict:
    """A line's facts; none where a power cut has left half of it, and the next start has written on."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _hold(attempts: Attempts, event: str, **facts) -> str:
    _note_verdict(attempts, event, "hold", **facts)
    newest = attempts.newest_checkpoint() or "the beginning"
    _say(
        f"error: {FRUITLESS_STARTS} starts in a row got no further than {newest}, so that another would not either; "
        "the log above says what ended them"
    )
    return "hold"


def _own_status(attempts: Attempts) -> dict:
    """`status.json`, if this attempt wrote it: the folder may hold an earlier one's."""
    file = attempts.folder / "status.json"
    status = json.loads(file.read_text()) if file.exists() else {}
    own = (status.get("job"), status.get("restart")) == (attempts.job, attempts.restart)
    return status if own else {}


def _ended_before_training(state: str, code: int, signal: str) -> bool:
    """Asked to stop while the ranks were still starting, and killed by that: nothing is lost, and nothing is wrong."""
    return state in ("none", "starting") and signal != "" and (code == 0 or code > 128)


def _has_hung(attempts: Attempts) -> bool:
    """Whether a watchdog of this attempt wrote stacks; rank 0's `status.json` does not know of the other ranks'."""
    stacks = [file.stat() for file in (attempts.folder / "stacks").glob("rank-*.txt")]
    return any(stat.st_size > 0 and stat.st_mtime >= attempts.began_at() for stat in stacks)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def run_folder(arguments: list[str]) -> str:
    """The run folder that train.py takes for these arguments.

    Raises `ConfigurationError` if the configuration cannot be read, or is wrong.
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
    attempts = Attempts(Path(folder), os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0)))
    if command == "begins":
        return begin(attempts, rest)
    if command == "checked":
        code, *hosts = rest
        return check(attempts, int(code), hosts)
    code, signal, *hosts = rest
    return end(attempts, int(code), signal, hosts)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # importing may print, and stdout is for the answer
    with one_sentence_errors(), answers:
        print(main(sys.argv[1:]), file=answers)
