"""`lfm evaluate`: how good a model is on held-out questions."""

from __future__ import annotations

import sys

from launcher.commands.parsing import command


def add_evaluate(commands) -> None:
    """Add `lfm evaluate` to the commands."""
    parser = command(
        commands, "evaluate", _evaluate, "Answer held-out questions and count the exactly right ones.",
        "lfm evaluate runs/sample/export --questions sample --show 3",
    )  # fmt: skip
    parser.add_argument("model", help="an exported folder, or a run folder")
    parser.add_argument("--questions", default="sample", help="'sample', or a JSON-lines file with question and answer")
    parser.add_argument("--show", type=int, default=3, help="how many questions to show with their answers")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")


def _evaluate(options) -> None:
    from tqdm import tqdm

    from launcher.evaluation.evaluation import evaluate, read_questions
    from launcher.inference.generation import load_model

    rows = read_questions(options.questions)
    model, tokenizer = load_model(options.model)
    with tqdm(total=len(rows), unit="question", disable=not sys.stderr.isatty()) as bar:
        results = evaluate(model, tokenizer, rows, options.max_new_tokens, bar.update)
    # Spread over the file, since neighbours are of one kind.
    for result in results[:: max(1, len(results) // max(1, options.show))][: options.show]:
        mark = "right" if result.is_right else f"wrong, expected: {result.expected}"
        print(f"  Q: {result.question}\n  A: {result.given}   ({mark})")
    right = sum(result.is_right for result in results)
    print(f"{right} of {len(results)} held-out answers are exactly right ({right / max(1, len(results)):.0%})")
