"""The contract's programs, run as they stand in data_pipeline/README.md."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data_pipeline
from data_pipeline.loading.order import RowOrder
from data_pipeline.loading.reader import ShardFolder

PACKAGE = Path(data_pipeline.__file__).parent
README = (PACKAGE / "README.md").read_text(encoding="utf-8")
READER, ORDER = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_reader_prints_every_document(prepared, tmp_path):
    (tmp_path / "reader.py").write_text(READER)
    run = subprocess.run(
        [sys.executable, "reader.py", prepared], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    folder = ShardFolder(prepared)
    expected = []
    for row in range(folder.num_rows):
        tokens, spans = folder.read(row)
        for start, answer_start, end, source, input_row, offset in spans.tolist():
            texts = tokens[start:answer_start].tolist(), tokens[answer_start:end].tolist()
            expected.append([folder.sources[source], input_row, offset, *texts])
    assert [json.loads(line) for line in run.stdout.splitlines()] == expected


@pytest.mark.parametrize("rows_per_file", [[7], [5, 1, 9], [3] * 15 + [11] * 20])
def test_the_order_is_the_one_that_training_reads(rows_per_file):
    names: dict = {}
    exec(ORDER, names)
    index = {
        "files": [{"rows": rows, "sha256": f"{number:064}"} for number, rows in enumerate(rows_per_file)],
        "tokenizer": {"fingerprint": "f" * 64},
        "counts": {"packed_rows": sum(rows_per_file)},
    }
    total = sum(rows_per_file)
    order = RowOrder(total, names["fingerprint"](index), 3, rows_per_file)
    for epoch in (0, 2):
        expected = order.rows(np.arange(epoch * total, (epoch + 1) * total))
        assert names["epoch_order"](index, 3, epoch).tolist() == expected.tolist()


def test_the_fingerprint_is_the_folders(prepared):
    names: dict = {}
    exec(ORDER, names)
    assert names["fingerprint"](json.loads((prepared / "index.json").read_text())) == ShardFolder(prepared).fingerprint


def test_the_index_has_the_fields_that_are_described_and_no_other(prepared):
    index = ShardFolder(prepared).index
    described = README.split("### index.json")[1].split("##")[0]
    for name in index:
        assert f"`{name}" in described
    for group in ("counts", "tokenizer"):
        for name in index[group]:
            assert f"{name}`" in described


def test_every_file_of_the_package_is_listed():
    listed = {}
    for room, files in re.findall(
        r"^\| `(\w+)/` \| (.*?) \|", README.split("## Which file does what")[1], re.MULTILINE
    ):
        listed[room] = set(re.findall(r"`(\w+\.py)`", files))
    rooms = {path.parent for path in PACKAGE.glob("*/__init__.py")}
    assert listed == {room.name: {path.name for path in room.glob("*.py")} - {"__init__.py"} for room in rooms}


def test_imports_run_one_way():
    """From a room to those below it alone."""
    floors = [
        "checking",
        "loading",
        "preparation",
        "augmentation",
        "deduplication",
        "cleaning",
        "tokens",
        "shards",
        "sources",
    ]
    for place, room in enumerate(floors):
        for path in (PACKAGE / room).glob("*.py"):
            reached = set(re.findall(r"(?:from|import) data_pipeline\.(\w+)", path.read_text(encoding="utf-8")))
            assert reached - {"errors", "files"} <= set(floors[place:]), path
