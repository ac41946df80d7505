"""The results as one Markdown table, with a description of the machine, and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from tests.benchmarks.measurement import Goal, Options, Result, Row

FOLDER = Path(__file__).parent
README, JSON_FILE = FOLDER / "README.md", FOLDER / "benchmarks.json"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PEERS = ("datasets", "webdataset", "datatrove", "litdata", "mosaicml-streaming")
PACKAGES = ("torch", "deepspeed", "transformers", *PEERS)
HEADER = "| benchmark | what | unit | ours: median (min–max) | peer or limit | its median (min–max) | ratio | goal |"


def machine() -> dict[str, str]:
    """Describe this machine and what is installed on it, without its name or paths."""
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:  # not a Linux with /etc/os-release
        system = platform.system()
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{system}, {platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def number(value: float) -> str:
    """Write a figure with three digits, or all of its digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def spread(figures: Sequence[float]) -> str:
    """Write `median (min–max)`, or only the figure if there is one."""
    middle = number(statistics.median(figures))
    return middle if len(set(figures)) == 1 else f"{middle} ({number(min(figures))}–{number(max(figures))})"


def goal_text(goal: Goal | None, unit: str, is_met: bool | None) -> str:
    """Write a goal, and whether it is met."""
    if goal is None:
        return ""
    suffix = f" {unit} more" if goal.of_difference else "×"
    bounds = [f"≥ {goal.at_least:g}{suffix}"] if goal.at_least is not None else []
    bounds += [f"≤ {goal.at_most:g}{suffix}"] if goal.at_most is not None else []
    verdict = {True: ", met", False: ", **missed**", None: ""}[is_met]
    return " and ".join(bounds) + verdict


def cells(row: Row) -> list[str]:
    """Return the cells of a row from `what` on."""
    ours = spread(row.ours) if row.ours else ""
    theirs = spread(row.theirs) if row.theirs else f"not run: {row.not_run}"
    ratio = f"{number(row.ratio)}×" if row.theirs else ""
    return [row.what, row.unit, ours, row.peer, theirs, ratio, goal_text(row.goal, row.unit, row.meets_goal)]


def row_text(row: Row) -> str:
    """Return a row as one line for the console."""
    what, unit, ours, peer, theirs, ratio, goal = cells(row)
    return f"{what}: {ours or '–'} {unit}; {peer}: {theirs}" + "".join(f"; {text}" for text in (ratio, goal) if text)


def table(results: Sequence[Result]) -> str:
    """Return the Markdown table of all results; a benchmark that failed has one line."""
    lines = [HEADER, "|" + "---|" * HEADER.count(" | ") + "---|"]
    for result in results:
        contents = [cells(row) for row in result.rows]
        if result.error:
            contents.append([f"**failed**: {result.error}", *[""] * 6])
        lines += [f"| {' | '.join(_escape(cell) for cell in [result.name, *content])} |" for content in contents]
    return "\n".join(lines)


def _escape(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def section(results: Sequence[Result], described: dict[str, str], data: str) -> str:
    """Return the text between the README's markers: the machine, then the table."""
    installed = ", ".join(f"{name} {described[name]}" for name in ("python", *PACKAGES))
    seconds = sum(result.seconds for result in results)
    return (
        f"{described['date']}, {described['cpu']}, {described['cores']} cores, {described['memory']}, "
        f"{described['system']}; load before: {described['load before']}. {installed}. Rows of text: {data}. "
        f"All together: {seconds / 60:.1f} minutes.\n\n{table(results)}"
    )


def replace_between_markers(text: str, content: str) -> str:
    """Put `content` between the two marker lines; raise `ValueError` unless each is there once and in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, each once and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def write(results: Sequence[Result], described: dict[str, str], options: Options) -> None:
    """Write benchmarks.json, and the README's table."""
    data = "made up" if options.data is None else options.data.name
    content = {"machine": described, "data": data, "benchmarks": {each.name: each.to_json() for each in results}}
    JSON_FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = replace_between_markers(README.read_text(encoding="utf-8"), section(results, described, data))
    README.write_text(page, encoding="utf-8")
