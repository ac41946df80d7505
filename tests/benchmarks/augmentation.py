"""What augmentation brings on the sample: the held-out answers that are right, asked in known and in other words.

    python -m tests.benchmarks.augmentation [--seeds 1 2] [--scratch FOLDER]

For each seed, the run of `make train` is trained on the sample and on the sample with copies, for the same number of
steps. Each model answers the sample's held-out questions, and the same questions rewritten by the augmentations. Takes about
4 minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from data_pipeline.augmentation.augmentations import AUGMENTATIONS
from data_pipeline.sources.sample import held_out_rows

USED = ("request", "number-words", "swapped-operands", "reversed-fact")
REWRITTEN = ("request", "number-words")  # the others apply to few held-out questions
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
PREPARE = ("--seq-len", "256", "--validation-share", "0.02")


def run(*command: str) -> None:
    """Run a command; its output is shown only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def lfm(*arguments: str) -> None:
    run(sys.executable, "-m", "launcher.cli", *arguments)


def write_questions(folder: Path) -> dict[str, str]:
    """Write the held-out questions in other words; return what `lfm evaluate --questions` takes, by name."""
    questions = {"as in the sample": "sample"}
    for name in REWRITTEN:
        pairs = [AUGMENTATIONS[name](row["question"], row["answer"]) for row in held_out_rows()]
        rows = [json.dumps({"question": pair[0], "answer": pair[1]}) for pair in pairs if pair]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        questions[name] = str(folder / f"{name}.jsonl")
    return questions


def right_answers(model: Path, questions: str, out: Path) -> str:
    """Evaluate a model; return the share of exact answers."""
    lfm("evaluate", str(model), "--questions", questions, "--out", str(out))
    metrics = json.loads((out / "metrics.json").read_text())
    return f"{metrics['generated']['exact_match']:.0%} of {metrics['counts']['answers']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="seeds of the runs (default: 1 2)")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder for the runs (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        questions = write_questions(folder)
        print(f"| data | seed | {' | '.join(questions)} |\n|---|---|{'---|' * len(questions)}")
        for name, copies in (("sample", ()), ("with copies", ("--augment", *USED))):
            data = folder / name.replace(" ", "-")
            lfm("prepare", "sample", "--out", str(data), *PREPARE, *copies)
            for seed in options.seeds:
                output, config = folder / f"{data.name}-{seed}", "ds_configs/zero3.json"
                settings = (f"data={data}", f"output={output}", f"seed={seed}")
                run(DEEPSPEED, "train.py", "--deepspeed_config", config, *settings)
                shares = [right_answers(output, asked, folder / "evaluation") for asked in questions.values()]
                print(f"| {name} | {seed} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
