"""Stage 1 of a preparation: read, clean, filter and encode one chunk of rows, and save its arrays."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import polars as pl

from data_pipeline.cleaning.clean import CleaningOptions, clean
from data_pipeline.deduplication.contamination import EvaluationSet
from data_pipeline.deduplication.keys import row_keys
from data_pipeline.deduplication.near_duplicates import NearDuplicateSettings, signatures
from data_pipeline.preparation.job import FATE, Job, Seconds
from data_pipeline.preparation.row_texts import RowTexts
from data_pipeline.preparation.scratch import as_bytes, save_arrays, stamp, write_scratch
from data_pipeline.preparation.settings import Settings
from data_pipeline.shards.format import TOKENIZER_FOLDER
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.rows import empty_frame
from data_pipeline.tokens.encoding import (
    SPECIAL_TOKENS_OF_TEXT,
    SPECIAL_TOKENS_OF_TURN,
    DocumentEncoder,
    EncoderMismatchError,
)


def encode_chunk(job: Job, number: int) -> dict:
    """Write the arrays of one chunk to its file, and return its number of rows, bytes of text and seconds.

    Raises DataError if the chunk cannot be read, and EncoderMismatchError if the fast encoder gives wrong ids.
    """
    path, seconds = job.chunk_file(number), Seconds()
    encoder = _encoder(job.out / TOKENIZER_FOLDER, job.fast_encoder, stamp(job.out / TOKENIZER_FOLDER))
    parts, sources, text_bytes = [], [], 0
    bad_rows = BadRows(job.settings.on_bad_row)
    frames = job.chunks[number].frames(job.layout, bad_rows)
    while True:
        with seconds.of("read"):
            frame = next(frames, None)
        if frame is None:
            break
        texts = RowTexts.of(frame)
        text_bytes += sum(int(column.str.len_bytes().sum()) for column in texts.columns())
        try:
            part, source = _encode_rows(texts, frame["source"], job.settings, encoder, seconds)
        except EncoderMismatchError as error:
            write_scratch(job.mismatch_file, str(error).encode())
            raise
        parts.append(part)
        sources.append(source)
    with seconds.of("keep"):
        if not parts:
            empty = empty_frame(job.layout)
            part, source = _encode_rows(RowTexts.of(empty), empty["source"], job.settings, encoder, seconds)
            parts, sources = [part], [source]
        rows_before = np.cumsum([0, *(len(part["fate"]) for part in parts)])
        for part, first in zip(parts, rows_before, strict=False):
            part["origin"] += np.int32(first)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays |= _numbered(pl.concat(sources))
        arrays["bad_rows"] = as_bytes(bad_rows.summary())
        if (signature := arrays.pop("signature", None)) is not None:
            # A separate file can be memory-mapped: the signatures of all chunks together may not fit into memory.
            write_scratch(signature_file(path), lambda file: np.save(file, signature))
        save_arrays(path, arrays)
    return {"rows": int(np.count_nonzero(arrays["copy"] == 0)), "bytes": text_bytes, "seconds": dict(seconds)}


def _fate_of_texts(texts: RowTexts, source: pl.Series, settings: Settings) -> np.ndarray:
    """Return the fates of rows that follow from source and text alone, uint8 `[rows]`."""
    fate = np.zeros(len(texts), dtype=np.uint8)
    fate[texts.have_empty_text()] = FATE["empty"]
    fate[texts.are_bad()] = FATE["bad_row"]
    excluded = source.is_in(settings.exclude_sources)
    if settings.sources:
        excluded |= ~source.is_in(settings.sources)
    fate[excluded.to_numpy() & (fate != FATE["bad_row"])] = FATE["excluded_source"]
    return fate


def signature_file(chunk_file: Path) -> Path:
    """Return the path of a chunk's near-duplicate signatures."""
    return chunk_file.with_suffix(".signatures.npy")


def _encode_rows(
    texts: RowTexts, source: pl.Series, settings: Settings, encoder: DocumentEncoder, seconds: Seconds
) -> tuple[dict[str, np.ndarray], pl.Series]:
    """Return the arrays of a frame of rows, and the source of each row. The rows' copies come after them.

    origin: int32, the place among these rows that a copy was made from, or a row's own place.
    copy: uint8, 0 for a row; for a copy, the number of its augmentation from 1.
    """
    with seconds.of("clean"):
        texts = texts.cleaned(settings.cleaning)
    fate = _fate_of_texts(texts, source, settings)
    kept = np.flatnonzero(fate == 0)
    texts = texts.rows(kept)
    count, copied, copies = len(fate), kept[:0], np.zeros(0, dtype=np.uint8)
    if settings.augment:
        texts, copied, copies = texts.augmented(settings.augment)
        copied = kept[copied]
    rows = np.concatenate([kept, count + np.arange(len(copies))])  # copies follow all rows of the frame
    with seconds.of("encode"):
        ids, turn_lengths, answer_starts = encoder.encode(texts.prompts, texts.answers)
    lengths, turns = texts.sums_per_row(turn_lengths), texts.turns_per_row
    opening, rest = texts.opening, texts.rest
    with seconds.of("keys"):
        keys, opening_keys = row_keys(opening, rest)
    columns = {"length": lengths, "turns": turns, "key": keys, "opening_key": opening_keys}
    if settings.near_duplicates is not None:
        with seconds.of("signatures"):
            columns["signature"] = signatures(opening, rest, NearDuplicateSettings(settings.near_duplicates))
    with seconds.of("decontaminate"):
        contaminated = evaluation_set(settings).contaminated(opening, rest) if settings.decontaminate else False
    special_tokens = turns * (SPECIAL_TOKENS_OF_TEXT if texts.prompts is None else SPECIAL_TOKENS_OF_TURN)
    fate_of_texts = np.select(
        [
            np.full(len(texts), contaminated),
            (lengths > settings.seq_len) & (settings.long_documents == "drop"),
            lengths - special_tokens < settings.minimum_tokens,
        ],
        [FATE["contaminated"], FATE["too_long"], FATE["too_short"]],
        default=0,
    )
    fate = np.concatenate([fate, np.zeros(len(copies), dtype=np.uint8)])
    fate[rows] = fate_of_texts
    arrays = {
        "fate": fate,
        "origin": np.concatenate([np.arange(count), copied]).astype(np.int32),
        "copy": np.concatenate([np.zeros(count, dtype=np.uint8), copies]),
        "ids": ids,
        "turn_length": turn_lengths,
        "answer_start": answer_starts,
        **_spread(columns, rows, len(fate)),
    }
    return arrays, pl.concat([source, source.gather(copied)])


def evaluation_set(settings: Settings) -> EvaluationSet:
    """Return the evaluation texts, cleaned like the corpus."""
    return _evaluation_set(settings.decontaminate, settings.cleaning, tuple(map(stamp, settings.decontaminate)))


@lru_cache(maxsize=1)
def _evaluation_set(files: tuple[str, ...], cleaning: CleaningOptions, stamps: tuple[int, ...]) -> EvaluationSet:
    return EvaluationSet(files, cleaning=partial(clean, options=cleaning))


@lru_cache(maxsize=1)
def _encoder(folder: Path, fast: bool, stamp: int) -> DocumentEncoder:
    return DocumentEncoder(folder, fast)


def _spread(columns: dict[str, np.ndarray], rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Expand columns of the given rows to columns of all `count` rows, with zeros elsewhere."""
    spread = {name: np.zeros((count, *values.shape[1:]), dtype=values.dtype) for name, values in columns.items()}
    for name, values in columns.items():
        spread[name][rows] = values
    return spread


def _numbered(texts: pl.Series) -> dict[str, np.ndarray]:
    """Return each name as a number, and every name once in order of appearance, so that a long name is stored once."""
    names = texts.unique(maintain_order=True)
    if texts.is_empty():  # on an empty series polars ignores return_dtype
        numbers = np.zeros(0, dtype=np.int32)
    else:
        numbers = texts.replace_strict(names, pl.Series(np.arange(len(names))), return_dtype=pl.Int32).to_numpy()
    return {"source": numbers, "source_list": as_bytes(names.to_list())}
