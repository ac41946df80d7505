"""The table, its figures and its place in the README; a failed benchmark does not affect the others."""

import ast
import importlib.util
import json
import statistics
from functools import partial
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.measurement import Goal, Options, Result, Row, take_turns
from tests.benchmarks.registry import BENCHMARKS, Benchmark
from tests.benchmarks.runner import run_all

PACKAGES = ("data_pipeline", "launcher", "model", "train")
FAST = Row("reading", "MB/s", [90.0, 110.0, 100.0], "tar", [50.0, 50.0, 40.0], Goal(at_least=2))


def measure(options: Options) -> list[Row]:
    """Stand in for a benchmark, in a process of its own."""
    return [FAST]


def fail(options: Options) -> list[Row]:
    """Stand in for a benchmark that fails."""
    raise ValueError(f"nothing to measure in {options.scratch.name}")


def test_what_benchmarks_import_from_the_project_exists():
    """They run by hand, and import inside functions: a name that has moved would be noticed late."""
    missing = []
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGES):
                module = importlib.import_module(node.module)
                missing += [(path.name, node.module, name.name) for name in node.names if not _has(module, name.name)]
    assert not missing


def _has(module, name: str) -> bool:
    is_package = hasattr(module, "__path__")
    return hasattr(module, name) or (is_package and importlib.util.find_spec(f"{module.__name__}.{name}") is not None)


def test_the_ratio_is_the_median_of_the_turns_ratios():
    assert FAST.ratio == statistics.median([90 / 50, 110 / 50, 100 / 40])
    assert FAST.meets_goal
    assert Row("copying", "s", [3.0], "cp", [1.0], Goal(at_most=2.9)).meets_goal is False


def test_a_goal_can_be_a_difference_of_medians():
    goal = Goal(at_most=1.5, of_difference=True)
    started = Row("starting", "s", [3.0, 4.0, 9.0], "its stages", [2.0, 3.0, 8.0], goal)
    assert started.meets_goal
    assert report.goal_text(started.goal, "s", False) == "≤ 1.5 s more, **missed**"


def test_a_row_without_its_peer_has_our_figures_and_says_why():
    row = Row("reading", "MB/s", [100.0], "litdata", goal=Goal(at_least=2), not_run="No module named 'litdata'")
    assert row.ratio is None
    assert row.meets_goal is None
    assert report.cells(row)[2:] == ["100", "litdata", "not run: No module named 'litdata'", "", "≥ 2×"]


def test_the_table_has_a_line_for_each_row_and_each_failure():
    results = [Result("load", 2.0, [FAST]), Result("ranks", 1.0, error="OSError: a | b\nc")]
    header, line, *rows = report.table(results).splitlines()
    assert rows == [
        "| load | reading | MB/s | 100 (90.0–110) | tar | 50.0 (40.0–50.0) | 2.20× | ≥ 2×, met |",
        "| ranks | **failed**: OSError: a \\| b c |  |  |  |  |  |  |",
    ]
    assert header.count("|") == line.count("|") == rows[0].count("|")


def test_figures_have_three_digits():
    assert [report.number(value) for value in (12345.6, 100.2, 99.84, 1.0, 0.01234)] == [
        "12,346",
        "100",
        "99.8",
        "1.00",
        "0.0123",
    ]


def test_only_the_text_between_the_markers_is_replaced(tmp_path, monkeypatch):
    page, file = tmp_path / "README.md", tmp_path / "benchmarks.json"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", page)
    monkeypatch.setattr(report, "JSON_FILE", file)
    for _ in range(2):  # a second run finds the markers again
        report.write([Result("load", 2.0, [FAST])], report.machine(), Options(tmp_path))
    before, inside, after = page.read_text().partition(report.BEGIN)[0], page.read_text(), page.read_text()[-7:]
    assert (before, after) == ("before\n", "\nafter\n")
    assert "old" not in inside
    assert "| load | reading |" in inside
    assert json.loads(file.read_text())["benchmarks"]["load"]["rows"][0]["ratio"] == FAST.ratio


def test_the_readme_has_the_markers():
    page = report.README.read_text(encoding="utf-8")
    assert report.replace_between_markers(page, "new").count("new") >= 1


def test_a_benchmark_that_fails_keeps_the_results_of_the_others(tmp_path, capsys):
    of_this_file = partial(Benchmark, "tests.benchmarks.test_benchmarks")
    results = run_all({"bad": of_this_file("fail"), "good": of_this_file("measure")}, Options(tmp_path))
    assert results[0].rows == []
    assert results[0].error == f"ValueError: nothing to measure in {tmp_path.name}"
    assert results[1].rows == [FAST]
    assert results[1].error == ""
    assert "2/2 good" in capsys.readouterr().out


def test_ways_take_turns():
    called = []
    ways = {name: partial(lambda name: called.append(name) or len(called), name) for name in "ab"}
    assert take_turns(ways, 2) == {"a": [1, 3], "b": [2, 4]}
    assert called == ["a", "b", "a", "b"]


def test_every_benchmark_names_an_existing_file_and_function():
    for benchmark in BENCHMARKS.values():
        folder, _, name = benchmark.module.rpartition(".")
        assert folder == "tests.benchmarks"
        assert f"def {benchmark.function}(options: Options)" in (report.FOLDER / f"{name}.py").read_text()
