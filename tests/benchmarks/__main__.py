"""Measure this project beside its peers: all benchmarks that need no GPU, or those that are named.

    python -m tests.benchmarks [NAME ...] [--quick] [--data FOLDER --tokenizer FOLDER]

A run of all of them at their usual sizes writes benchmarks.json and the table in README.md, both in this folder. A run
of some, or a quick one, only prints.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.measurement import Options
from tests.benchmarks.registry import BENCHMARKS
from tests.benchmarks.runner import run_all


def main() -> int:
    arguments = parse_arguments()
    chosen = {name: BENCHMARKS[name] for name in BENCHMARKS if name in (arguments.names or BENCHMARKS)}
    described = report.machine()
    with tempfile.TemporaryDirectory(prefix="lfm-benchmarks-") as scratch:
        options = Options(Path(scratch), arguments.quick, arguments.data, arguments.tokenizer)
        results = run_all(chosen, options)
        print("\n" + report.table(results))
        if len(chosen) == len(BENCHMARKS) and not options.quick:
            report.write(results, described, options)
            print(f"\nwritten: {report.JSON_FILE.name} and the table in {report.README.name}, in {report.FOLDER}")
    failed = [result.name for result in results if result.error]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones (default: all): {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: to see that everything runs")
    parser.add_argument("--data", type=Path, help="real rows for prepare and start-up (default: made-up text)")
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer's folder that goes with --data")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - BENCHMARKS.keys()):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if (arguments.data is None) != (arguments.tokenizer is None):
        parser.error("--data and --tokenizer go together: give both, or neither")
    for name in ("data", "tokenizer"):
        if (folder := getattr(arguments, name)) is not None:
            if not folder.exists():
                parser.error(f"{folder} does not exist")
            setattr(arguments, name, folder.resolve())
    return arguments


if __name__ == "__main__":
    sys.exit(main())
