"""The tokenizer: load one, or train one of LED's shape, and lay documents out as `<s> question <sep> answer </s>`.

Question and answer are encoded separately, each exactly as it stands and without a space before it, so decoding the
tokens between two special tokens gives that text back character for character. Special tokens that stand literally in
a text are encoded as text; the ids of special tokens come only from the layout.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import DataError

if TYPE_CHECKING:  # transformers takes seconds to import, and reading shards doesn't need it
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SEP_TOKEN = "<sep>"
# As in LED's vocabulary: these four first, `<mask>` last.
FIRST_SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
MASK_TOKEN = "<mask>"
SMALLEST_VOCABULARY = 256 + len(FIRST_SPECIAL_TOKENS) + 2  # every byte, and the special tokens

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + message['content'] + sep_token }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('The roles are user and assistant.') }}{% endif %}"
    "{% endfor %}"
)
ROUND_TRIP_PROBE = "Ab  c\n x² ≤ 12.50 don't , <s>é"


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerFast":
    """Loads a byte-level BPE tokenizer of the LED, BART or RoBERTa kind, and prepares it for our documents.

    name_or_path: a folder, or a name on the Hugging Face hub. A tokenizer saved by this package comes back unchanged.
    Raises DataError where there is no such tokenizer, or where it cannot give every text back exactly.
    """
    try:
        tokenizer = _tokenizer_class(name_or_path).from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer can be loaded from {name_or_path!r}: give a folder that holds one, a reachable hub name, "
            f"or `train` ({_first_line(error)})"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.bos_token is None or tokenizer.eos_token is None or tokenizer.pad_token is None:
        raise DataError(
            f"the tokenizer {name_or_path!r} has no beginning, end or padding token, or no fast form: "
            "use a byte-level BPE such as LED's"
        )
    prepared = _prepare(backend, {name: getattr(tokenizer, name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES})
    with special_tokens_as_text(prepared) as text_backend:
        decoded = text_backend.decode(text_backend.encode(ROUND_TRIP_PROBE, add_special_tokens=False).ids)
    if decoded != ROUND_TRIP_PROBE:
        raise DataError(
            f"the tokenizer {name_or_path!r} does not give text back as it was "
            f"({ROUND_TRIP_PROBE!r} became {decoded!r}): use a byte-level BPE such as LED's, without a prefix space"
        )
    return prepared


def train_tokenizer(
    texts: Iterator[str], vocab_size: int = 2000, split_digits: bool = True
) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE with LED's special tokens and ids, and prepares it for our documents.

    vocab_size: an upper limit of the number of tokens, special ones included. split_digits: every digit is a token of
    its own, so that a small model can learn arithmetic. Raises DataError where the vocabulary cannot hold the bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"vocab_size {vocab_size} is too small to hold every byte: give at least {SMALLEST_VOCABULARY}")
    backend = Tokenizer(models.BPE())
    # The same splitting as LED's: words with the space before them, nothing added in front.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split_digits else byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # `<mask>` and `<sep>` come after
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(FIRST_SPECIAL_TOKENS.values()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(MASK_TOKEN, lstrip=True, normalized=False, special=True)])
    return _prepare(backend, FIRST_SPECIAL_TOKENS | {"mask_token": MASK_TOKEN})


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", question: str) -> list[int]:
    """Encodes a question as `<s> question <sep>`, the part of a document that comes before its answer."""
    with special_tokens_as_text(tokenizer) as backend:
        ids = backend.encode(question, add_special_tokens=False).ids
    return [tokenizer.bos_token_id, *ids, tokenizer.sep_token_id]


def encode_answer(tokenizer: "PreTrainedTokenizerFast", answer: str) -> list[int]:
    """Encodes an answer as `answer </s>`, the part of a document that follows its `<sep>`."""
    with special_tokens_as_text(tokenizer) as backend:
        return [*backend.encode(answer, add_special_tokens=False).ids, tokenizer.eos_token_id]


def decode_answer(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> str:
    """Decodes the ids that follow `<sep>`, up to the first `</s>`."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Gives the sha256 of all that decides how text becomes ids, as hexadecimal digits."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # An earlier call with padding or truncation leaves its settings in the backend; they are no part of the tokenizer.
    del backend["padding"], backend["truncation"]
    return hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()


@contextmanager
def special_tokens_as_text(tokenizer: "PreTrainedTokenizerFast") -> "Iterator[Tokenizer]":
    """Lends the backend so set that it cuts, pads and recognises nothing, and puts its settings back afterwards."""
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


def _tokenizer_class(name_or_path: str) -> type:
    """The class that a folder's configuration names, as AutoTokenizer would find it."""
    import transformers

    # AutoTokenizer imports all of torch on the way, which takes as long as preparing 100,000 rows.
    path = Path(name_or_path) / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = described.get("tokenizer_class") if isinstance(described, dict) else None
    return getattr(transformers, named) if named and hasattr(transformers, named) else transformers.AutoTokenizer


def _prepare(backend: "Tokenizer", special_tokens: dict[str, str | None]) -> "PreTrainedTokenizerFast":
    """Adds `<sep>`, the post-processor that puts only `<s>` in front, and the chat template."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(SEP_TOKEN, normalized=False, special=True)])
    bos = special_tokens["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    # The generic class, because LEDTokenizer builds its own post-processor anew whenever it is loaded.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **(special_tokens | {"cls_token": bos, "sep_token": SEP_TOKEN}),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
