"""Run each benchmark in a process of its own, so that failures, threads and memory of one do not affect another."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.measurement import Options, Result, Row
from tests.benchmarks.registry import Benchmark
from tests.benchmarks.report import row_text

PROJECT = Path(__file__).parents[2]
LONGEST = 900  # seconds of one benchmark, after which it counts as failed
LINES_OF_A_FAILURE = 15


def run_all(benchmarks: Mapping[str, Benchmark], options: Options) -> list[Result]:
    """Run benchmarks one after another, and print which one runs, the time so far, and the figures."""
    results, begun = [], time.monotonic()
    for number, (name, benchmark) in enumerate(benchmarks.items(), start=1):
        print(f"[{_clock(begun)}] {number}/{len(benchmarks)} {name} …", flush=True)
        result = run_one(name, benchmark, options)
        results.append(result)
        for row in result.rows:
            print(f"        {row_text(row)}")
        ending = f"failed: {result.error}" if result.error else "done"
        print(f"[{_clock(begun)}] {name} {ending}, {result.seconds:.0f} s", flush=True)
    return results


def run_one(name: str, benchmark: Benchmark, options: Options) -> Result:
    """Run one benchmark in a process of its own; a failure is in the result, and its last lines are printed."""
    log, answer = options.scratch / f"{name}.log", options.scratch / f"{name}.json"
    command = [sys.executable, "-m", "tests.benchmarks.runner", benchmark.module, benchmark.function,
               json.dumps(options.to_json()), str(answer)]  # fmt: skip
    variables = {**benchmark.variables(), "TMPDIR": str(options.scratch)}  # some peers leave files behind there
    begun, code = time.monotonic(), None
    with log.open("w") as output:
        # In a session of its own, so that the benchmark's workers can be ended with it.
        process = subprocess.Popen(
            command, cwd=PROJECT, env=variables, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process, code)
    seconds = time.monotonic() - begun
    if code == 0:
        return Result(name, seconds, [Row.from_json(row) for row in json.loads(answer.read_text())])
    last_lines = log.read_text(errors="replace").splitlines()[-LINES_OF_A_FAILURE:]
    print("\n".join(f"        {line}" for line in last_lines), file=sys.stderr)
    error = f"took more than {LONGEST} s" if code is None else (last_lines or [f"exit code {code}"])[-1]
    return Result(name, seconds, error=error)


def _end(process: subprocess.Popen, code: int | None) -> None:
    """End processes that a benchmark left running, or kill all of its processes if it did not end by itself."""
    with contextlib.suppress(ProcessLookupError):  # all of the session's processes may have ended
        # TERM leaves multiprocessing's resource trackers, which then remove shared memory.
        os.killpg(process.pid, signal.SIGKILL if code is None else signal.SIGTERM)
    process.wait()


def _clock(begun: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - begun), 60)
    return f"{minutes:2}:{seconds:02}"


def main() -> None:
    """Run one benchmark in this process; the arguments are MODULE FUNCTION OPTIONS ANSWER."""
    module, function, options, answer = sys.argv[1:]
    rows = getattr(importlib.import_module(module), function)(Options.from_json(json.loads(options)))
    Path(answer).write_text(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
