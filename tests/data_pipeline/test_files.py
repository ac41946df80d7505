"""Which files of a folder are data, which split they are in, and what the user is told about the others."""

import json
import os
from pathlib import Path, PurePosixPath

import polars as pl
import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation.prepare import prepare
from data_pipeline.sources.files import FileChoice, find_files
from data_pipeline.sources.source import open_source
from data_pipeline.sources.splits import splits_of

ROW = json.dumps({"question": "q", "answer": "a"}) + "\n"
# Folders of a hub's dataset, each a list of files.
LAYOUTS = {
    "one file": ["a.jsonl"],
    "numbered": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/extra.jsonl"]
    + ["data/test-00000-of-00001.parquet", "data/sft_part-00000-of-00001.parquet", "more/train.jsonl"],
    "numbered elsewhere": ["train-00000-of-00001.parquet", "parts/test-00000-of-00001.parquet"],
    "file names": ["train.jsonl", "my-train-2.jsonl", "x/dev.jsonl", "training_1.jsonl", "val 2.jsonl", "contest.jsonl"]
    + ["trainer.jsonl", "eval.jsonl", "train_test.jsonl", "strain.jsonl", "re_evaluation.jsonl"],
    "folders": ["train/a.jsonl", "x/my-test/deep/b.jsonl", "validation_2/c.jsonl", "d.jsonl", "trained/test.jsonl"]
    + ["a.dev/e.jsonl", "x/train-set.y/f.jsonl"],
    "only a test folder": ["test-driven/a.jsonl", "haskell/b.jsonl"],
    "no keyword": ["b/c.jsonl", "a.jsonl", "TRAIN.jsonl"],
    "configured": ["x/a1.jsonl", "x/y/a2.jsonl", "held/b.jsonl", "c.jsonl"],
    "configured folder": ["x/train.jsonl", "x/test.jsonl", "y/train.jsonl"],
}
READMES = {
    "configured": "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: x/**/*.jsonl\n"
    "  - split: held_out\n    path:\n    - held/[ab]?jsonl\n- config_name: other\n  data_files: c.jsonl",
    "configured folder": "configs:\n- config_name: only\n  data_dir: x",
}


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW)
    return folder


def taken(*parts, **options):
    return [file.name for file in find_files([str(part) for part in parts], FileChoice(**options)).taken]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_the_hub(tmp_path, layout):
    """`datasets` resolves the same folder."""
    from datasets.data_files import DataFilesDict, get_data_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    names = LAYOUTS[layout]
    write(tmp_path, *names)
    base, patterns = tmp_path, None
    if layout in READMES:
        (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{READMES[layout]}\n---\n# Data\n")
        card = MetadataConfigs.from_dataset_card_data(DatasetCard.load(tmp_path / "README.md").data)
        chosen = next(iter(card.values()))
        base = tmp_path / chosen.get("data_dir", "")
        if files := chosen.get("data_files"):
            patterns = {
                str(entry["split"]): [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
                for entry in files
            }
    found = DataFilesDict.from_patterns(patterns or get_data_patterns(str(base)), base_path=str(base))
    expected = {
        name: {split for split, files in found.items() if str(tmp_path / name) in map(str, files)} for name in names
    }
    assert {
        str(name): set(splits) for name, splits in splits_of(tmp_path, map(PurePosixPath, names)).items()
    } == expected


def test_rows_of_the_test_split_are_no_training_rows(tmp_path):
    names = [f"data/{split}-00000-of-00001.jsonl" for split in ("train", "test", "validation")]
    write(tmp_path, *names)
    assert taken(tmp_path) == ["train-00000-of-00001.jsonl"]
    assert taken(tmp_path, split="test") == ["test-00000-of-00001.jsonl"]
    with pytest.raises(
        DataError, match="no file of the split dev, only of test, train, validation: choose one with --split"
    ):
        find_files([str(tmp_path)], FileChoice("dev"))
    # What is named is taken.
    assert len(taken(*(tmp_path / name for name in names))) == len(taken(tmp_path / "data" / "*.jsonl")) == 3


def test_a_folder_of_several_configurations_is_refused(tmp_path):
    write(tmp_path, "main/train.jsonl", "socratic/train.jsonl")
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/*" for name in ("main", "socratic"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    with pytest.raises(DataError, match="the configurations main, socratic: name the files or the subfolder of one"):
        find_files([str(tmp_path)])
    assert taken(tmp_path / "main") == ["train.jsonl"]
    (tmp_path / "README.md").write_text("---\nconfigs: 5\n---\n")
    with pytest.raises(DataError, match="README.md has a `configs` that cannot be read"):
        find_files([str(tmp_path)])


def test_what_lies_beside_data_is_left_and_named(tmp_path):
    write(
        tmp_path, "a.jsonl", ".ipynb_checkpoints/a.jsonl", "x/__pycache__/b.jsonl", ".c.jsonl", "README.md", "LICENSE"
    )
    write(tmp_path, "dataset_info.json", "license.jsonl", "fetch.py", "old/d.jsonl")
    found = find_files([str(tmp_path)], FileChoice(exclude=("old/*",)))
    assert [file.name for file in found.taken] == ["a.jsonl", "license.jsonl"]
    assert sorted(found.left) == [
        (".c.jsonl", "hidden"),
        (".ipynb_checkpoints/", "hidden"),
        ("LICENSE", "no data"),
        ("README.md", "no data"),
        ("dataset_info.json", "no data"),
        ("fetch.py", "no data"),
        ("old/d.jsonl", "excluded"),
        ("x/__pycache__/", "hidden"),
    ]
    assert found.lines() == [
        "reading 2 files (0.0 MB): a.jsonl, license.jsonl",
        "leaving 3 files, hidden: .c.jsonl, .ipynb_checkpoints/, x/__pycache__/",
        "leaving 4 files, no data: LICENSE, README.md, dataset_info.json and 1 more",
        "leaving 1 file, excluded: old/d.jsonl",
    ]


def test_the_lines_are_short_however_many_files_there_are(tmp_path):
    write(tmp_path, *(f"data/{split}-{n:05}-of-00500.jsonl" for split in ("train", "test") for n in range(500)))
    lines = find_files([str(tmp_path)]).lines()
    assert lines[0].endswith("train-00000-of-00500.jsonl … train-00499-of-00500.jsonl")
    assert "test-00002-of-00500.jsonl and 497 more" in lines[1]
    assert max(map(len, lines)) < 200


@pytest.mark.parametrize("name", ["b.xlsx", "b.jsonl.partial", "b", "b.txt", "b.jsonl.lz4", "x/b.bin"])
def test_data_of_an_unknown_kind_is_refused_unless_it_is_excluded(tmp_path, name):
    write(tmp_path, "a.jsonl", name)
    with pytest.raises(
        DataError, match=f"1 file of an unknown kind \\({Path(name).name}\\): convert them .* --exclude-files"
    ):
        find_files([str(tmp_path)])
    with pytest.raises(DataError, match="of an unknown kind"):
        find_files([str(tmp_path / name)])
    assert taken(tmp_path, exclude=[Path(name).name]) == ["a.jsonl"]
    assert taken(tmp_path / "a.jsonl", tmp_path / name, exclude=[f"{Path(name).stem}*"]) == ["a.jsonl"]


def test_many_unknown_files_are_one_short_sentence(tmp_path):
    write(tmp_path, "a.jsonl", *(f"{n:04}.bin" for n in range(1500)))
    with pytest.raises(
        DataError, match=r"1,500 files of an unknown kind \(0000.bin, 0001.bin, 0002.bin and 1,497 more\)"
    ) as error:
        find_files([str(tmp_path)])
    assert len(str(error.value)) < 400


def test_an_unknown_file_of_another_split_is_left(tmp_path):
    write(tmp_path, "train/a.jsonl", "test/b.xlsx")
    assert taken(tmp_path) == ["a.jsonl"]


def test_a_broken_link_is_refused_unless_it_is_excluded(tmp_path):
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    for part in (tmp_path, tmp_path / "b.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(
            DataError, match=r"1 file that cannot be opened, such as broken links \(b.jsonl\): repair them"
        ):
            find_files([str(part)])
    with pytest.raises(DataError, match="cannot be opened"):
        open_source(str(tmp_path / "b.jsonl"))
    assert taken(tmp_path, exclude=["b.*"]) == ["a.jsonl"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", "x/b.jsonl")
    real = os.scandir

    def refuse(path):  # root may list every folder, so permissions cannot be tested
        if Path(path).name == "x":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match="the folder .*/x cannot be listed .Permission denied.: check its permissions"):
        find_files([str(tmp_path)])


def test_brackets_in_the_name_of_a_folder_stand_for_themselves(tmp_path):
    write(tmp_path, "br[1]/a.jsonl", "br1/b.jsonl", "br2/c.jsonl")
    assert taken(tmp_path / "br[1]/*.jsonl") == ["a.jsonl"]
    assert taken(tmp_path / "br[1]") == ["a.jsonl"]
    assert taken(tmp_path / "br[12]/*.jsonl") == ["b.jsonl", "c.jsonl"]
    assert taken(tmp_path / "br[12]") == ["b.jsonl", "c.jsonl"]
    assert taken(tmp_path / "**/*.jsonl") == taken(tmp_path / "**") == ["b.jsonl", "c.jsonl", "a.jsonl"]


def test_a_name_that_is_not_utf8_is_read_and_shown(tmp_path, settings, capsys):
    """Linux allows any bytes in a name."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.jsonl", b"caf\xe8.parquet"):
        file = Path(os.fsdecode(bytes(folder) + b"/" + name))
        pl.DataFrame({"question": [f"q {name}"], "answer": ["a b"]}).write_ndjson(plain := folder / "plain")
        if file.suffix == ".parquet":
            pl.read_ndjson(plain).write_parquet(plain)
        plain.rename(file)
    index = prepare(str(folder), tmp_path / "out", settings, workers=1)
    assert index["sources"] == ["caf\\xe8.parquet", "caf\\xe9.jsonl"]
    assert [entry["name"] for entry in index["config"]["source"]] == index["sources"]
    assert "reading 2 files" in capsys.readouterr().err
