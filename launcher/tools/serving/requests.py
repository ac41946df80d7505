"""Validate chat-completions requests field by field, and report errors in OpenAI's format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from reprlib import repr as shown  # shortened: a value may be as long or as deep as a body allows

from transformers import PreTrainedTokenizerFast

from data_pipeline.tokens.tokenization import encode_answer, encode_prompt
from launcher.errors import ConfigurationError
from launcher.tools.inference.generation import Decoding
from launcher.tools.inference.questions import cleaned, is_text, told_if_changed

DEFAULT_NEW_TOKENS = 256
MOST_STOPS, LONGEST_STOP = 4, 256
# Unsupported fields, with the values that have no effect. Other values would change the answer, so they are refused
# instead of ignored.
WITHOUT_EFFECT = {
    "n": (1,), "logprobs": (False,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "top_logprobs": (0,),
}  # fmt: skip

SYSTEM_ROLES = ("system", "developer")


class RequestError(Exception):
    """A refused request: the HTTP status, and the message, parameter and code of OpenAI's error object."""

    def __init__(self, status: int, message: str, parameter: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.parameter, self.code = status, message, parameter, code

    def content(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """The limits of a request (body bytes, messages, answer tokens, seconds), and how many requests may wait."""

    body_bytes: int = 2**20
    messages: int = 64
    new_tokens: int = 1024
    seconds: float = 120.0
    waiting: int = 16


@dataclass(frozen=True)
class ChatRequest:
    """A valid request; `notes` describe the messages that cleaning changed."""

    prompt: list[int]
    decoding: Decoding
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    notes: tuple[str, ...] = ()


def read_request(
    body: bytes, tokenizer: PreTrainedTokenizerFast, model_name: str, positions: int, limits: Limits
) -> ChatRequest:
    """Parse and check a request's body. Raises `RequestError`, which names the invalid field."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise RequestError(400, "the body must be a JSON object")
    if fields.get("model", model_name) != model_name:
        raise RequestError(
            404, f"there is no model {shown(fields['model'])}; ask for {model_name!r}", "model", "model_not_found"
        )
    for name, allowed in WITHOUT_EFFECT.items():
        if fields.get(name) is not None and fields[name] not in allowed:
            raise RequestError(
                400, f"{name} {shown(fields[name])} is not supported; leave it out", name, "unsupported_value"
            )
    prompt, notes = _conversation(fields.get("messages"), tokenizer, limits)
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError(400, "stream_options must be an object", "stream_options")
    return ChatRequest(
        prompt=prompt,
        decoding=_decoding(fields, len(prompt), positions, limits),
        seed=None if fields.get("seed") is None else int(_number(fields, "seed", 0, -(2**63), 2**63 - 1, whole=True)),
        stop=_stops(fields.get("stop")),
        stream=_flag(fields.get("stream"), "stream"),
        include_usage=_flag(options.get("include_usage"), "stream_options.include_usage"),
        notes=notes,
    )


def _conversation(
    messages: object, tokenizer: PreTrainedTokenizerFast, limits: Limits
) -> tuple[list[int], tuple[str, ...]]:
    """Return the prompt's token ids, and notes on the messages that cleaning changed.

    The prompt is that of the tokenizer's chat template: `<s> question <sep>`, after earlier turns as
    `<s> question <sep> answer </s>`. A system message is put before the first question, separated by an empty line.
    Special tokens written in a message stay plain text; the chat template alone would not ensure that.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a list with at least one message", "messages")
    if len(messages) > limits.messages:
        raise RequestError(
            400, f"the request has {len(messages)} messages; at most {limits.messages} are allowed", "messages"
        )
    turns = [_turn(message, f"messages[{place}]") for place, message in enumerate(messages)]
    first = int(turns[0][0] in SYSTEM_ROLES)
    before = turns[0][1] + "\n\n" if first else ""
    ids, notes = [], []
    for place, (role, said) in enumerate(turns[first:], start=first):
        where = f"messages[{place}]"
        expected = ("user", "assistant")[(place - first) % 2]
        if role != expected:
            raise RequestError(
                400,
                f"{where} has the role {shown(role)} instead of {expected!r}: user and assistant messages must "
                "alternate, and only the first message may be a system message",
                f"{where}.role",
            )
        said, before = before + said, ""
        text = _cleaned(said, f"{where}.content")
        notes += [note] if (note := told_if_changed(said, text, f"{where}.content")) else []
        ids += encode_prompt(tokenizer, text) if role == "user" else encode_answer(tokenizer, text)
    if (len(turns) - first) % 2 == 0:
        raise RequestError(400, "the last message must have the role 'user'", "messages")
    return ids, tuple(notes)


def _turn(message: object, where: str) -> tuple[object, str]:
    fields = message if isinstance(message, dict) else {}
    return fields.get("role"), _text(fields.get("content"), f"{where}.content")


def _cleaned(text: str, where: str) -> str:
    try:
        return cleaned(text, where)
    except ConfigurationError as error:
        raise RequestError(400, str(error), where) from error


def _text(content: object, where: str) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] if isinstance(part.get("text"), str) else "" for part in content)
    if not isinstance(content, str) or not content.strip():
        raise RequestError(400, f"{where} must be text and not empty", where)
    if not is_text(content):
        raise RequestError(400, f"{where} has an unpaired surrogate, which is not a character", where)
    return content


def _decoding(fields: dict, prompt_length: int, positions: int, limits: Limits) -> Decoding:
    room = positions - prompt_length
    if room < 1:
        raise RequestError(
            400,
            f"the messages have {prompt_length} tokens, but the model takes {positions} with the answer; shorten them",
            "messages",
            "context_length_exceeded",
        )
    asked = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    wanted = _number(fields, asked, min(DEFAULT_NEW_TOKENS, room, limits.new_tokens), 1, limits.new_tokens, whole=True)
    if wanted > room:
        raise RequestError(
            400,
            f"{asked} {wanted} plus the messages' {prompt_length} tokens are more than the model's {positions} "
            f"positions; ask for at most {room}",
            asked,
            "context_length_exceeded",
        )
    top_p = _number(fields, "top_p", 1.0, 0, 1) or 1e-6  # the protocol allows 0: only the most likely token
    temperature = _number(fields, "temperature", 1.0 if top_p < 1 else 0.0, 0, 2)
    return Decoding(int(wanted), float(temperature), float(top_p) if temperature else 1.0)


def _number(fields: dict, name: str, default: float, least: float, most: float, whole: bool = False) -> float:
    value = default if fields.get(name) is None else fields[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (whole and value != int(value)):
        raise RequestError(
            400,
            f"{name} is {shown(value)}; it must be a {'whole ' if whole else ''}number from {least} to {most}",
            name,
        )
    return value


def _flag(value: object, name: str) -> bool:
    if value not in (None, True, False):
        raise RequestError(400, f"{name} is {shown(value)}; it must be true or false", name)
    return bool(value)


def _stops(stop: object) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stops)
    ):
        raise RequestError(
            400,
            f"stop must be one string or up to {MOST_STOPS} strings, each of 1 to {LONGEST_STOP} characters",
            "stop",
        )
    return tuple(stops)
