"""The files of a source: what a path, a folder or a pattern stands for.

Folders follow the rules of the Hugging Face hub: the names of folders and files tell the split.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePath

from data_pipeline.errors import DataError
from data_pipeline.sources.file_names import shown
from data_pipeline.sources.formats import NAMED, format_of
from data_pipeline.sources.origin import NOTE

# The words for each split, as in `datasets`: whole words between these separators.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = r"-._ 0-9"
_SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
# Files beside data that are no data.
NOTES = (
    "readme*", "license*", "licence*", "citation*", "changelog*", "*.md", "*.rst", "*.py", "*.ipynb", "*.yaml", "*.yml",
    "*.cff", "*.bib", "*.sha256", "*.md5", "*.png", "*.jpg", "*.svg", "_success", "config.json", "state.json",
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", NOTE,
)  # fmt: skip
NAMED_FILES = 3  # names shown for each reason


@dataclass(frozen=True)
class FileChoice:
    """What a user says about the files of folders.

    split: the split to read.
    exclude: patterns of files to leave out, matched against their names and their paths below the folder.
    """

    split: str = "train"
    exclude: tuple[str, ...] = ()


@dataclass
class Found:
    """The files of a source. left: files that are not read, by reason."""

    taken: list[Path] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, file: str | Path, reason: str) -> None:
        """Note a file that is not read."""
        self.left.setdefault(reason, []).append(shown(file))

    def report(self) -> list[str]:
        """Say what is read and what is left out, in a line each."""
        lines = [f"reading {_count(self.taken)}: {_some([shown(file) for file in self.taken])}"]
        return lines + [f"leaving out {_count(files)}, {reason}: {_some(files)}" for reason, files in self.left.items()]


def find_files(parts: list[str], choice: FileChoice) -> Found:
    """Find the files that paths, folders and patterns stand for, each once, in sorted order.

    Raises DataError if a part stands for no file, or for one that cannot be read.
    """
    found = Found()
    for part in parts:
        path = Path(part).expanduser()
        if path.is_dir():
            found.taken += _in_folder(path, choice, found)
        elif path.exists():
            found.taken += [_known(path, part)]
        else:
            found.taken += _matching(part, path, choice, found)
    found.taken = sorted({file.resolve(): file for file in found.taken}.values())
    return found


def _in_folder(folder: Path, choice: FileChoice, found: Found) -> list[Path]:
    candidates: dict[str, Path] = {}
    for file in _files_below(folder):
        name = file.relative_to(folder).as_posix()
        if reason := _reason_to_leave(name, choice):
            found.leave(file, reason)
        else:
            candidates[name] = file
    splits = split_of_files(list(candidates))
    taken = [file for name, file in candidates.items() if splits[name] == choice.split]
    if candidates and not taken:
        others = sorted({split for split in splits.values() if split})
        raise DataError(
            f"{shown(folder)} has no file of the split {choice.split}, only of {', '.join(others)}: choose one with --split"
        )
    if not candidates:
        raise DataError(f"the source {shown(folder)} contains no {NAMED} file: check the path")
    for name, file in candidates.items():
        if splits[name] != choice.split:
            found.leave(file, f"of the split {splits[name]}" if splits[name] else "without a split in the name")
    return [_known(file, shown(file)) for file in taken]


def _matching(part: str, path: Path, choice: FileChoice, found: Found) -> list[Path]:
    """Return the files that match a pattern. Brackets and stars in the names of existing folders stand for themselves."""
    literal: Path | None = Path(path.anchor)
    pattern = ""
    for step in path.parts[len(Path(path.anchor).parts) :]:
        literal = literal / step if literal is not None and (literal / step).is_dir() else None
        pattern = os.path.join(pattern or path.anchor, step if literal is None else glob.escape(step))
    taken = []
    for name in sorted(glob.glob(pattern, recursive=True)):
        file = Path(name)
        if file.is_dir():
            found.leave(file, "a folder that matches a pattern")
        elif reason := _reason_to_leave(file.name, choice):
            found.leave(file, reason)
        else:
            taken.append(_known(file, name))
    if not taken:
        raise DataError(f"the source {shown(part)} does not exist, or matches no {NAMED} file: check the path")
    return taken


def _reason_to_leave(name: str, choice: FileChoice) -> str | None:
    parts = PurePath(name).parts
    if any(fnmatch(name, pattern) or fnmatch(parts[-1], pattern) for pattern in choice.exclude):
        return "excluded"
    if any(part.startswith(".") for part in parts) or any(part.startswith("__") for part in parts[:-1]):
        return "hidden"
    if any(fnmatch(parts[-1].lower(), pattern) for pattern in NOTES):
        return "no data"
    return None


def _known(file: Path, name: str) -> Path:
    """Return a file that can be read. Raises DataError for a link to nothing and for a file of an unknown kind."""
    if not file.exists():
        raise DataError(
            f"{shown(name)} is a link to a file that does not exist: restore the file, or leave the link out with "
            f"--exclude-files '{shown(file.name)}'"
        )
    if format_of(file) is None:
        raise DataError(
            f"{shown(name)} is of an unknown kind: give {NAMED} files, or leave it out with --exclude-files "
            f"'{shown(file.name)}'"
        )
    return file


def split_of_files(names: list[str]) -> dict[str, str | None]:
    """Return the split of each file of a folder by the rules of `datasets`; None if others have one and it has none.

    names: paths below the folder, with slashes.
    The first rule by which any file has a split holds for all of them: `data/SPLIT-00000-of-00001.*`, then names of
    folders, then names of files. If there is none, all files are of the split train.
    """
    for rule in (_sharded_split, _split_of_folders, _split_of_name):
        splits = {name: rule(name) for name in names}
        if any(splits.values()):
            return splits
    return dict.fromkeys(names, "train")


def _sharded_split(name: str) -> str | None:
    found = _SHARDED.fullmatch(name)
    return found[1] if found else None


def _split_of_folders(name: str) -> str | None:
    return next((split for part in PurePath(name).parts[:-1] if (split := _split_in(part, "$"))), None)


def _split_of_name(name: str) -> str | None:
    return _split_in(PurePath(name).name, "(?!)")


def _split_in(part: str, end: str) -> str | None:
    """Return the split whose word is in a part of a path, between separators. end: what may also follow the word."""
    for split, words in SPLIT_WORDS.items():
        if re.search(rf"(?:^|[{_SEPARATORS}])(?:{'|'.join(words)})(?:[{_SEPARATORS}]|{end})", part):
            return split
    return None


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, following linked folders. Visit each folder once, because links can form loops."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))


def _count(files: list) -> str:
    return f"{len(files):,} file" + ("" if len(files) == 1 else "s")


def _some(names: list[str]) -> str:
    more = len(names) - NAMED_FILES
    return ", ".join(names[:NAMED_FILES]) + (f" and {more:,} more" if more > 0 else "")
