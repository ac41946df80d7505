"""Texts to ids and back with a saved tokenizer, in the layout `<s> question <sep> answer </s>`.

Question and answer are encoded separately, each exactly as it stands and without a space before it, so decoding the
tokens between two special tokens gives that text back character for character. Special tokens that stand literally in
a text are encoded as text; the ids of special tokens come only from the layout.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # transformers takes seconds to import, and preparing data does without it
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", question: str) -> list[int]:
    """Encode a question as `<s> question <sep>`, the part of a document that comes before its answer."""
    with special_tokens_as_text(tokenizer) as backend:
        ids = backend.encode(question, add_special_tokens=False).ids
    return [tokenizer.bos_token_id, *ids, tokenizer.sep_token_id]


def encode_answer(tokenizer: "PreTrainedTokenizerFast", answer: str) -> list[int]:
    """Encode an answer as `answer </s>`, the part of a document that follows its `<sep>`."""
    with special_tokens_as_text(tokenizer) as backend:
        return [*backend.encode(answer, add_special_tokens=False).ids, tokenizer.eos_token_id]


def decode_answer(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> str:
    """Decode the ids that follow `<sep>`, up to the first `</s>`."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def fingerprint(backend: "Tokenizer") -> str:
    """Give the sha256 of all that decides how text becomes ids, as hexadecimal digits."""
    described = json.loads(backend.to_str())
    # An earlier call with padding or truncation leaves its settings in the backend; they are no part of the tokenizer.
    del described["padding"], described["truncation"]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@contextmanager
def special_tokens_as_text(tokenizer: "PreTrainedTokenizerFast") -> "Iterator[Tokenizer]":
    """Lend the backend so set that it cuts, pads and recognises nothing, and put its settings back afterwards."""
    backend = tokenizer.backend_tokenizer
    truncation, padding, as_text = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        backend.encode_special_tokens = as_text
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
