import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import webdataset
from transformers import AutoTokenizer

from data_pipeline.checking.verification import verify
from data_pipeline.cleaning.clean import clean_text
from data_pipeline.errors import DataError
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.tokens.tokenization import decode_answer

QUIETLY = {"workers": 1, "progress": False}


def as_json(settings):
    """Gives the settings that are plain values, for another process."""
    plain = ("tokenizer", "vocab_size", "seq_len", "rows_per_shard")
    return json.dumps({name: getattr(settings, name) for name in plain})


def contents(folder):
    """Gives the sha256 of every file by its name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def in_process(code, *arguments):
    """Starts a Python process that has imported prepare; arguments are sys.argv[1:]."""
    code = "import os, resource, signal, sys, json\nimport data_pipeline.shards.format\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


RUN = """
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from data_pipeline.errors import DataError
try:
    prepare(sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3])), workers=1, progress=False)
except DataError as error:
    sys.exit(f"one sentence: {error}")
"""


def expected_rows(rows):
    """Cleans and drops one row at a time, the obvious way: input row → question, answer, source."""
    kept, seen = {}, set()
    for number, row in enumerate(rows):
        pair = clean_text(row["question"] or ""), clean_text(row["answer"] or "")
        if all(pair) and pair not in seen:
            seen.add(pair)
            kept[number] = (*pair, row["source"])
    return kept


def read_documents(packed_rows):
    """Reassembles documents from (tokens, spans) pairs: input row → ids, answer start, source number."""
    pieces = {}
    for tokens, spans in packed_rows:
        for start, answer_start, end, source, input_row, offset in spans.tolist():
            answer = answer_start - start + offset if answer_start < end else None
            pieces.setdefault(input_row, []).append((offset, tokens[start:end].tolist(), answer, source))
    documents = {}
    for input_row, found in pieces.items():
        found.sort(key=lambda piece: piece[0])
        ids = [token for _, piece, _, _ in found for token in piece]
        ends = np.cumsum([len(piece) for _, piece, _, _ in found])
        assert [offset for offset, *_ in found] == [0, *ends[:-1]]
        documents[input_row] = (ids, min(answer for _, _, answer, _ in found if answer is not None), found[0][3])
    return documents


def assert_texts(documents, folder, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    names = ShardFolder(folder).index["sources"]
    texts = {
        input_row: (decode_answer(tokenizer, ids[1 : start - 1]), decode_answer(tokenizer, ids[start:]), names[source])
        for input_row, (ids, start, source) in documents.items()
    }
    assert texts == expected_rows(rows)
    layout = (tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id)
    assert all((ids[0], ids[start - 1], ids[-1]) == layout for ids, start, _ in documents.values())


def test_shards_hold_every_cleaned_row_exactly_once(prepared, rows):
    folder = ShardFolder(prepared)
    documents = read_documents(folder.read(row) for row in range(folder.num_rows))
    assert_texts(documents, prepared, rows)
    assert any(len(ids) > folder.seq_len for ids, _, _ in documents.values())


def test_webdataset_itself_reads_the_same(prepared, rows):
    tars = sorted(str(path) for path in prepared.glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == ShardFolder(prepared).num_rows
    packed = [
        [np.load(io.BytesIO(sample[member]), allow_pickle=False) for member in ("tokens.npy", "spans.npy")]
        for sample in samples
    ]
    assert_texts(read_documents(packed), prepared, rows)


def test_rows_in_are_packed_rows_and_rows_dropped(prepared, rows):
    counts = ShardFolder(prepared).index["counts"]
    assert counts["rows_in"] == len(rows) == counts["documents"] + sum(counts["rows_dropped"].values())
    assert {reason: rows for reason, rows in counts["rows_dropped"].items() if rows} == {"empty": 3, "duplicate": 20}
    verify(prepared)


def test_the_index_names_no_path_of_this_machine(prepared, corpus):
    text = (prepared / "index.json").read_text()
    assert str(corpus.parent) not in text
    assert str(prepared.parent) not in text


def test_a_second_run_gives_the_same_bytes(prepared, corpus, settings, tmp_path):
    prepare(str(corpus), tmp_path / "again", settings, **QUIETLY)
    assert contents(tmp_path / "again") == contents(prepared)


def test_groups_bound_what_packing_mixes(corpus, rows, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.chunk.ROWS_PER_CHUNK", 50)
    monkeypatch.setattr("data_pipeline.preparation.select_rows.ROWS_PER_GROUP", 100)
    pl.DataFrame(rows).write_parquet(tmp_path / "corpus.parquet", row_group_size=25)
    prepare(str(tmp_path / "corpus.parquet"), tmp_path / "out", settings, **QUIETLY)
    folder = ShardFolder(tmp_path / "out")
    packed = [folder.read(row) for row in range(folder.num_rows)]
    assert all(len(set(spans[:, 4] // 100)) == 1 for _, spans in packed)
    assert_texts(read_documents(packed), tmp_path / "out", rows)
    groups = {name.split("-")[1] for name in contents(tmp_path / "out") if name.endswith(".tar")}
    assert groups == {"00000", "00001", "00002", "00003"}  # all of the fifth is dropped


def test_a_finished_folder_is_left_alone(prepared, corpus, settings):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    index = prepare(str(corpus), prepared, settings, **QUIETLY)
    assert index["counts"]["rows_in"] > 0
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_a_folder_of_another_config_is_refused(prepared, corpus, settings):
    with pytest.raises(DataError, match="was prepared with seq_len = 64, but seq_len is now 32"):
        prepare(str(corpus), prepared, replace(settings, seq_len=32), **QUIETLY)
    with pytest.raises(DataError, match="was prepared with source"):
        prepare("sample", prepared, settings, **QUIETLY)
    with pytest.raises(DataError, match="was prepared with tokenizer"):
        prepare(str(corpus), prepared, replace(settings, tokenizer=str(prepared / "tokenizer")), **QUIETLY)


def test_a_foreign_folder_is_refused_and_not_touched(corpus, settings, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="contains thesis.txt, which `prepare` did not make"):
        prepare(str(corpus), tmp_path, settings, **QUIETLY)
    with pytest.raises(DataError, match="is a file: name a folder"):
        prepare(str(corpus), tmp_path / "thesis.txt", settings, **QUIETLY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_foreign_file_in_an_unfinished_folder_is_kept(prepared, corpus, settings, tmp_path):
    out = tmp_path / "out"
    prepare(str(corpus), out, settings, **QUIETLY)
    (out / "index.json").unlink()
    (out / "tokenizer" / "notes.txt").write_text("mine")
    names = contents(out)
    with pytest.raises(DataError, match=r"contains tokenizer/notes.txt"):
        prepare(str(corpus), out, settings, **QUIETLY)
    assert contents(out) == names
    (out / "tokenizer" / "notes.txt").unlink()
    prepare(str(corpus), out, settings, **QUIETLY)
    assert contents(out) == contents(prepared)


@pytest.mark.parametrize("killed_at", [2, 6, 9])
def test_a_run_after_a_kill_gives_the_same_bytes(prepared, corpus, settings, tmp_path, killed_at):
    kill = f"""
calls, fsync = [], os.fsync
def kill_at_a_sync(descriptor):
    calls.append(descriptor)
    if len(calls) == {killed_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = kill_at_a_sync
"""
    process = in_process(kill + RUN, corpus, tmp_path / "out", as_json(settings))
    process.communicate(timeout=60)
    assert process.returncode == -9
    left = contents(tmp_path / "out")
    assert any(name.endswith(".partial") for name in left)
    assert "index.json" not in left
    with pytest.raises(DataError, match="is unfinished"):
        ShardFolder(tmp_path / "out")
    prepare(str(corpus), tmp_path / "out", settings, **QUIETLY)
    assert contents(tmp_path / "out") == contents(prepared)


def test_two_processes_at_once_make_one_folder_once(prepared, corpus, settings, tmp_path):
    slow = """
import time
calls, fsync = [], os.fsync
def sync_when_told(descriptor):
    calls.append(descriptor)
    deadline = time.monotonic() + 60
    while os.path.exists(sys.argv[2] + "/tokenizer/tokenizer.json") and not os.path.exists(sys.argv[4]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    fsync(descriptor)
os.fsync = sync_when_told
"""
    go = tmp_path / "go"
    arguments = (slow + RUN + "print(len(calls))", corpus, tmp_path / "out", as_json(settings), go)
    processes = [in_process(*arguments)]
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists():
        assert processes[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    processes.append(in_process(*arguments))
    waits = f"waiting for another process that is preparing {tmp_path / 'out'}"
    waited = any(waits in line for line in processes[1].stderr)  # ends where the process does
    go.touch()
    (first, _), (second, _) = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert waited
    assert int(first) > 5
    assert int(second) == 0
    assert contents(tmp_path / "out") == contents(prepared)


def test_a_disk_that_takes_no_more_is_one_sentence(corpus, settings, tmp_path):
    # A file size limit fails a write in the middle as a full disk does, and leaves room for the tokenizer.
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    process = in_process(limit + RUN, corpus, tmp_path / "out", as_json(replace(settings, rows_per_shard=1000)))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(f"one sentence: {tmp_path / 'out'} cannot be written: free disk space")
    assert not [name for name in contents(tmp_path / "out") if name == "index.json" or name.endswith(".tar")]


def test_a_folder_that_cannot_be_made_is_one_sentence(corpus, settings):
    with pytest.raises(DataError, match="/proc/shards cannot be written"):
        prepare(str(corpus), "/proc/shards", settings, **QUIETLY)


def test_a_source_without_usable_rows_is_refused(settings, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"question": "q", "answer": ""}\n' * 3)
    with pytest.raises(DataError, match=r"no row of empty.jsonl is left for training \(3 empty\): check its texts"):
        prepare(str(tmp_path / "empty.jsonl"), tmp_path / "out", settings, **QUIETLY)


@pytest.mark.parametrize("setting", [{"seq_len": 3}, {"rows_per_shard": 0}, {"vocab_size": 10}])
def test_a_setting_that_cannot_work_is_refused(corpus, settings, tmp_path, setting):
    ((name, value),) = setting.items()
    with pytest.raises(DataError, match=f"{name} {value} is too s"):
        prepare(str(corpus), tmp_path / "out", replace(settings, **setting), **QUIETLY)


@pytest.mark.parametrize(
    "lost", ["shard-00000-001.tar", "validation/index.json", "validation/tokenizer/tokenizer.json"]
)
def test_a_finished_folder_that_has_lost_a_file_is_made_anew(corpus, settings, tmp_path, lost, capsys):
    settings = replace(settings, validation_share=0.2)
    prepare(str(corpus), tmp_path / "out", settings, **QUIETLY)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    prepare(str(corpus), tmp_path / "out", settings, **QUIETLY)
    assert f"has lost {lost}: preparing it again" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_source_that_was_edited_is_another_one(corpus, settings, tmp_path):
    source = tmp_path / "corpus.jsonl"
    source.write_text(corpus.read_text())
    prepare(str(source), tmp_path / "out", settings, **QUIETLY)
    source.write_text(corpus.read_text().replace("water", "metal"))  # as many bytes
    with pytest.raises(DataError, match="was prepared with source"):
        prepare(str(source), tmp_path / "out", settings, **QUIETLY)


def test_with_nothing_left_other_settings_can_be_tried(corpus, settings, tmp_path, capsys):
    with pytest.raises(DataError, match=r"left for training \(420 excluded source\)"):
        prepare(str(corpus), tmp_path / "out", replace(settings, sources=("s9",)), **QUIETLY)
    assert "no row has the source 's9' that the settings name" in capsys.readouterr().err
    prepare(str(corpus), tmp_path / "out", settings, **QUIETLY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_a_line_and_all_its_processes(corpus, tmp_path, number):
    (tmp_path / "in").mkdir()
    for part in range(4):
        (tmp_path / "in" / f"{part}.jsonl").write_text(corpus.read_text() * 40)
    command = [
        sys.executable,
        "-m",
        "launcher.cli",
        "prepare",
        tmp_path / "in",
        "--tokenizer",
        "train",
        "--seq-len",
        "64",
    ]
    command += ["--workers", "2", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell's background job ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / "out" / ".work" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in said
    assert {signal.SIGINT: "interrupted", signal.SIGTERM: "run the same command again to resume"}[number] in said
    deadline = time.monotonic() + 10
    while living_in_group(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def living_in_group(number):
    """Gives the states of a process group's processes that have not ended."""
    stats = map(stat_of, Path("/proc").glob("[0-9]*/stat"))
    return [stat for stat in stats if stat[2:3] == [str(number)] and stat[0] != "Z"]


def stat_of(path):
    """Gives a process's state, parent and group."""
    try:
        return path.read_text().rpartition(")")[2].split()[:3]
    except OSError:  # it has ended
        return []


def test_progress_is_shown_on_stderr_alone(corpus, settings, tmp_path, capsys):
    prepare(str(corpus), tmp_path / "out", settings, workers=1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fitting the tokenizer" in shown.err
    assert "packing rows" in shown.err
    assert "MB/s" in shown.err


def test_the_led_tokenizer_is_used_as_it_is(led_tokenizer, corpus, rows, settings, tmp_path):
    index = prepare(str(corpus), tmp_path / "out", replace(settings, tokenizer=led_tokenizer), **QUIETLY)
    assert index["vocab_size"] == 50266
    folder = ShardFolder(tmp_path / "out")
    assert_texts(read_documents(folder.read(row) for row in range(folder.num_rows)), tmp_path / "out", rows)
