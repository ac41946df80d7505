"""CONTRIBUTING.md names files that exist, and names that are in them."""

import re
from itertools import chain
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
ROWS = re.findall(
    r"^\| (?!to change)(an? .*?) \| (.*) \|$", (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
)


def test_the_table_has_its_rows():
    assert len(ROWS) >= 15


@pytest.mark.parametrize(("change", "places"), ROWS, ids=[change for change, _ in ROWS])
def test_a_change_is_told_by_files_and_names_that_exist(change, places):
    quoted = re.findall(r"`([^`]+)`", places)
    paths = [PROJECT / text for text in quoted if "/" in text and " " not in text]
    modules = [PROJECT / f"{text.split()[-1].replace('.', '/')}.py" for text in quoted if text.startswith("python -m ")]
    assert paths
    assert [str(path) for path in (*paths, *modules) if not path.exists()] == []
    folders = {path if path.is_dir() else path.parent for path in paths}
    beside = {
        name: [folder / name for folder in folders if (folder / name).exists()] for name in quoted if _is_file(name)
    }
    assert [name for name, found in beside.items() if not found] == []
    files = [path for path in (*paths, *chain.from_iterable(beside.values())) if path.is_file()]
    words = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = [text for text in quoted if re.fullmatch(r"[A-Za-z_]+", text) and text not in ("lfm", "gpu")]
    assert [name for name in names if name not in words] == []


def _is_file(text: str) -> bool:
    return re.fullmatch(r"[\w.]+\.(py|json)", text) is not None
