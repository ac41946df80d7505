"""The tokenizer of a corpus: loaded, or trained in LED's form, and saved in transformers' format.

Only the `tokenizers` library is imported: importing transformers takes longer than preparing 10,000 rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_pipeline.errors import DataError
from data_pipeline.tokens import tokenization

SEP_TOKEN = "<sep>"
# The order of LED's vocabulary: these four first, `<mask>` last.
FIRST_SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
MASK_TOKEN = "<mask>"
LED_SPECIAL_TOKENS = FIRST_SPECIAL_TOKENS | {"mask_token": MASK_TOKEN}
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SMALLEST_VOCABULARY = 256 + len(FIRST_SPECIAL_TOKENS) + 2  # every byte, and the special tokens
# For these classes, transformers uses only the vocabulary and the merges, and ignores the rest of tokenizer.json.
LED_CLASSES = ("LEDTokenizer", "BartTokenizer", "RobertaTokenizer")
LED_MODELS = ("led", "bart", "roberta")  # model types in config.json, read if tokenizer_config.json names no class
HUB_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)

# `<s> question <sep> answer </s>` for each turn. A system text is put before the first question. `generation` marks the
# assistant's text for transformers' `return_assistant_tokens_mask`.
CHAT_TEMPLATE = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('Only parts of the type text can be read.') }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% set system = namespace(text='') %}"
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'developer') and loop.first %}"
    "{% set system.text = text(message['content']) + '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ bos_token + system.text + text(message['content']) + sep_token }}{% set system.text = '' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ text(message['content']) + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('The roles are user and assistant, and system for the first message.') }}{% endif %}"
    "{% endfor %}"
)
ROUND_TRIP_PROBE = "Ab  c\n x² ≤ 12.50 don't , <s>é"


@dataclass(frozen=True)
class CorpusTokenizer:
    """A byte-level BPE that knows `<sep>`, and its special tokens by name (`bos_token` and so on)."""

    backend: Tokenizer
    special_tokens: dict[str, str]

    @property
    def pad_token_id(self) -> int:
        token_id = self.backend.token_to_id(self.special_tokens["pad_token"])
        assert token_id is not None  # `_prepare` adds every special token to the vocabulary
        return token_id

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides how text becomes ids."""
        return tokenization.fingerprint(self.backend)

    def files(self) -> dict[str, bytes]:
        """Return the files of a tokenizer folder by name, byte for byte as transformers' `save_pretrained` writes them."""
        config = {
            "backend": "tokenizers",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),  # transformers' value for "no limit"
            "padding_side": "left",
            "tokenizer_class": "TokenizersBackend",
            **self.special_tokens,
        }
        texts = {
            "chat_template.jinja": CHAT_TEMPLATE,
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        }
        return {name: text.encode() for name, text in texts.items()}

    def save(self, folder: str | Path) -> None:
        """Write a tokenizer folder, which transformers' `AutoTokenizer` loads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(name_or_path: str) -> CorpusTokenizer:
    """Load a byte-level BPE tokenizer of the LED, BART or RoBERTa kind, and prepare it for this project's documents.

    name_or_path: a folder, or a name on the Hugging Face hub. A tokenizer saved by this package is loaded unchanged.
    Raises DataError if there is no such tokenizer, or if it cannot give every text back exactly.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _download(name_or_path)
    backend, special_tokens = _read(folder, name_or_path)
    missing = [name for name in ("bos_token", "eos_token", "pad_token") if name not in special_tokens]
    if missing:
        raise DataError(
            f"the tokenizer {name_or_path!r} has no {missing[0]}: use a byte-level BPE with bos, eos and padding tokens, "
            "such as LED's"
        )
    tokenizer = _prepare(backend, special_tokens)
    backend.encode_special_tokens = True
    decoded = backend.decode(backend.encode(ROUND_TRIP_PROBE, add_special_tokens=False).ids)
    backend.encode_special_tokens = False
    if decoded != ROUND_TRIP_PROBE:
        raise DataError(
            f"the tokenizer {name_or_path!r} does not give text back unchanged "
            f"({ROUND_TRIP_PROBE!r} became {decoded!r}): use a byte-level BPE such as LED's, without a prefix space"
        )
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int = 2000, split_digits: bool = True) -> CorpusTokenizer:
    """Train a byte-level BPE with LED's special tokens and ids, and prepare it for this project's documents.

    vocab_size: the largest number of tokens, including special tokens.
    split_digits: make every digit a token of its own, so that a small model can learn arithmetic.
    Raises DataError if the vocabulary is too small for all bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"vocab_size {vocab_size} is too small to hold every byte: give at least {SMALLEST_VOCABULARY}")
    backend = Tokenizer(models.BPE())
    # Split as LED does: words include the space before them, and no space is added at the start of a text.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split_digits else byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # `<mask>` and `<sep>` are added later
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(FIRST_SPECIAL_TOKENS.values()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _prepare(backend, LED_SPECIAL_TOKENS)


def _read(folder: Path, name: str) -> tuple[Tokenizer, dict[str, str]]:
    """Build the backend that a folder's files describe, and find its special tokens by name."""
    try:
        config, named = (_read_json(folder / file) for file in ("tokenizer_config.json", "special_tokens_map.json"))
        backend, is_led = _read_backend(folder, config)
    except (OSError, ValueError, KeyError, TypeError) as error:  # missing, not JSON, or with unexpected content
        raise _no_tokenizer(name, error) from error
    special_tokens = dict(LED_SPECIAL_TOKENS) if is_led else {}
    for key in SPECIAL_NAMES:
        for value in (config.get(key), named.get(key)):
            content = value.get("content") if isinstance(value, dict) else value
            if content is not None:
                special_tokens[key] = str(content)
    return backend, special_tokens


def _read_backend(folder: Path, config: dict) -> tuple[Tokenizer, bool]:
    """Return the backend, and whether it is of LED's kind, built from only the vocabulary and the merges."""
    described = _read_json(folder / "tokenizer.json")
    if named := config.get("tokenizer_class"):
        is_led = str(named).removesuffix("Fast") in LED_CLASSES
    else:
        is_led = _read_json(folder / "config.json").get("model_type") in LED_MODELS
    if described and described["model"]["type"] != "BPE":
        raise ValueError(f"its model is {described['model']['type']}, not BPE")
    if described and not is_led:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.no_padding()
        backend.no_truncation()
        return backend, False
    if described:
        vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    else:
        files = folder / "vocab.json", folder / "merges.txt"
        if missing := [file.name for file in files if not file.is_file()]:
            raise OSError(f"the folder has neither tokenizer.json nor {missing[0]}")
        vocabulary, merges = models.BPE.read_file(*map(str, files))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    return backend, True


def _prepare(backend: Tokenizer, special_tokens: dict[str, str]) -> CorpusTokenizer:
    """Add `<sep>` and a post-processor that only prepends `<s>`."""
    special_tokens = {**special_tokens, "cls_token": special_tokens["bos_token"], "sep_token": SEP_TOKEN}
    ids = set(backend.get_vocab().values())
    if len(ids) <= max(ids):  # the library takes the number of tokens as the next id, which may then be in use already
        raise DataError(
            f"the tokenizer has {len(ids):,} tokens, but ids up to {max(ids):,}: number them without gaps, so that "
            f"{SEP_TOKEN} does not get the id of another token"
        )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([
        AddedToken(token, lstrip=name == "mask_token", normalized=False, special=True)
        for name, token in special_tokens.items()
        if token not in known
    ])  # fmt: skip
    bos = special_tokens["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return CorpusTokenizer(backend, special_tokens)


def _read_json(path: Path) -> dict:
    """Read the object in a JSON file; it is empty if the file does not exist."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} does not contain a JSON object")
    return content


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _no_tokenizer(name, error) from error


def _no_tokenizer(name: str, error: Exception) -> DataError:
    return DataError(
        f"no tokenizer can be loaded from {name!r}: give a tokenizer folder, a reachable hub name, or `train` "
        f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
    )
