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
from data_pipeline.preparation.scratch import as_bytes, save_arrays, stamp, write_scratch
from data_pipeline.preparation.settings import Settings
from data_pipeline.shards.format import TOKENIZER_FOLDER
from data_pipeline.sources.rows import empty_frame
from data_pipeline.tokens.encoding import DocumentEncoder, EncoderMismatchError

SPECIAL_TOKENS = 3  # per document: <s>, <sep> and </s>


def encode_chunk(job: Job, number: int) -> dict:
    """Write the arrays of one chunk to its file, and return its number of rows, bytes of text and seconds.

    Raises DataError if the chunk cannot be read, and EncoderMismatchError if the fast encoder gives wrong ids.
    """
    path, seconds = job.chunk_file(number), Seconds()
    encoder = _encoder(job.out / TOKENIZER_FOLDER, job.fast_encoder, stamp(job.out / TOKENIZER_FOLDER))
    parts, text_bytes = [], 0
    frames = job.chunks[number].frames()
    while True:
        with seconds.of("read"):
            frame = next(frames, None)
        if frame is None:
            break
        text_bytes += sum(frame.select(pl.col("question", "answer").str.len_bytes().sum()).row(0))
        try:
            parts.append(_encode_frame(frame, job.settings, encoder, seconds))
        except EncoderMismatchError as error:
            write_scratch(job.mismatch_file, str(error).encode())
            raise
    with seconds.of("keep"):
        parts = parts or [_encode_frame(empty_frame(), job.settings, encoder, seconds)]
        sources = pl.concat([part.pop("source") for part in parts])
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays |= _numbered(sources)
        if (signature := arrays.pop("signature", None)) is not None:
            # A separate file can be memory-mapped: the signatures of all chunks together may not fit into memory.
            write_scratch(signature_file(path), lambda file: np.save(file, signature))
        save_arrays(path, arrays)
    return {"rows": len(arrays["fate"]), "bytes": text_bytes, "seconds": dict(seconds)}


def _fate_of_texts(frame: pl.DataFrame, settings: Settings) -> np.ndarray:
    """Return the fates of rows that follow from source and text alone, uint8 `[rows]`."""
    fate = np.zeros(len(frame), dtype=np.uint8)
    empty = ((frame["question"] == "") | (frame["answer"] == "")).to_numpy()
    fate[empty] = FATE["empty"]
    excluded = frame["source"].is_in(settings.exclude_sources)
    if settings.sources:
        excluded |= ~frame["source"].is_in(settings.sources)
    fate[excluded.to_numpy()] = FATE["excluded_source"]
    return fate


def signature_file(chunk_file: Path) -> Path:
    """Return the path of a chunk's near-duplicate signatures."""
    return chunk_file.with_suffix(".signatures.npy")


def _encode_frame(
    frame: pl.DataFrame, settings: Settings, encoder: DocumentEncoder, seconds: Seconds
) -> dict[str, np.ndarray]:
    with seconds.of("clean"):
        frame = frame.with_columns(clean(pl.col("question", "answer"), settings.cleaning))
    source, fate = frame["source"], _fate_of_texts(frame, settings)
    kept = np.flatnonzero(fate == 0)
    texts = frame[kept] if len(kept) < len(frame) else frame
    question, answer = texts["question"], texts["answer"]
    with seconds.of("encode"):
        ids, lengths, answer_starts = encoder.encode(question, answer)
    with seconds.of("keys"):
        keys, question_keys = row_keys(question, answer)
    columns = {"length": lengths, "answer_start": answer_starts, "key": keys, "question_key": question_keys}
    if settings.near_duplicates is not None:
        with seconds.of("signatures"):
            columns["signature"] = signatures(question, answer, NearDuplicateSettings(settings.near_duplicates))
    with seconds.of("decontaminate"):
        contaminated = evaluation_set(settings).contaminated(question, answer) if settings.decontaminate else False
    fate[kept] = np.select(
        [
            np.full(len(kept), contaminated),
            (lengths > settings.seq_len) & (settings.long_documents == "drop"),
            lengths - SPECIAL_TOKENS < settings.minimum_tokens,
        ],
        [FATE["contaminated"], FATE["too_long"], FATE["too_short"]],
        default=0,
    )
    return {"fate": fate, "ids": ids, "source": source, **_spread(columns, kept, len(frame))}


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
