"""`lfm evaluate`: how good a model is on held-out questions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher.commands.parsing import command

LINE_EVERY = 30  # seconds, where the output is no terminal


def add_evaluate(commands) -> None:
    """Add `lfm evaluate` to the commands."""
    parser = command(
        commands, "evaluate", _evaluate,
        "Score the right answers to held-out questions, and the answers that the model gives by itself. Started by srun, "
        "mpirun, torchrun or deepspeed, the processes share the work and find the same figures.",
        "lfm evaluate runs/sample/export --data data/sample --limit 100",
    )  # fmt: skip
    parser.add_argument("model", help="an exported folder, or a run folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", help="a shard folder: its validation/ where it has one (default, with a run folder: the run's)"
    )
    source.add_argument("--questions", help="'sample', or a JSON-lines file with question and answer")
    parser.add_argument(
        "--limit", type=int, help="only so many rows of --data, or questions, spread over all (default: all)"
    )
    parser.add_argument("--answers", type=int, help="only so many answers are generated, 0: none (default: all)")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: MODEL-evaluation, or evaluation in a run folder)"
    )
    parser.add_argument("--show", type=int, default=3, help="how many questions to show with their answers")
    parser.add_argument("--samples", type=int, default=20, help="how many best and worst answers to write")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--batch-size", type=int, default=32, help="rows or questions at once")


def _evaluate(options) -> None:
    from launcher.environment import detect_environment
    from launcher.errors import ConfigurationError
    from launcher.process import export_for_torch

    for name, least in (("limit", 1), ("answers", 0), ("show", 0), ("samples", 0), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    environment = detect_environment()
    export_for_torch(environment)

    from launcher.tools.evaluation.evaluation import Team, evaluate
    from launcher.tools.evaluation.held_out import data_of_run, open_held_out
    from launcher.tools.evaluation.results import print_table, write_results
    from launcher.tools.evaluation.text_metrics import NO_WORDNET
    from launcher.tools.inference.generation import Decoding, load_model

    data = options.data or (None if options.questions else data_of_run(Path(options.model)))
    decoding = Decoding(max_new_tokens=options.max_new_tokens)
    model, tokenizer = load_model(options.model, environment.device)
    longest = model.config.max_position_embeddings
    held_out = open_held_out(data, options.questions, tokenizer, longest, options.limit)
    team = Team(environment)
    progress = _progress if environment.is_main else lambda what, total: lambda done: None
    result = evaluate(model, tokenizer, held_out, decoding, team, options.batch_size, options.answers, progress)
    if result is not None:
        folder = options.out or _default_folder(Path(options.model))
        write_results(folder, result, _evaluated(options, model, held_out, decoding, environment), options.samples)
        _show(result.answers, options.show)
        print_table(result)
        if result.text and result.text["meteor"] is None:
            print(NO_WORDNET)
        print(f"metrics.json and samples.jsonl are in {folder}")
        right, total = sum(answered.is_right for answered in result.answers), len(result.answers)
        print(f"{right} of {total} held-out answers are exactly right ({right / max(1, total):.0%})")
    team.part()


def _default_folder(model: Path) -> Path:
    """Not in an exported folder: there is the model and nothing else."""
    return model / "evaluation" if (model / "run.yaml").is_file() else model.with_name(f"{model.name}-evaluation")


def _evaluated(options, model, held_out, decoding, environment) -> dict:
    """What was evaluated, and all that decides the figures."""
    from dataclasses import asdict

    return {
        "model": str(Path(options.model).resolve()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
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
    # Spread over all, since neighbours are of one kind.
    for answered in answers[:: max(1, len(answers) // max(1, count))][:count]:
        mark = "right" if answered.is_right else f"wrong, expected: {answered.expected}"
        print(f"  Q: {answered.question}\n  A: {answered.given}   ({mark})")


def _progress(what: str, total: int) -> Callable[[int], None]:
    """A bar on a terminal, else a line now and then; of this process's share."""
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
