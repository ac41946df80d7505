"""Questions: read from files, one a line or as JSON lines, and cleaned as the training text was."""

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
    """Whether it is a text that UTF-8 can write: half a surrogate pair, which JSON and a command line can hold, is none."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cleaned(text: str, name: str = "the question") -> str:
    """Clean a text as the training text was. Raises `ConfigurationError` if nothing of it is left."""
    if result := clean_text(text):
        return result
    raise ConfigurationError(
        f"{name} is {_SHORT.repr(text)}, and cleaning leaves nothing of it: web addresses and HTML tags are taken out, as "
        "they were from the training text; write it in words"
    )


def told_if_changed(text: str, result: str, name: str = "the question") -> str:
    """Say how a text is read, if cleaning took more from it than white space; else return an empty string."""
    if _without_spaces(unicodedata.normalize("NFC", text)) == _without_spaces(result):
        return ""
    return f"{name} is read as {_SHORT.repr(result)}: it was cleaned as the training text was"


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def read_lines(file: str | None) -> list[tuple[int, str]]:
    """The lines of a file, or of the standard input, with their numbers from 1, empty ones left out.

    Raises `ConfigurationError` where it cannot be read or is not UTF-8.
    """
    name = file or "the standard input"
    try:
        text = sys.stdin.read() if file is None else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read the questions in {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the questions in {name} are not UTF-8 text ({error.reason})") from error
    # Not `splitlines`: U+2028, U+0085 and others stand within a line of JSON. The byte order mark is no part of the text.
    lines = enumerate(text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").split("\n"), start=1)
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ConfigurationError(f"there is no question in {name}; give at least one line")
    for number, line in lines:
        if not is_text(line):
            raise ConfigurationError(f"line {number} of {name} is not UTF-8 text; save it as UTF-8")
    return lines


def read_objects(file: str, *names: str) -> list[dict[str, str]]:
    """The texts `names` of the object in each line of a JSON-lines file. Raises `ConfigurationError` where one has not."""
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
            raise ConfigurationError(f"line {number} of {file} is not an object with {what} {wanted}") from error
    return rows
