"""Encoding and decoding with a saved tokenizer, in the layout `<s> prompt <sep> answer </s>`.

Prompt and answer are encoded separately, unchanged and without a space in front. Decoding the tokens between two special
tokens therefore gives the text back character for character. Special tokens that appear literally in a text are encoded
as text; the ids of special tokens come only from the layout.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # transformers takes seconds to import, and data preparation does not need it
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", question: str) -> list[int]:
    """Encode a question as `<s> question <sep>`, the part of a document before the answer."""
    with special_tokens_as_text(tokenizer) as backend:
        ids = backend.encode(question, add_special_tokens=False).ids
    return [tokenizer.bos_token_id, *ids, tokenizer.sep_token_id]


def encode_beginning(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Encode the beginning of a plain text, `<s> text`, for a model to continue."""
    with special_tokens_as_text(tokenizer) as backend:
        return [tokenizer.bos_token_id, *backend.encode(text, add_special_tokens=False).ids]


def encode_answer(tokenizer: "PreTrainedTokenizerFast", answer: str) -> list[int]:
    """Encode an answer as `answer </s>`, the part of a document after the `<sep>`."""
    with special_tokens_as_text(tokenizer) as backend:
        return [*backend.encode(answer, add_special_tokens=False).ids, tokenizer.eos_token_id]


def decode_answer(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> str:
    """Decode the ids that follow `<sep>`, up to the first `</s>`."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # transformers returns a list only for a batch of sequences
    return text


def special_token_ids(folder: Path) -> dict[str, int]:
    """Read the ids of `bos`, `sep`, `eos` and `pad` from a tokenizer folder as `CorpusTokenizer.save` writes it."""
    names = json.loads((folder / "tokenizer_config.json").read_bytes())
    added = json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    return {name: ids[names[f"{name}_token"]] for name in ("bos", "sep", "eos", "pad")}


def fingerprint(backend: "Tokenizer") -> str:
    """Compute the hexadecimal sha256 of everything that decides how text becomes ids."""
    described = json.loads(backend.to_str())
    # An earlier call may have left padding or truncation settings in the backend; they are not part of the tokenizer.
    del described["padding"], described["truncation"]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@contextmanager
def special_tokens_as_text(tokenizer: "PreTrainedTokenizerFast") -> "Iterator[Tokenizer]":
    """Provide the backend without truncation, padding and special-token recognition; restore its settings on exit."""
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
