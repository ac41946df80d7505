"""The job that creates a shard folder: encode chunks, select rows, pack and write groups, and write the index last.

    source → chunks ─ encode_chunks ─→ .work/chunk-*.npz ─ select_rows ─→ .work/selection.npz ─ write_groups ─→ shards

Every step writes its files whole and under their final names, so the next process does only what is missing, even after
a crash. The source, the settings and the constants of these modules determine every chunk, group and shard: the bytes do
not depend on which processes do the work, or on how many.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.preparation.encode_chunks import encode_chunk, evaluation_set
from data_pipeline.preparation.folder import (
    begin_or_continue,
    finished_index,
    index_of,
    locked,
    missing_file,
    remove_work,
)
from data_pipeline.preparation.job import DROP_REASONS, FATE, Job, Seconds
from data_pipeline.preparation.row_texts import RowTexts
from data_pipeline.preparation.scratch import claims_folder, from_bytes, load_arrays, work_folder, write_scratch
from data_pipeline.preparation.select_rows import (
    ROWS_PER_GROUP,
    SPLITS,
    Selection,
    load_selection,
    select_rows,
    selection_file,
)
from data_pipeline.preparation.settings import Settings
from data_pipeline.preparation.team import ALONE, FinishedElsewhere, Member, Team, available_cores
from data_pipeline.preparation.write_groups import folder_of, group_files, write_group
from data_pipeline.shards.format import FORMAT_VERSION, INDEX_NAME, TOKENIZER_FOLDER, write_file, write_index
from data_pipeline.sources.bad_rows import BadRows, merged
from data_pipeline.sources.chunk import BYTES_PER_CHUNK, ROWS_PER_CHUNK
from data_pipeline.sources.source import Source, open_source
from data_pipeline.tokens.encoding import DocumentEncoder, EncoderMismatchError, fast_encoder_problem
from data_pipeline.tokens.tokenizer import CorpusTokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

DEFAULT_SETTINGS = Settings()


def prepare(
    source: str | list[str],
    out: str | Path,
    settings: Settings = DEFAULT_SETTINGS,
    *,
    workers: int | None = None,
    member: Member = ALONE,
    progress: bool = True,
    seconds: Seconds | None = None,
) -> dict:
    """Prepare a shard folder from a source and return its index. A folder finished with the same settings stays as it is.

    source: as for `open_source`.
    workers: processes on this machine; by default one for each core that this process may use.
    member: this job's place among the jobs that share the work.
    progress: show rows and MB/s on stderr.
    seconds: collects the seconds spent on each activity, summed over processes.
    The work of an interrupted run is kept and continued. If another process is at work on the folder, this one waits.
    Raises DataError for bad input, for a folder made with other settings, and if the disk refuses a write.
    """
    out, seconds = Path(out), Seconds() if seconds is None else seconds
    opened = open_source(source, settings.layout, settings.files)
    if settings.augment and not opened.layout.has_one_turn:
        raise DataError(
            f"{opened.name} has the layout {opened.layout.name}: augmentations need one prompt and one answer in each row"
        )
    if not opened.chunks:
        raise DataError(f"the source {opened.name} has no rows: check its files")
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}: give 1 or more")
    workers = min(workers or available_cores(), len(opened.chunks))
    try:
        with Team(member, workers, out / INDEX_NAME, claims_folder(out)).at_work() as team:
            tokenizer = None if settings.tokenizer == "train" else load_tokenizer(settings.tokenizer)
            config = _config(opened, tokenizer, settings)
            index = finished_index(out, config)
            if index and not missing_file(out, index):
                remove_work(out)
                return index
            with locked(out, shared=member.count > 1):
                # Another process may have finished the folder while this one waited.
                if index := finished_index(out, config):
                    if (missing := missing_file(out, index)) is None:
                        return index
                    print(f"{out} has lost {missing}: preparing it again", file=sys.stderr)
                    (out / INDEX_NAME).unlink()
                begin_or_continue(out, config, alone=member.count == 1)
                if progress:
                    for line in opened.report:
                        print(line, file=sys.stderr)
                job = Job(out.resolve(), settings, opened.chunks, opened.layout)
                return _Preparation(opened, job, config, team, progress, seconds).run(tokenizer)
    except FinishedElsewhere:
        remove_work(out)
        return index_of(out, config)
    except OSError as error:
        # Another member finished the folder and removed the work files.
        if member.count > 1 and (out / INDEX_NAME).exists() and isinstance(error, FileNotFoundError):
            return index_of(out, config)
        raise DataError(
            f"{out} cannot be written: free disk space or check the permissions, then run again ({error.strerror or error}"
            + (f": {error.filename})" if error.filename else ")")
        ) from error


class _Preparation:
    """The steps of a preparation, as one member of a team goes through them."""

    def __init__(self, source: Source, job: Job, config: dict, team: Team, progress: bool, seconds: Seconds) -> None:
        self.source, self.job, self.config, self.team = source, job, config, team
        self.progress, self.seconds, self.out = progress, seconds, job.out

    def run(self, tokenizer: CorpusTokenizer | None) -> dict:
        self.team.do_once(self._make_tokenizer, (tokenizer,), self._tokenizer_entry_file)
        self._encode_chunks()
        with self.seconds.of("select"):
            self.team.do_once(select_rows, (self.job,), selection_file(self.out))
        selection = load_selection(self.out)
        for name in selection.unknown_sources:
            print(f"no row has the source {name!r} that the settings name: check its spelling", file=sys.stderr)
        if not any(group.split == "training" for group in selection.groups):
            remove_work(self.out)  # so that another run can try other settings
            fates = ", ".join(f"{rows:,} {fate.replace('_', ' ')}" for fate, rows in _fates(selection).items() if rows)
            raise DataError(
                f"no row of {self.source.name} is left for training ({fates}): check its texts, or the settings"
            )
        with self._bar("packing rows", sum(group.rows for group in selection.groups)) as bar:

            def written(number: int, result: dict | None) -> None:
                bar.update(selection.groups[number].rows)
                self.seconds.add((result or {}).get("seconds", {}))

            self.team.do(write_group, (self.job,), group_files(self.out, selection), written)
        self.team.do_once(self._write_indexes, (selection,), self.out / INDEX_NAME)
        remove_work(self.out)
        return index_of(self.out, self.config)

    @property
    def _tokenizer_entry_file(self) -> Path:
        return work_folder(self.out) / "tokenizer.json"

    def _make_tokenizer(self, tokenizer: CorpusTokenizer | None) -> None:
        """Save the tokenizer and its index entry; train a tokenizer if none is given."""
        entry = _save_tokenizer(tokenizer or self._train_tokenizer(), self.out)
        folder = self.out / TOKENIZER_FOLDER
        if problem := fast_encoder_problem(folder):
            # A trained tokenizer is never of a kind that gigatoken supports, and its corpus is small: no warning.
            if tokenizer is not None:
                self._say(f"gigatoken does not support this tokenizer ({problem}): encoding without it is slower")
            write_scratch(self.job.mismatch_file, problem.encode())
        write_scratch(self._tokenizer_entry_file, json.dumps(entry).encode())

    def _train_tokenizer(self) -> CorpusTokenizer:
        return train_tokenizer(self._clean_texts(), self.job.settings.vocab_size)

    def _clean_texts(self) -> Iterator[str]:
        with self._bar("fitting the tokenizer", self.source.num_rows) as bar:
            for frame in self.source.frames(BadRows(self.job.settings.on_bad_row)):
                texts = RowTexts.of(frame)
                texts = texts.rows(np.flatnonzero(~texts.are_bad()))
                for column in texts.cleaned(self.job.settings.cleaning).columns():
                    yield from column
                bar.update(len(frame))

    def _encode_chunks(self) -> None:
        """Have all chunks encoded. If the fast encoder gives wrong ids, encode all of them again with the tokenizer."""
        while True:
            fast = self.job.fast_encoder
            try:
                with self._bar("encoding rows", self.source.num_rows) as bar:
                    megabytes = 0.0

                    def encoded(number: int, result: dict | None) -> None:
                        nonlocal megabytes
                        rows = (result or {}).get("rows", self.job.chunks[number].rows or 0)
                        megabytes += (result or {}).get("bytes", 0) / 1e6
                        self.seconds.add((result or {}).get("seconds", {}))
                        bar.update(rows)
                        elapsed = bar.format_dict["elapsed"]
                        bar.set_postfix_str(f"{megabytes / elapsed:.1f} MB/s" if elapsed else "")

                    self.team.do(encode_chunk, (self.job,), self.job.chunk_files(), encoded)
            except EncoderMismatchError:
                pass  # the mismatch file says so; another member may also have written it
            if not fast or self.job.fast_encoder:
                return
            self._say(f"{self.job.mismatch_file.read_text()}: encoding all rows again with the slower tokenizer")

    def _write_indexes(self, selection: Selection) -> None:
        """Write the index of each split; the index of the whole folder comes last."""
        self.source.check_unchanged()
        groups = zip(selection.groups, group_files(self.out, selection), strict=True)
        written = [(group.split, json.loads(file.read_text())) for group, file in groups]
        encoder = DocumentEncoder(self.out / TOKENIZER_FOLDER, fast=False)
        tokenizer_entry = json.loads(self._tokenizer_entry_file.read_text())
        fates = _fates(selection)
        bad_rows = merged(from_bytes(load_arrays(path, "bad_rows")["bad_rows"]) for path in self.job.chunk_files())
        for reason, count, examples in bad_rows:
            self._say(f"bad rows skipped, {reason}: {count:,}, such as {'; '.join(examples)}")
        for split in SPLITS:
            entries = [entry for entry_split, entry in written if entry_split == split]
            files = [file for entry in entries for file in entry["files"]]
            counts = {name: sum(entry[name] for entry in entries) for name in ("documents", "tokens")}
            counts["packed_rows"] = sum(file["rows"] for file in files)
            if split == "training":
                dropped = {reason: fates[reason] for reason in DROP_REASONS}
                totals = {"rows_in": selection.num_inputs, "rows_copied": selection.num_copies, "rows_dropped": dropped}
                counts = totals | counts | {"validation_documents": fates["validation"]}
                # Without the examples: they have paths, which differ between machines.
                counts["bad_rows"] = {reason: count for reason, count, _ in bad_rows}
            elif not files:
                continue
            else:
                tokenizer_entry = tokenizer_entry | {"files": _copy_tokenizer(self.out, folder_of(self.out, split))}
            write_index(
                folder_of(self.out, split),
                {
                    "format_version": FORMAT_VERSION,
                    "split": split,
                    "config": self.config,
                    "seq_len": self.job.settings.seq_len,
                    "vocab_size": encoder.vocab_size,
                    "tokenizer": tokenizer_entry,
                    "sources": selection.sources,
                    "counts": counts,
                    "files": files,
                },
            )

    def _bar(self, phase: str, rows: int | None) -> tqdm[Any]:
        from tqdm import tqdm

        # In a log file an occasional line is enough.
        seconds = 0.1 if sys.stderr.isatty() else 30
        return tqdm(total=rows, desc=phase, unit=" rows", disable=not self.progress, mininterval=seconds)

    def _say(self, sentence: str) -> None:
        if self.progress:
            print(sentence, file=sys.stderr)


def _fates(selection: Selection) -> dict[str, int]:
    """Count the rows of each fate."""
    return {name: int(np.count_nonzero(selection.fate == number)) for name, number in FATE.items()}


def _config(source: Source, tokenizer: CorpusTokenizer | None, settings: Settings) -> dict:
    """Gather everything that determines the bytes of the shards, and nothing that differs between machines."""
    tokenizer_config: dict[str, int | str]
    if tokenizer is None:
        tokenizer_config = {"train_vocab_size": settings.vocab_size}
    else:
        tokenizer_config = {"fingerprint": tokenizer.fingerprint}
    evaluation_texts = evaluation_set(settings).fingerprint if settings.decontaminate else None
    return {
        "source": source.identity,
        "layout": source.layout.config(),
        "tokenizer": tokenizer_config,
        **settings.config(),
        "decontaminate": evaluation_texts,
        "rows_per_chunk": ROWS_PER_CHUNK,
        "bytes_per_chunk": BYTES_PER_CHUNK,
        "rows_per_group": ROWS_PER_GROUP,
    }


def _save_tokenizer(tokenizer: CorpusTokenizer, out: Path) -> dict:
    files = _write_tokenizer_files(out / TOKENIZER_FOLDER, tokenizer.files())
    return {"fingerprint": tokenizer.fingerprint, "pad_token_id": tokenizer.pad_token_id, "files": files}


def _copy_tokenizer(out: Path, folder: Path) -> list[dict]:
    contents = {path.name: path.read_bytes() for path in sorted((out / TOKENIZER_FOLDER).iterdir())}
    return _write_tokenizer_files(folder / TOKENIZER_FOLDER, contents)


def _write_tokenizer_files(folder: Path, contents: dict[str, bytes]) -> list[dict]:
    folder.mkdir(exist_ok=True)
    return [
        {"name": f"{TOKENIZER_FOLDER}/{name}", **write_file(folder / name, [data])} for name, data in contents.items()
    ]
