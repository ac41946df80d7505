"""`lfm evaluate`: score a model on held-out questions."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.parsing import Subcommands, command

if TYPE_CHECKING:
    from launcher.environment import Environment
    from launcher.tools.evaluation.held_out import HeldOut
    from launcher.tools.inference.generation import Decoding
    from model import LiquidForCausalLM

LINE_EVERY = 30  # seconds between progress lines if stderr is not a terminal


def add_evaluate(commands: Subcommands) -> None:
    """Add `lfm evaluate` to the commands."""
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "Score a model on held-out questions: the likelihood of the expected answers, and the answers that it generates. "
        "Processes started by srun, mpirun, torchrun or deepspeed share the work; the metrics stay the same.",
        "lfm evaluate runs/sample/export --data data/sample --limit 100",
    )
    parser.add_argument("model", help="exported folder or run folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        help="shard folder; its validation/ is used if it has one (default for a run folder: its held-out rows)",
    )
    source.add_argument("--questions", help="'sample', or a JSON-lines file with question and answer")
    parser.add_argument(
        "--limit", type=int, help="maximum number of rows of --data, or of questions, evenly spaced (default: all)"
    )
    parser.add_argument("--answers", type=int, help="maximum number of answers to generate; 0 for none (default: all)")
    parser.add_argument(
        "--out", type=Path, help="output folder (default: MODEL-evaluation, or evaluation/ in a run folder)"
    )
    parser.add_argument("--show", type=int, default=3, help="number of questions to print with their answers")
    parser.add_argument("--samples", type=int, default=20, help="number of best and of worst answers to write")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="maximum tokens per answer")
    parser.add_argument("--batch-size", type=int, default=32, help="rows or questions per batch")


def _evaluate(options: argparse.Namespace) -> None:
    from launcher.environment import detect_environment
    from launcher.errors import ConfigurationError
    from launcher.process import export_for_torch

    for name, least in (("limit", 1), ("answers", 0), ("show", 0), ("samples", 0), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    environment = detect_environment()
    export_for_torch(environment)

    from launcher.tools.evaluation.evaluation import Ranks, evaluate
    from launcher.tools.evaluation.held_out import data_of_run, open_held_out
    from launcher.tools.evaluation.results import print_table, write_results
    from launcher.tools.evaluation.text_metrics import NO_WORDNET
    from launcher.tools.inference.generation import Decoding, load_model

    data = options.data or (None if options.questions else data_of_run(Path(options.model)))
    decoding = Decoding(max_new_tokens=options.max_new_tokens)
    model, tokenizer = load_model(options.model, environment.device)
    longest = model.config.max_position_embeddings
    held_out = open_held_out(data, options.questions, tokenizer, longest, options.limit)
    ranks = Ranks(environment)
    progress = _progress if environment.is_main else lambda what, total: lambda done: None
    result = evaluate(model, tokenizer, held_out, decoding, ranks, options.batch_size, options.answers, progress)
    if result is not None:
        folder = options.out or _default_folder(Path(options.model))
        write_results(folder, result, _evaluated(options, model, held_out, decoding, environment), options.samples)
        _show(result.answers, options.show)
        print_table(result)
        if result.text and result.text["meteor"] is None:
            print(NO_WORDNET)
        print(f"metrics.json and samples.jsonl are in {folder}")
        if total := len(result.answers):  # plain texts ask no questions
            right = sum(answered.is_right for answered in result.answers)
            print(f"{right} of {total} held-out answers are exactly right ({right / total:.0%})")
    ranks.part()


def _default_folder(model: Path) -> Path:
    """Return the default output folder: inside a run folder, or beside an exported model folder, which holds only the model."""
    return model / "evaluation" if (model / "run.yaml").is_file() else model.with_name(f"{model.name}-evaluation")


def _evaluated(
    options: argparse.Namespace,
    model: LiquidForCausalLM,
    held_out: HeldOut,
    decoding: Decoding,
    environment: Environment,
) -> dict:
    """Return what was evaluated, with all settings that affect the metrics."""
    from dataclasses import asdict

    from model.size import count_parameters

    return {
        "model": str(Path(options.model).resolve()),
        "parameters": count_parameters(model).total,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": environment.device.type,
        "data": held_out.rows.location,
        "data_fingerprint": held_out.rows.fingerprint,
        "limit": options.limit,
        "answers": options.answers,
        "batch_size": options.batch_size,
        "decoding": asdict(decoding),
    }


def _show(answers: list, count: int) -> None:
    # Evenly spaced, since neighbouring questions tend to be alike.
    for answered in answers[:: max(1, len(answers) // max(1, count))][:count]:
        mark = "right" if answered.is_right else f"wrong, expected: {answered.expected}"
        print(f"  Q: {answered.question}\n  A: {answered.given}   ({mark})")


def _progress(what: str, total: int) -> Callable[[int], None]:
    """Show the progress of this process's share: a bar on a terminal, otherwise a line every `LINE_EVERY` seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(total=total, desc=what).update
    done, last = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, last
        done += more
        if time.monotonic() - last > LINE_EVERY:
            last = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return advance
