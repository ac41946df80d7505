"""Stage 1 of a preparation: a chunk of rows is read, cleaned, judged row by row and encoded, and its arrays are kept."""

from __future__ import annotations

import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import polars as pl

from data_pipeline.cleaning.clean import CleaningOptions, clean
from data_pipeline.deduplication.contamination import EvaluationSet
from data_pipeline.deduplication.keys import row_keys
from data_pipeline.deduplication.near_duplicates import NearDuplicateSettings, signatures
from data_pipeline.errors import DataError
from data_pipeline.preparation.folder import work_folder, write_scratch
from data_pipeline.preparation.settings import Settings
from data_pipeline.shards.format import TOKENIZER_FOLDER
from data_pipeline.sources.rows import empty_frame
from data_pipeline.sources.source import Chunk
from data_pipeline.tokens.encoding import DocumentEncoder, EncoderMismatchError

# What becomes of a row; those below FIRST_REASON are kept.
FATES = (
    "training", "validation", "empty", "too_short", "too_long", "excluded_source", "contaminated", "duplicate",
    "near_duplicate",
)  # fmt: skip
FATE = {name: number for number, name in enumerate(FATES)}
FIRST_REASON = FATE["empty"]
DROP_REASONS = FATES[FIRST_REASON:]
SPECIAL_TOKENS = 3  # of a document: <s>, <sep> and </s>


@dataclass(frozen=True)
class Job:
    """All that a process must know to do any unit of the work."""

    out: Path
    settings: Settings
    chunks: tuple[Chunk, ...]

    def chunk_file(self, number: int) -> Path:
        """Where stage 1 leaves a chunk's arrays; another name once the fast encoder was found wrong."""
        return work_folder(self.out) / f"chunk-{number:06d}.{'fast' if self.fast_encoder else 'slow'}.npz"

    def chunk_files(self) -> list[Path]:
        return [self.chunk_file(number) for number in range(len(self.chunks))]

    @property
    def mismatch_file(self) -> Path:
        """Stands there once the fast encoder has given other ids than the tokenizer, and says for which text."""
        return work_folder(self.out) / "slow-encoder.txt"

    @property
    def fast_encoder(self) -> bool:
        return not self.mismatch_file.exists()


class Seconds(Counter):
    """Seconds by what they went to."""

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self[name] += time.perf_counter() - begun


def encode_chunk(job: Job, number: int) -> dict:
    """Leave the arrays of one chunk in its file; returns its rows, bytes of text and seconds.

    Raises DataError for what cannot be read, EncoderMismatchError once the fast encoder is found wrong.
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
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if (signature := arrays.pop("signature", None)) is not None:
            # A file of its own, which can be mapped: all chunks' signatures together may be larger than the memory.
            write_scratch(signature_file(path), lambda file: np.save(file, signature))
        save_arrays(path, arrays)
    return {"rows": len(arrays["fate"]), "bytes": text_bytes, "seconds": dict(seconds)}


def signature_file(chunk_file: Path) -> Path:
    """Where a chunk's signatures of near duplicates lie."""
    return chunk_file.with_suffix(".signatures.npy")


def _encode_frame(
    frame: pl.DataFrame, settings: Settings, encoder: DocumentEncoder, seconds: Seconds
) -> dict[str, np.ndarray]:
    with seconds.of("clean"):
        frame = frame.with_columns(clean(pl.col("question", "answer"), settings.cleaning))
    fate = np.zeros(len(frame), dtype=np.uint8)
    source = frame["source"]
    excluded = source.is_in(settings.exclude_sources)
    if settings.sources:
        excluded |= ~source.is_in(settings.sources)
    fate[excluded.to_numpy()] = FATE["excluded_source"]
    empty = ((frame["question"] == "") | (frame["answer"] == "")).to_numpy()
    fate[(fate == 0) & empty] = FATE["empty"]

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
    judged = fate[kept]
    judged[lengths - SPECIAL_TOKENS < settings.minimum_tokens] = FATE["too_short"]
    if settings.long_documents == "drop":
        judged[lengths > settings.seq_len] = FATE["too_long"]
    if settings.decontaminate:
        with seconds.of("decontaminate"):
            found = evaluation_set(settings).contaminated(question, answer)
        judged[(judged == 0) & found] = FATE["contaminated"]
    fate[kept] = judged
    return {"fate": fate, "ids": ids, "source": _texts_to_array(source), **_spread(columns, kept, len(frame))}


def stamp(path: str | Path) -> int:
    """What changes with a file or folder, for caches that outlive it; 0 where it is missing."""
    return Path(path).stat().st_mtime_ns if Path(path).exists() else 0


def evaluation_set(settings: Settings) -> EvaluationSet:
    """The evaluation texts, cleaned as the corpus is."""
    return _evaluation_set(settings.decontaminate, settings.cleaning, tuple(map(stamp, settings.decontaminate)))


@lru_cache(maxsize=1)
def _evaluation_set(files: tuple[str, ...], cleaning: CleaningOptions, stamps: tuple[int, ...]) -> EvaluationSet:
    return EvaluationSet(files, cleaning=partial(clean, options=cleaning))


@lru_cache(maxsize=1)
def _encoder(folder: Path, fast: bool, stamp: int) -> DocumentEncoder:
    return DocumentEncoder(folder, fast)


def _spread(columns: dict[str, np.ndarray], rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Columns of some rows as columns of all, zero elsewhere."""
    spread = {name: np.zeros((count, *values.shape[1:]), dtype=values.dtype) for name, values in columns.items()}
    for name, values in columns.items():
        spread[name][rows] = values
    return spread


def _texts_to_array(texts: pl.Series) -> np.ndarray:
    return np.array(texts.to_list(), dtype=np.str_) if len(texts) else np.empty(0, dtype="U1")


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a scratch file of arrays whole, or not at all; damage shows when it is read."""
    write_scratch(path, lambda file: np.savez(file, **arrays))


def load_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Read arrays of a scratch file; raises DataError, and removes the file, where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names or arrays.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        path.unlink(missing_ok=True)
        raise DataError(f"{path} was damaged and is removed: run again, it will be made anew ({error})") from error
