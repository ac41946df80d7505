"""Questions in, answers out: from an exported folder or straight from a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_pipeline.cleaning.clean import clean_text
from data_pipeline.tokens.tokenization import decode_answer, encode_prompt
from launcher.errors import ConfigurationError
from launcher.export.export import load_run
from model import LiquidForCausalLM


def load_model(path: str | Path) -> tuple[LiquidForCausalLM, PreTrainedTokenizerBase]:
    """The model and the tokenizer of an exported folder or of a run's newest checkpoint.

    Raises `ConfigurationError` where `path` is neither.
    """
    path = Path(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return LiquidForCausalLM.from_pretrained(path).eval().to(device), AutoTokenizer.from_pretrained(path)
    if (path / "run.yaml").is_file():
        return load_run(path).to(device), AutoTokenizer.from_pretrained(path / "model")
    raise ConfigurationError(f"{path} is neither a model folder (config.json and weights) nor a run folder (run.yaml)")


@torch.inference_mode()
def answer(
    model: LiquidForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One answer a question; temperature 0 is greedy. Questions are cleaned as the training text was.

    Raises `ConfigurationError` for a question that leaves no room in the model's positions.
    """
    prompts = [encode_prompt(tokenizer, clean_text(question)) for question in questions]
    limit = model.config.max_position_embeddings - max_new_tokens
    if prompts and (longest := max(map(len, prompts))) > limit:
        raise ConfigurationError(
            f"a question has {longest} tokens; with {max_new_tokens} for the answer the model takes at most {limit}"
        )
    # Batches of about equal lengths waste little on padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
        mask = (torch.arange(width) >= width - torch.tensor([[len(prompts[index])] for index in chosen])).long()
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        for index, row in zip(chosen, output[:, width:].tolist(), strict=True):
            answers[index] = decode_answer(tokenizer, row)
        if progress is not None:
            progress(len(chosen))
    return answers
