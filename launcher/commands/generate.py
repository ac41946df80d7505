"""`lfm generate`: answer questions."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from launcher.commands.parsing import Subcommands, command


def add_generate(commands: Subcommands) -> None:
    """Add `lfm generate` to the commands."""
    parser = command(
        commands,
        "generate",
        _generate,
        "Answer questions from the command line, from --file, or from standard input (one per line). On a terminal, a "
        "single question is answered token by token.",
        'lfm generate runs/sample/export "What is the capital of Peru?"',
    )
    parser.add_argument("model", help="exported folder or run folder")
    parser.usage = f"{parser.prog} [options] model [question ...]"
    # Not "*": it would match nothing if an option stands between the model and the questions.
    parser.add_argument("question", nargs="+", default=[], help="questions, each in quotes").required = False
    parser.add_argument("--file", help="text file with one question per line, or .jsonl with `question` in each object")
    parser.add_argument(
        "--complete",
        action="store_true",
        help="continue the texts instead of answering them, for a model that was trained on plain texts",
    )
    parser.add_argument("--jsonl", action="store_true", help="print JSON lines with question and answer")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="maximum tokens per answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most likely token; higher values sample"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens that together have this probability",
    )
    parser.add_argument("--beams", type=int, default=1, help="width of beam search; the most likely answer is returned")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="values above 1 make repeated tokens less likely"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for sampling; the same seed and batches give the same answers"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="questions per batch")


def _generate(options: argparse.Namespace) -> None:
    from launcher.errors import ConfigurationError
    from launcher.tools.inference.questions import cleaned, is_text, told_if_changed

    if options.question and options.file:
        raise ConfigurationError("questions are given both on the command line and in --file; give only one of the two")
    if options.batch_size < 1:
        raise ConfigurationError(f"--batch-size is {options.batch_size}; it must be at least 1")
    for question in options.question:
        if not is_text(question):
            raise ConfigurationError(f"the question {os.fsencode(question)!r} is not UTF-8 text; write it in UTF-8")
    questions = options.question or _read_questions(options.file)
    for number, question in enumerate(questions, start=1):
        name = f"question {number}" if len(questions) > 1 else "the question"
        if note := told_if_changed(question, cleaned(question, name), name):
            print(f"note: {note}", file=sys.stderr)

    import torch
    from tqdm import tqdm

    from launcher.tools.inference.generation import Decoding, answer, load_model, stream

    decoding = Decoding(
        options.max_new_tokens, options.temperature, options.top_p, options.beams, options.repetition_penalty
    )
    model, tokenizer = load_model(options.model)
    torch.manual_seed(options.seed)
    if len(questions) == 1 and decoding.num_beams == 1 and sys.stdout.isatty() and not options.jsonl:
        stream(model, tokenizer, questions[0], decoding, options.complete)
        return
    few = len(questions) <= options.batch_size or not sys.stderr.isatty()
    with tqdm(total=len(questions), unit="question", disable=few) as bar:
        answers = answer(model, tokenizer, questions, decoding, options.batch_size, bar.update, options.complete)
    for question, text in zip(questions, answers, strict=True):
        print(json.dumps({"question": question, "answer": text}, ensure_ascii=False) if options.jsonl else text)


def _read_questions(file: str | None) -> list[str]:
    """Read the questions of a file, or of standard input, without empty lines."""
    from launcher.tools.inference.questions import read_lines, read_objects

    if file is None or Path(file).suffix != ".jsonl":
        return [line for _, line in read_lines(file)]
    return [row["question"] for row in read_objects(file, "question")]
