"""Sources that once blocked a preparation, filled its disk, or changed under it."""

import gzip
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from data_pipeline.checking.verification import verify
from data_pipeline.errors import DataError
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation import encode_chunks
from data_pipeline.preparation import prepare as prepare_module
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.scratch import save_arrays
from data_pipeline.sources import chunk


@pytest.mark.parametrize("empty", ["blank", "an empty gzip", "a line as long as a chunk"])
def test_a_chunk_without_rows_holds_nobody_up(settings, tmp_path, monkeypatch, empty):
    monkeypatch.setattr(chunk, "BYTES_PER_CHUNK", 4096)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"question": "a b", "answer": "c"}\n')
    if empty == "blank":
        (folder / "b.jsonl").write_text("\n\n")
    elif empty == "an empty gzip":
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"", mtime=0))
    else:
        line = json.dumps({"question": "why?", "answer": "so " * 4096})
        (folder / "b.jsonl").write_text(line + "\n")
    index = prepare(str(folder), tmp_path / "out", replace(settings, tokenizer="train"), progress=False)
    assert index["counts"]["rows_in"] == 1 + (empty == "a line as long as a chunk")
    verify(tmp_path / "out")


def test_long_names_of_sources_take_no_more_room_than_they_are_long(settings, tmp_path, monkeypatch):
    """Strings of NumPy's would all be as long as the longest."""
    rows = [{"question": "a b", "answer": f"c {number}", "source": f"s{number}" * 2} for number in range(2000)]
    rows[7]["source"] = "x" * 20_000
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    written = []
    save = encode_chunks.save_arrays
    monkeypatch.setattr(
        encode_chunks, "save_arrays", lambda path, arrays: (save(path, arrays), written.append(path.stat()))
    )
    prepare(
        str(tmp_path / "a.jsonl"), tmp_path / "out", replace(settings, tokenizer="train"), workers=1, progress=False
    )
    assert 20_000 < sum(file.st_size for file in written) < 2 * 10**6
    assert rows[7]["source"] in ShardFolder(tmp_path / "out").sources


def test_a_scratch_file_of_python_objects_is_not_written(tmp_path):
    """It would be taken for a damaged one at every rerun."""
    with pytest.raises(TypeError, match="names hold Python objects"):
        save_arrays(tmp_path / "a.npz", {"names": np.array(["a", None], dtype=object)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["in its chunk", "behind its chunk"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_that_changes_while_it_is_read_ends_the_job(settings, tmp_path, monkeypatch, suffix, when):
    rows = pl.DataFrame({"question": [f"what is {n}" for n in range(50)], "answer": ["so"] * 50})
    write = {".jsonl": pl.DataFrame.write_ndjson, ".parquet": pl.DataFrame.write_parquet}[suffix]
    file = tmp_path / f"a{suffix}"
    write(rows, file)
    encode, select = encode_chunks._encode_rows, prepare_module.select_rows

    def change_and_encode(*arguments):
        write(rows.head(20), file)
        return encode(*arguments)

    def change_and_select(job):
        file.unlink()
        return select(job)

    if when == "in its chunk":
        monkeypatch.setattr(encode_chunks, "_encode_rows", change_and_encode)
        message = r"changed while it was read \([\d,]+ bytes before, [\d,]+ now\)"
    else:
        monkeypatch.setattr(prepare_module, "select_rows", change_and_select)
        message = "was removed while it was read"
    with pytest.raises(DataError, match=f"{file.name} {message}"):
        prepare(str(file), tmp_path / "out", replace(settings, tokenizer="train"), workers=1, progress=False)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_source_of_many_files_that_differs_is_one_short_sentence(settings, tmp_path):
    """The files of both sources in full were 290,000 characters."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:03}.jsonl").write_text(json.dumps({"question": f"q {number}", "answer": "a"}) + "\n")
    settings = replace(settings, tokenizer="train")
    prepare(str(folder), tmp_path / "out", settings, workers=1, progress=False)
    (folder / "007.jsonl").write_text(json.dumps({"question": "q seven", "answer": "a"}) + "\n")
    with pytest.raises(DataError, match=r"source = \{'entry 8': \{'name': '007.jsonl'.* but source is now ") as error:
        prepare(str(folder), tmp_path / "out", settings, workers=1, progress=False)
    assert len(str(error.value)) < 1000
    (folder / "300.jsonl").write_text(json.dumps({"question": "one more", "answer": "a"}) + "\n")
    with pytest.raises(DataError, match="source = 300 entries, but source is now 301 entries"):
        prepare(str(folder), tmp_path / "out", settings, workers=1, progress=False)
