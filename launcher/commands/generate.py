"""`lfm generate`: answers to questions."""

from __future__ import annotations

from launcher.commands.parsing import command


def add_generate(commands) -> None:
    """Add `lfm generate` to the commands."""
    parser = command(
        commands, "generate", _generate, "Answer questions.",
        'lfm generate runs/sample/export "What is 7 plus 5?"',
    )  # fmt: skip
    parser.add_argument("model", help="an exported folder, or a run folder")
    parser.add_argument("question", nargs="+", help="one or more questions, each in quotes")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="for sampling")


def _generate(options) -> None:
    import torch

    from launcher.inference.generation import answer, load_model

    model, tokenizer = load_model(options.model)
    torch.manual_seed(options.seed)
    for text in answer(model, tokenizer, options.question, options.max_new_tokens, options.temperature):
        print(text)
