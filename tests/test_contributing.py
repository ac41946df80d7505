"""CONTRIBUTING.md names files that exist, and names that are in them."""

import re
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
ROWS = re.findall(
    r"^\| (?!to change)(an? .*?|what .*?) \| (.*) \|$",
    (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    re.MULTILINE,
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


@pytest.mark.parametrize(("change", "places"), ROWS, ids=[change for change, _ in ROWS])
def test_a_change_has_its_code_tests_and_documentation(change, places):
    code, tests, documentation = places.split(" | ")
    assert "/" in code and "`tests/" in tests and documentation


# The help of a command and a README repeat the names of a registry, because commands have to start fast.
LISTS = {
    "RULES": ("data_pipeline.cleaning.clean", "launcher/commands/clean.py", "data_pipeline/README.md"),
    "LAYOUTS": ("data_pipeline.sources.layout_choice", "launcher/commands/source_options.py", "data_pipeline/README.md"),
    "AUGMENTATIONS": (
        "data_pipeline.augmentation.augmentations", "launcher/commands/prepare.py", "data_pipeline/README.md",
    ),
    "FORMATS": ("data_pipeline.sources.formats", None, "data_pipeline/README.md"),
    "OPTIONS": ("launcher.cluster.site", "launcher/commands/submit.py", "slurm/README.md"),
    "VARIABLES": ("launcher.cluster.site", "launcher/commands/submit.py", "slurm/README.md"),
    "PER_TOKEN": ("model.loss", None, "model/loss.py"),
    "PER_SUPERVISED_TOKEN": ("model.loss", None, "model/loss.py"),
}  # fmt: skip


@pytest.mark.parametrize("registry", LISTS)
def test_lists_in_help_and_pages_name_every_entry_of_their_registry(registry):
    module, *places = LISTS[registry]
    names = [name for name in getattr(import_module(module), registry) if name.count(".") < 2]
    assert names
    for place in filter(None, places):
        text = (PROJECT / place).read_text(encoding="utf-8")
        assert [name for name in names if name not in text] == [], place


def test_the_page_of_the_model_lists_every_preset():
    page = (PROJECT / "model" / "README.md").read_text(encoding="utf-8")
    assert [
        preset.stem for preset in (PROJECT / "model" / "configs").glob("*.yaml") if f"`{preset.stem}`" not in page
    ] == []
