"""Read questions from text or JSON-lines files, and clean them like the training data."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from reprlib import Repr

from data_pipeline.cleaning.clean import clean_text
from launcher.errors import ConfigurationError

_SHORT = Repr()
_SHORT.maxstring = 200


def is_text(text: object) -> bool:
    """Whether `text` is a string that UTF-8 can encode: JSON and command lines may contain unpaired surrogates."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cleaned(text: str, name: str = "the question") -> str:
    """Clean a text like the training data. Raises `ConfigurationError` if nothing of it is left."""
    if result := clean_text(text):
        return result
    raise ConfigurationError(
        f"{name} is {_SHORT.repr(text)}, and cleaning leaves nothing of it: web addresses and HTML tags are removed, as in "
        "the training data; rephrase it in words"
    )


def told_if_changed(text: str, result: str, name: str = "the question") -> str:
    """Describe the cleaned text if cleaning changed more than white space; else return an empty string."""
    if _without_spaces(unicodedata.normalize("NFC", text)) == _without_spaces(result):
        return ""
    return f"{name} is read as {_SHORT.repr(result)}: it was cleaned like the training data"


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def read_lines(file: str | None) -> list[tuple[int, str]]:
    """Read the non-empty lines of a file, or of standard input, with their numbers from 1.

    Raises `ConfigurationError` if the file cannot be read, is not UTF-8 or has no such line.
    """
    name = file or "the standard input"
    try:
        text = sys.stdin.read() if file is None else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read the questions in {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the questions in {name} are not UTF-8 text ({error.reason})") from error
    # Not `splitlines`: a line of JSON may contain U+2028, U+0085 and others. A byte order mark is not part of the text.
    text = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ConfigurationError(f"there is no question in {name}; give at least one line")
    for number, line in lines:
        if not is_text(line):
            raise ConfigurationError(f"line {number} of {name} is not UTF-8 text; save it as UTF-8")
    return lines


def read_objects(file: str, *names: str) -> list[dict[str, str]]:
    """Read the strings `names` from the object in each line of a JSON-lines file.

    Raises `ConfigurationError` if a line does not have them.
    """
    rows = []
    for number, line in read_lines(file):
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in names})
            if not all(map(is_text, rows[-1].values())):
                raise TypeError
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            wanted = " and ".join(f'"{name}"' for name in names)
            what = "the text" if len(names) == 1 else "the texts"
            raise ConfigurationError(f"line {number} of {file} is not a JSON object with {what} {wanted}") from error
    return rows
