"""The files of a source: what paths, folders and patterns stand for, and why other files are left."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_pipeline.errors import DataError
from data_pipeline.sources.formats import NAMED, format_of
from data_pipeline.sources.names import as_text
from data_pipeline.sources.origin import NOTE
from data_pipeline.sources.splits import SAVED_SPLITS, splits_of

# Files that lie beside data and hold no rows: by their names, by the beginnings of their names, by their kinds.
METADATA = {NOTE, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json", "state.json", "config.json"}
DOCUMENTS = ("readme", "license", "licence", "copying", "notice", "citation", "changelog", "authors")
DOCUMENT_SUFFIXES = {
    ".md", ".rst", ".pdf", ".bib", ".cff", ".py", ".sh", ".ipynb", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".lock", ".log",
    ".md5", ".sha256", ".png", ".jpg", ".jpeg", ".gif", ".svg",
}  # fmt: skip
SAVED_STATE = "state.json"  # `Dataset.save_to_disk` writes it; it lists the arrow files
SHOWN = 3


@dataclass(frozen=True)
class FileList:
    """The files of a source in sorted order, and the names of the files that are left, with the reason of each."""

    taken: tuple[Path, ...]
    left: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        """Describe both in a few lines, however many files there are."""
        size = sum(file.stat().st_size for file in self.taken) / 1e6
        names = [as_text(file.name) for file in self.taken]
        shown = f"{names[0]} … {names[-1]}" if len(names) > SHOWN + 1 else ", ".join(names)
        lines = [f"reading {_counted(self.taken)} ({size:,.1f} MB): {shown}"]
        for reason in dict.fromkeys(reason for _, reason in self.left):
            found = sorted(name for name, its_reason in self.left if its_reason == reason)
            lines.append(f"leaving {_counted(found)}, {reason}: {several(found)}")
        return lines


@dataclass(frozen=True)
class FileChoice:
    """What a user says about the files.

    split: taken from folders that are divided into splits; a file that is named, or matches a pattern, is always taken.
    exclude: patterns of file names, or of paths within a folder, that are left.
    """

    split: str = "train"
    exclude: tuple[str, ...] = ()


ALL_OF_TRAIN = FileChoice()


def find_files(parts: Sequence[str], choice: FileChoice = ALL_OF_TRAIN) -> FileList:
    """Find the data files that paths, folders and patterns stand for.

    Raises DataError if a part has no data file, and for a file of an unknown kind or a broken link that is not excluded.
    """
    taken: dict[Path, Path] = {}
    left: dict[tuple[str, str], None] = {}
    for part in parts:
        found = _files_of(part, choice.split, choice.exclude)
        taken |= {file.resolve(): file for file in found.taken}
        left |= dict.fromkeys(found.left)
    if not taken:
        raise DataError("no source is given: name files, a folder, a hub dataset, or `sample`")
    return FileList(tuple(sorted(taken.values())), tuple(left))


def several(names: list[str]) -> str:
    """Join a few names, and say how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def is_pattern(part: str) -> bool:
    """Tell whether a part has the characters of a pattern: `*`, `?` or `[`."""
    return glob.has_magic(part)


def _files_of(part: str, split: str, exclude: Sequence[str]) -> FileList:
    path = Path(part).expanduser()
    if path.is_dir():
        return _files_below(path, split, exclude)
    if os.path.lexists(path):
        if _matches(PurePosixPath(path.name), exclude):
            return FileList((), ((as_text(path.name), "excluded"),))
        return _checked(part, [path], [])
    taken: list[Path] = []
    left: list[tuple[str, str]] = []
    for match in sorted(glob.glob(_pattern(path), recursive=True)):
        file = Path(match)
        if file.is_dir():
            if "**" not in part:  # otherwise its files match by themselves
                below = _files_below(file, split, exclude)
                taken, left = [*taken, *below.taken], [*left, *below.left]
        elif reason := _set_aside(PurePosixPath(file.name), exclude):
            left.append((as_text(file.name), reason))
        else:
            taken.append(file)
    return _checked(part, taken, left)


def _pattern(path: Path) -> str:
    """Return a pattern in which the names that exist as they are written, such as `run[1]`, stand for themselves."""
    parts = list(path.parts)
    for end in range(1, len(parts)):
        if not Path(*path.parts[:end]).exists():
            break
        parts[end - 1] = glob.escape(parts[end - 1])
    return os.path.join(*parts)


def _files_below(folder: Path, split: str, exclude: Sequence[str]) -> FileList:
    left: list[tuple[str, str]] = []
    names = []
    for name in _walk(folder, left):
        if reason := _set_aside(name, exclude):
            left.append((str(name), reason))
        else:
            names.append(name)
    splits = splits_of(folder, names)
    taken = []
    for name in names:
        if split not in splits[name]:
            others = " and ".join(sorted(splits[name]))
            left.append((str(name), f"of the split {others}" if others else "in no split"))
        elif not _is_in_saved_dataset(folder / name):
            left.append((str(name), f"not listed in {SAVED_STATE}"))
        else:
            taken.append(folder / name)
    found = sorted({each for of_file in splits.values() for each in of_file})
    if found and split not in found:
        raise DataError(
            f"the source {folder} has no file of the split {split}, only of {', '.join(found)}: choose one with --split, or "
            "name the files"
        )
    return _checked(str(folder), taken, [(as_text(name), reason) for name, reason in left])


def _walk(folder: Path, left: list[tuple[str, str]]) -> Iterator[PurePosixPath]:
    """Yield the names of the files below a folder, relative to it, and add hidden ones to `left`.

    Linked folders are followed, and each folder is visited once, because links can form loops.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be listed ({error.strerror}): check its permissions")

    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        below = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        hidden = [name for name in folders if name.startswith((".", "__"))]
        left += [(f"{below / name}/", "hidden") for name in sorted(hidden)]
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(names):
            if name.startswith("."):
                left.append((str(below / name), "hidden"))
            else:
                yield below / name


def _set_aside(name: PurePosixPath, exclude: Sequence[str]) -> str | None:
    """Return why a file is left whatever it holds, or None."""
    if _matches(name, exclude):
        return "excluded"
    plain = name.name.lower()
    is_document = plain.startswith(DOCUMENTS) and format_of(name) is None
    if name.name in METADATA or is_document or name.suffix.lower() in DOCUMENT_SUFFIXES:
        return "no data"
    return None


def _matches(name: PurePosixPath, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.name, each) or fnmatch.fnmatchcase(str(name), each) for each in patterns)


def _is_in_saved_dataset(file: Path) -> bool:
    """Tell whether state.json beside an arrow file lists it, or is missing. Caches of `map` lie in the same folder."""
    state = file.parent / SAVED_STATE
    if file.suffix.lower() != ".arrow" or not state.is_file():
        return True
    try:
        return file.name in {entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} does not list the files of a saved dataset: save it again, or delete it") from error


def _checked(part: str, taken: list[Path], left: list[tuple[str, str]]) -> FileList:
    """Return the list. Raises DataError if a taken file cannot be read as data, or if there is no file."""
    part = as_text(part)
    if not taken and not any(reason == "excluded" for _, reason in left):
        fault = "contains" if Path(part).is_dir() else "does not exist, or matches"
        raise DataError(f"the source {part} {fault} no data file ({NAMED}): check the path")
    if broken := [file for file in taken if not file.is_file()]:
        raise DataError(
            f"the source {part} has {_counted(broken)} that cannot be opened, such as broken links "
            f"({_names(broken)}): repair them, or leave them out with --exclude-files"
        )
    if unknown := [file for file in taken if format_of(file) is None]:
        raise DataError(
            f"the source {part} has {_counted(unknown)} of an unknown kind ({_names(unknown)}): "
            f"convert them ({NAMED}), or leave them out with --exclude-files"
        )
    return FileList(tuple(taken), tuple(left))


def _counted(things: Sequence) -> str:
    return f"{len(things):,} file" + "s" * (len(things) != 1)


def _names(files: list[Path]) -> str:
    return several([as_text(file.name) for file in files])
