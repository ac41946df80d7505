"""The held-out data of an evaluation: rows for the teacher-forced metrics, and questions with their expected answers.

Both come from one source: a shard folder, a JSON-lines file or the sample's held-out split. Questions that are not in
shards are encoded and packed here in the same way as by `lfm prepare`.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from data_pipeline.loading.reader import ShardFolder
from data_pipeline.loading.remote import is_remote
from data_pipeline.shards.format import INDEX_NAME, VALIDATION_FOLDER
from data_pipeline.shards.packing import Documents, PackedRows, pack
from data_pipeline.tokens.tokenization import encode_answer, encode_prompt, fingerprint
from launcher.errors import ConfigurationError
from launcher.held_out_questions import Question, Rows, questions_in, spread
from launcher.run_folder import RunFolder
from launcher.tools.inference.questions import cleaned, read_objects, told_if_changed
from launcher.training.setup.data_source import held_out_location

SHORTEST_ROW = 256  # minimum tokens per row for questions that are packed here


@dataclass(frozen=True)
class HeldOut:
    """The data of one evaluation, identical in every process."""

    rows: Rows
    numbers: np.ndarray  # the rows to score
    questions: list[Question]


class PackedQuestions:
    """Questions and answers packed into rows in memory."""

    def __init__(self, location: str, pairs: list[dict], tokenizer: PreTrainedTokenizerFast, longest: int):
        documents = [_encode(tokenizer, pair) for pair in pairs]
        lengths = np.array([len(ids) for ids, _ in documents])
        seq_len = int(min(longest, max(SHORTEST_ROW, lengths.max())))
        packed = pack(
            Documents(
                ids=np.concatenate([ids for ids, _ in documents]),
                lengths=lengths,
                answer_starts=np.array([start for _, start in documents]),
                sources=np.zeros(len(documents), dtype=np.int64),
                input_rows=np.arange(len(documents)),
            ),
            seq_len,
            tokenizer.pad_token_id,
            np.int64,
        )
        self.location = location
        self.num_rows = len(packed.tokens)
        self.pad_token_id = tokenizer.pad_token_id
        self.fingerprint = hashlib.sha256(packed.tokens.tobytes() + packed.spans.tobytes()).hexdigest()
        self._packed, self._first_spans = packed, np.concatenate(([0], packed.pieces.cumsum()))

    def gather(self, rows: np.ndarray) -> PackedRows:
        spans = [self._packed.spans[self._first_spans[row] : self._first_spans[row + 1]] for row in rows]
        return PackedRows(self._packed.tokens[rows], np.concatenate(spans), self._packed.pieces[rows])


def open_held_out(
    data: str | None, questions: str | None, tokenizer: PreTrainedTokenizerFast, longest: int, limit: int | None
) -> HeldOut:
    """Open the shard folder `data` (its `validation/` if it has one), or read `questions`; one of the two is given.

    longest: the model's positions. limit: the maximum number of rows (of a shard folder) or questions, evenly spaced.
    Raises `ConfigurationError` if the data does not fit the tokenizer or the model, and `DataError` if the folder is
    damaged.
    """
    if data is not None:
        return _open_shards(Path(data), tokenizer, longest, limit)
    if questions is None:
        raise ValueError("give either data or questions")
    pairs = read_questions(questions)
    pairs = _cleaned({index + 1: pairs[index] for index in spread(len(pairs), limit)}, questions)
    asked = [Question(pair["question"], pair["answer"], encode_prompt(tokenizer, pair["question"])) for pair in pairs]
    rows = PackedQuestions(questions, pairs, tokenizer, longest)
    return HeldOut(rows, np.arange(rows.num_rows), asked)


def _cleaned(pairs: dict[int, dict], source: str) -> list[dict]:
    """Clean the pairs (keyed by their number) like the training data, and print a note if that changed any."""
    result, changed = [], 0
    for number, pair in pairs.items():
        texts = {
            name: cleaned(pair[name], f"the {name} of pair {number} of {source}") if pair[name].strip() else ""
            for name in ("question", "answer")
        }
        changed += any(told_if_changed(pair[name], text) for name, text in texts.items())
        result.append(texts)
    if changed:
        print(f"note: cleaning changed {changed} of {len(pairs)} pairs, as it does for training data", file=sys.stderr)
    return result


def data_of_run(model: Path) -> str:
    """Return the folder of the held-out rows that the run is validated on.

    Raises `ConfigurationError` if `model` is not a run folder or the run has no held-out rows on this machine.
    """
    if not (model / "run.yaml").is_file():
        raise ConfigurationError(
            f"{model} is not a run folder, so its held-out data is unknown; give --data FOLDER, --questions FILE.jsonl or "
            "--questions sample"
        )
    config = RunFolder(model).read_description()["config"]
    data = held_out_location(config["data"], config.get("validation_data"))
    if data is None or is_remote(data):
        raise ConfigurationError(f"the run {model} has no held-out rows on this machine; give --data or --questions")
    return data


def read_questions(source: str) -> list[dict]:
    """Read rows with `question` and `answer` from the sample's held-out split (`sample`) or a JSON-lines file."""
    if source == "sample":
        from data_pipeline.sources.sample import held_out_rows

        return held_out_rows()
    return read_objects(source, "question", "answer")


def _open_shards(folder: Path, tokenizer: PreTrainedTokenizerFast, longest: int, limit: int | None) -> HeldOut:
    if (folder / VALIDATION_FOLDER / INDEX_NAME).is_file():
        folder = folder / VALIDATION_FOLDER
    rows = ShardFolder(folder)
    if rows.tokenizer_fingerprint != fingerprint(tokenizer.backend_tokenizer):
        raise ConfigurationError(
            f"{folder} was prepared with a different tokenizer than the model's; prepare it again with --tokenizer and the "
            "model's folder"
        )
    if rows.seq_len > longest:
        raise ConfigurationError(
            f"{folder} has rows of {rows.seq_len} tokens, but the model takes at most {longest}; prepare it again with "
            f"--seq-len {longest}"
        )
    if rows.num_rows == 0:
        raise ConfigurationError(
            f"{folder} has no rows; prepare it from more data, or with a larger --validation-share"
        )
    numbers = spread(rows.num_rows, limit)
    questions = chain.from_iterable(questions_in(rows, number, tokenizer) for number in numbers)
    return HeldOut(rows, numbers, list(questions))


def _encode(tokenizer: PreTrainedTokenizerFast, pair: dict) -> tuple[np.ndarray, int]:
    """Encode a pair; return the document's ids and the index at which its answer begins."""
    prompt = encode_prompt(tokenizer, pair["question"])
    return np.array([*prompt, *encode_answer(tokenizer, pair["answer"])], dtype=np.int64), len(prompt)
