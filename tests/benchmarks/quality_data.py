"""The corpus of the quality benchmark: split by question, one tokenizer for all models, packed rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from transformers import AutoTokenizer

from data_pipeline.cleaning.clean import clean
from data_pipeline.errors import DataError
from data_pipeline.loading.collate import ARRAYS, IGNORE_INDEX, collate
from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.source import open_source
from data_pipeline.tokens.tokenizer import train_tokenizer

SEQ_LEN = 512
ROWS_PER_STEP = 8
TOKENS_PER_STEP = ROWS_PER_STEP * SEQ_LEN
VOCAB_SIZE = 8192
VALIDATION_SHARE = 40  # one question in 40 is held out
TOKENIZER_ROWS = 20_000  # the training rows that the tokenizer is fitted to
FIRST_VALIDATION_ROW = 400  # earlier rows were used to choose between variants of the model
VALIDATION_ROWS = 200
VALIDATION_BATCH = 10  # rows
CURVE_BATCHES = 5  # of the validation, for the curve while training
ORDER_SEED = 1


@dataclass(frozen=True)
class ValidationBatch:
    """Rows as the loader gives them, and the UTF-8 bytes of the text of their targets."""

    rows: dict[str, torch.Tensor]
    text_bytes: int


def prepare_corpus(data: str, folder: Path) -> None:
    """Write `training` and `validation` shards of `data` under `folder`, unless they are there already.

    Raises `DataError` if the folder was made from other data.
    """
    source = open_source(data)
    made_of = folder / "source.json"
    if made_of.exists():
        if json.loads(made_of.read_text()) != source.identity:
            raise DataError(f"{folder} was made from other data than {data}: give another --out, or remove it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        training = _split(source, folder)
        texts = (text for row in training.head(TOKENIZER_ROWS).select("question", "answer").iter_rows() for text in row)
        train_tokenizer(texts, VOCAB_SIZE).save(folder / "tokenizer")
        made_of.write_text(json.dumps(source.identity))  # last: it completes the two files and the tokenizer
    for part in ("training", "validation"):
        prepare(
            f"{folder}/{part}.parquet", folder / part, Settings(tokenizer=str(folder / "tokenizer"), seq_len=SEQ_LEN)
        )


def _split(source, folder: Path) -> pl.DataFrame:
    """Clean the rows, and write those of a share of the questions to a file of their own; return the training rows."""
    frames = [frame.with_columns(clean(pl.col("prompt", "answer"))) for frame in source.frames(BadRows())]
    rows = pl.concat(frames).rename({"prompt": "question"})
    # By question, so that none is in training with one answer and in validation with another.
    apart = pl.Series([_number_of(question) % VALIDATION_SHARE == 0 for question in rows["question"]])
    rows.filter(apart).write_parquet(folder / "validation.parquet")
    training = rows.filter(~apart)
    training.write_parquet(folder / "training.parquet")
    return training


def _number_of(question: str) -> int:
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "little")


def training_stream(folder: Path) -> BatchStream:
    """Return the training batches, in the same order for every model and seed."""
    return BatchStream(
        ShardFolder(folder / "training"),
        seed=ORDER_SEED,
        global_batch_rows=ROWS_PER_STEP,
        micro_batch_rows=ROWS_PER_STEP,
        rank=0,
        world_size=1,
    )


def validation_batches(folder: Path) -> list[ValidationBatch]:
    """Return the rows of the validation shards that figures are reported on."""
    shards = ShardFolder(folder / "validation")
    token_bytes = _token_bytes(shards)
    batches = []
    end = min(FIRST_VALIDATION_ROW + VALIDATION_ROWS, shards.num_rows)
    if end <= FIRST_VALIDATION_ROW:
        raise DataError(f"{folder} has {shards.num_rows} validation rows: more than {FIRST_VALIDATION_ROW} are needed")
    for first in range(FIRST_VALIDATION_ROW, end, VALIDATION_BATCH):
        rows = shards.gather(np.arange(first, min(first + VALIDATION_BATCH, end)))
        batch = dict(zip(ARRAYS, torch.from_numpy(collate(rows, shards.pad_token_id, "all")), strict=True))
        targets = batch["labels"][batch["labels"] != IGNORE_INDEX]
        batches.append(ValidationBatch(batch, int(token_bytes[targets].sum())))
    return batches


def _token_bytes(shards: ShardFolder) -> torch.Tensor:
    """Return the bytes of text of each token, `[vocabulary]`; special tokens have none, though they are targets.

    A byte-level BPE writes a token with one character a byte, so this is exact even if a row's end cuts a character.
    """
    tokenizer = AutoTokenizer.from_pretrained(shards.tokenizer_path)
    lengths = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(shards.vocab_size)))])
    lengths[tokenizer.all_special_ids] = 0
    return lengths
