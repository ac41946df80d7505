"""The splits of a folder of data files, by the rules of the Hugging Face hub.

They are those of `datasets/data_files.py`; a test compares the two. `datasets` itself would list the folder some fifty times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import DataError

README = "README.md"
SAVED_SPLITS = "dataset_dict.json"  # `DatasetDict.save_to_disk` writes it: each split is a folder
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATOR = "[-._ 0-9]"
NUMBERED = re.compile(r"data/([^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
Names = Iterable[PurePosixPath]
Splits = dict[PurePosixPath, frozenset[str]]


def splits_of(folder: Path, names: Names) -> Splits:
    """Return the splits of each file, named relative to the folder. A file can be in none, or in several.

    The first of these that exists decides: the configuration in README.md, a saved `DatasetDict`, files named
    data/SPLIT-00000-of-00001.*, names of folders, names of files. Without any of them, all files are in `train`.
    Raises DataError if README.md divides the folder into configurations of which none is the default.
    """
    names = list(names)
    configuration = _configuration(folder)
    if patterns := configuration.patterns:
        return {name: frozenset(split for split, found in patterns if found.fullmatch(str(name))) for name in names}
    inside = {
        name: name.relative_to(configuration.folder) for name in names if name.is_relative_to(configuration.folder)
    }
    inferred = _inferred(folder / configuration.folder, list(inside.values()))
    return {name: inferred[inside[name]] if name in inside else frozenset() for name in names}


def _inferred(folder: Path, names: list[PurePosixPath]) -> Splits:
    if (saved := _saved_splits(folder)) is not None:
        return {name: frozenset(saved & set(name.parts[:1])) for name in names}
    numbered = {name: NUMBERED.fullmatch(str(name)) for name in names}
    if any(numbered.values()):
        return {name: frozenset([found[1]] if found else ()) for name, found in numbered.items()}
    for rule in (_by_folders, _by_file_name):
        splits = {name: frozenset(split for split in KEYWORDS if rule(name, split)) for name in names}
        if any(splits.values()):
            return splits
    return dict.fromkeys(names, frozenset(["train"]))


def _keyword_patterns(end: str) -> dict[str, Callable[[str], object]]:
    return {
        split: re.compile(f"(?:.*{SEPARATOR})?(?:{'|'.join(words)}){end}", re.DOTALL).fullmatch
        for split, words in KEYWORDS.items()
    }


_FOLDER_NAMES = _keyword_patterns(f"(?:{SEPARATOR}.*)?")
_FILE_NAMES = _keyword_patterns(f"{SEPARATOR}.*")


def _by_folders(name: PurePosixPath, split: str) -> bool:
    return any(map(_FOLDER_NAMES[split], name.parts[:-1]))


def _by_file_name(name: PurePosixPath, split: str) -> bool:
    return bool(_FILE_NAMES[split](name.name))


def _saved_splits(folder: Path) -> set[str] | None:
    note = folder / SAVED_SPLITS
    if not note.is_file():
        return None
    try:
        return set(json.loads(note.read_bytes())["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{note} does not list the splits of a saved dataset: save it again, or delete it") from error


@dataclass(frozen=True)
class _Configuration:
    """What README.md says about the files: a pattern of each split, and the folder that holds all of them."""

    patterns: tuple[tuple[str, re.Pattern], ...] = ()
    folder: str = "."


def _configuration(folder: Path) -> _Configuration:
    try:
        text = (folder / README).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return _Configuration()
    found = FRONT_MATTER.match(text)
    if found is None or "configs:" not in found[1]:
        return _Configuration()
    import yaml

    try:
        chosen = _chosen(folder, yaml.safe_load(found[1])["configs"])
        below = PurePosixPath(chosen.get("data_dir", "."))
        pairs = _split_patterns(chosen.get("data_files", []))
        return _Configuration(tuple((split, _regex(str(below / pattern))) for split, pattern in pairs), str(below))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the front matter of {folder / README} has a `configs` that cannot be read: correct it, or remove that file"
        ) from error


def _chosen(folder: Path, configurations: list[dict]) -> dict:
    """Return the only configuration, or the default one."""
    default = [each for each in configurations if each.get("default") or each["config_name"] == "default"]
    chosen = configurations if len(configurations) == 1 else default
    if not chosen:
        names = [str(each["config_name"]) for each in configurations]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise DataError(
            f"{folder / README} divides this folder into the configurations {shown}: name the files or the subfolder of one"
        )
    return chosen[0]


def _split_patterns(files: Any) -> list[tuple[str, str]]:
    """Return pairs of split and pattern from the forms that `data_files` may have."""
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    pairs = []
    for entry in files if isinstance(files, list) else [files]:
        split, paths = (entry["split"], entry["path"]) if isinstance(entry, dict) else ("train", entry)
        pairs += [(str(split), path) for path in (paths if isinstance(paths, list) else [paths])]
    return pairs


def _regex(pattern: str) -> re.Pattern:
    """Translate a glob: `*` and `?` stay within a name, `**` crosses folders."""
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]+\]|.", pattern, re.DOTALL)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    sets = (part.replace("[!", "[^", 1) if len(part) > 2 and part[0] == "[" else re.escape(part) for part in parts)
    return re.compile(
        "".join(known.get(part, translated) for part, translated in zip(parts, sets, strict=True)), re.DOTALL
    )
