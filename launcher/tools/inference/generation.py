"""Answer questions with a model from an exported folder or directly from a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextStreamer

from data_pipeline.tokens.tokenization import decode_answer, encode_beginning, encode_prompt
from launcher.errors import ConfigurationError
from launcher.tools.export.export import load_run
from launcher.tools.inference.questions import cleaned
from model import LiquidForCausalLM

LEAST_TEMPERATURE = 1e-5  # dividing logits by a smaller value could overflow


@dataclass(frozen=True)
class Decoding:
    """The decoding settings.

    max_new_tokens: the maximum length of an answer. temperature: 0 (or below 1e-5) takes the most likely token; above,
    tokens are sampled. top_p: sample from the most likely tokens that together have this probability. num_beams: the
    width of beam search, which returns the most likely answer. repetition_penalty: values above 1 make repeated tokens
    less likely (Keskar et al. 2019).
    Raises `ConfigurationError` for invalid values.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for is_right, name, must in (
            (self.max_new_tokens >= 1, "max_new_tokens", "be at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", "be 0 (the most likely token) or above"),
            (0 < self.top_p <= 1, "top_p", "be above 0 and at most 1"),
            (self.num_beams >= 1, "num_beams", "be at least 1"),
            (0 < self.repetition_penalty < float("inf"), "repetition_penalty", "be above 0; 1 changes nothing"),
        ):
            if not is_right:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must {must}")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigurationError(
                f"top_p {self.top_p} needs sampling; set temperature above 0 as well, for example to 1"
            )

    def arguments(self) -> dict:
        """Return the settings as keyword arguments of transformers' `generate`."""
        draws = self.temperature >= LEAST_TEMPERATURE
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if draws else {}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": draws,
            "repetition_penalty": self.repetition_penalty,
            **drawn,
        }

    def within(self, model: LiquidForCausalLM, prompt_length: int) -> Decoding:
        """Return the settings with `max_new_tokens` limited to the positions that the prompt leaves free."""
        room = model.config.max_position_embeddings - prompt_length
        return replace(self, max_new_tokens=max(1, min(self.max_new_tokens, room)))


def load_model(
    path: str | Path, device: torch.device | None = None
) -> tuple[LiquidForCausalLM, PreTrainedTokenizerFast]:
    """Load the model and the tokenizer of an exported folder or of a run's newest checkpoint.

    device: by default the first GPU, or the CPU if there is none. Raises `ConfigurationError` if `path` is neither kind
    of folder.
    """
    path = Path(path)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        model, tokenizer = LiquidForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    elif (path / "run.yaml").is_file():
        model, tokenizer = load_run(path), AutoTokenizer.from_pretrained(path / "model")
    else:
        raise ConfigurationError(
            f"{path} is neither a model folder (config.json and weights) nor a run folder (run.yaml)"
        )
    model.to(device=device)
    return model, cast(PreTrainedTokenizerFast, tokenizer)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str, is_beginning: bool = False) -> list[int]:
    """Clean a question like the training data and encode it as `<s> question <sep>`.

    is_beginning: the question is the beginning of a plain text instead, `<s> text`.
    Raises `ConfigurationError` if cleaning leaves nothing of the question.
    """
    return (encode_beginning if is_beginning else encode_prompt)(tokenizer, cleaned(question))


def check_room(model: LiquidForCausalLM, prompt: Sequence[int], max_new_tokens: int, name: str = "a question") -> None:
    """Raise `ConfigurationError` if a prompt and its answer need more positions than the model has."""
    positions = model.config.max_position_embeddings
    if len(prompt) + max_new_tokens > positions:
        room = positions - len(prompt)
        raise ConfigurationError(
            f"{name} has {len(prompt)} tokens, and with {max_new_tokens} for the answer that is more than the model's "
            f"{positions} positions; shorten it{f', or ask for at most {room} new tokens' if room > 0 else ''}"
        )


@torch.inference_mode()
def answer(
    model: LiquidForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str],
    decoding: Decoding = Decoding(),
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    is_beginning: bool = False,
) -> list[str]:
    """Return one answer per question, or the continuation of each if the questions are beginnings of plain texts.

    Raises `ConfigurationError` if cleaning leaves nothing of a question, or if a question with its answer needs more
    positions than the model has.
    """
    prompts = [prompt_ids(tokenizer, question, is_beginning) for question in questions]
    for prompt in prompts:
        check_room(model, prompt, decoding.max_new_tokens)
    answers = [""] * len(prompts)
    for chosen in batches_of_like_length(prompts, batch_size):
        texts = answer_prompts(model, tokenizer, [prompts[index] for index in chosen], decoding)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
        if progress is not None:
            progress(len(chosen))
    return answers


def batches_of_like_length(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Group the indices of prompts of similar length into batches, to waste little on padding."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


@torch.inference_mode()
def answer_prompts(
    model: LiquidForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], decoding: Decoding
) -> list[str]:
    """Answer one batch of prompts, padded on the left."""
    width = max(map(len, prompts))
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
    mask = (torch.arange(width) >= width - lengths).long()
    output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **decoding.arguments())
    return [decode_answer(tokenizer, row) for row in output[:, width:].tolist()]


@torch.inference_mode()
def stream(
    model: LiquidForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    question: str,
    decoding: Decoding,
    is_beginning: bool = False,
) -> None:
    """Print the answer, or the continuation of a plain text, token by token.

    Raises `ConfigurationError` like `answer`, and for beam search.
    """
    if decoding.num_beams > 1:
        raise ConfigurationError("beam search has no answer to stream until it ends; set num_beams to 1")
    prompt = prompt_ids(tokenizer, question, is_beginning)
    check_room(model, prompt, decoding.max_new_tokens)
    ids = torch.tensor([prompt], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **decoding.arguments())
