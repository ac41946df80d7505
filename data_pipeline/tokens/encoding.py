"""Encoding of rows as token ids, with a saved tokenizer or with gigatoken, which is a hundred times faster.

gigatoken rebuilds a byte-level BPE from its `tokenizer.json`. In every run, a sample of the documents is encoded with both
to check that they agree.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from data_pipeline.shards.format import token_dtype
from data_pipeline.tokens.text_buffer import text_buffer
from data_pipeline.tokens.tokenization import special_token_ids

# One text in 400 is also encoded by the tokenizer. This takes about as long as encoding all texts with gigatoken.
CHECKED_SHARE = 400
# Bytes. Longer texts are not checked, because the tokenizer would take too long.
LONGEST_CHECKED = 20_000
# The segments of a turn; a plain text has only the first and the last two of them.
BOS, PROMPT, SEP, ANSWER, EOS = range(5)
SPECIAL_TOKENS_OF_TURN, SPECIAL_TOKENS_OF_TEXT = 3, 2


class EncoderMismatchError(Exception):
    """The fast encoder and the tokenizer gave different ids."""


class DocumentEncoder:
    """Encodes turns as `<s> prompt <sep> answer </s>`, and plain texts as `<s> text </s>`.

    folder: a tokenizer folder as `CorpusTokenizer.save` writes it.
    fast: encode with gigatoken and check a sample; otherwise encode with the tokenizer.
    Special tokens that appear literally in a text are encoded as text.
    Raises RuntimeError or ValueError if gigatoken does not support this kind of tokenizer.
    """

    def __init__(self, folder: str | Path, fast: bool) -> None:
        text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
        self._backend = Tokenizer.from_str(text)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        ids = special_token_ids(Path(folder))
        self.pad_token_id = ids["pad"]
        self.vocab_size = self._backend.get_vocab_size()
        self.dtype = token_dtype(self.vocab_size)
        self._special = {BOS: ids["bos"], SEP: ids["sep"], EOS: ids["eos"]}
        self._fast = _gigatoken(text) if fast else None

    def encode(self, prompts: pl.Series | None, answers: pl.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode turns; return the concatenated ids `[tokens]`, and the turns' lengths and answer starts `[turns]`.

        prompts: None for plain texts, which are given as answers.
        Raises EncoderMismatchError if gigatoken and the tokenizer differ on a text of the sample.
        """
        texts = {ANSWER: answers} if prompts is None else {PROMPT: prompts, ANSWER: answers}
        encoded = {segment: self._encode_texts(column) for segment, column in texts.items()}
        segments = [BOS, ANSWER, EOS] if prompts is None else [BOS, PROMPT, SEP, ANSWER, EOS]
        lengths = np.ones((len(answers), len(segments)), dtype=np.int64)
        for segment, (_, its_lengths) in encoded.items():
            lengths[:, segments.index(segment)] = its_lengths
        segment_of = np.repeat(np.tile(np.array(segments, dtype=np.uint8), len(answers)), lengths.reshape(-1))
        ids = np.empty(len(segment_of), dtype=self.dtype)
        for segment in segments:
            ids[segment_of == segment] = encoded[segment][0] if segment in encoded else self._special[segment]
        return ids, lengths.sum(1), lengths[:, : segments.index(ANSWER)].sum(1)

    def _encode_texts(self, texts: pl.Series) -> tuple[np.ndarray, np.ndarray]:
        if self._fast is None or texts.is_empty():
            found = [encoding.ids for encoding in self._slowly(texts.to_list())]
            flat = [token for ids in found for token in ids]
            return np.array(flat, dtype=np.uint32), np.array([len(ids) for ids in found], dtype=np.int64)
        ids, offsets = _encode_fast(self._fast, texts)
        short = (texts.str.len_bytes() <= LONGEST_CHECKED).arg_true().to_list()
        rows = short[::CHECKED_SHARE]
        for row, expected in zip(rows, self._slowly(texts.gather(rows).to_list()), strict=True):
            if not np.array_equal(ids[offsets[row] : offsets[row + 1]], expected.ids):
                raise EncoderMismatchError(f"gigatoken and the tokenizer differ on {texts[row][:80]!r}")
        return ids, np.diff(offsets)

    def _slowly(self, texts: list[str]) -> list:
        return self._backend.encode_batch_fast(texts, add_special_tokens=False)


def fast_encoder_problem(folder: str | Path) -> str | None:
    """Return why gigatoken cannot encode with this tokenizer, as a short phrase; None if it can."""
    try:
        _gigatoken((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    except (RuntimeError, ValueError) as error:
        return str(error).strip().split("\n")[0]
    return None


@lru_cache(maxsize=1)  # a job first checks whether gigatoken supports the tokenizer, then encodes with it
def _gigatoken(tokenizer_json: str) -> Any:
    import gigatoken

    # Drop the added tokens, so that none is recognised in a text; DocumentEncoder inserts the special ids itself.
    described = json.loads(tokenizer_json) | {"added_tokens": [], "post_processor": None}
    return gigatoken.Tokenizer.from_json(json.dumps(described))


def _encode_fast(encoder: Any, texts: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Encode a column without creating Python strings: ids, uint32 `[tokens]`, and offsets `[rows + 1]`."""
    import awkward as ak

    buffer, offsets = text_buffer(texts)
    characters = ak.contents.NumpyArray(buffer, parameters={"__array__": "char"})
    column = ak.contents.ListOffsetArray(ak.index.Index64(offsets), characters, parameters={"__array__": "string"})
    # Stay on the calling thread: the work is already spread over processes.
    encoded = encoder.encode_batch(ak.Array(column), parallel=False).layout
    return np.asarray(encoded.content.data), np.asarray(encoded.offsets.data)
