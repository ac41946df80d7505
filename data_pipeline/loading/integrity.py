"""Check the files of a shard folder against its index: names, sizes and hashes."""

import hashlib
import os
import re
from io import BufferedIOBase
from pathlib import Path, PurePosixPath

from data_pipeline.errors import DataError
from data_pipeline.shards.format import files_of

SHA256 = re.compile(r"[0-9a-f]{64}")


class BadFileError(DataError):
    """A file that is missing, or whose size or sha256 differs from the index."""


def check_index(location: str, index: dict) -> None:
    """Raise DataError if an index lacks fields that reading needs, or names a file outside its folder."""
    try:
        entries = files_of(index)
        rows = [shard["rows"] for shard in index["files"]]
        numbers = [index["seq_len"], index["vocab_size"], index["tokenizer"]["pad_token_id"], *rows]
        numbers += [entry["bytes"] for entry in entries]
        names = [PurePosixPath(entry["name"]) for entry in entries]
        hashes = [entry["sha256"] for entry in entries]
        texts = [index["tokenizer"]["fingerprint"], *index["sources"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"the index of {location} is damaged ({error!r}): copy or prepare the folder again") from error
    for name in names:
        if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in str(name):
            raise DataError(f"the index of {location} names {name}, outside the folder: prepare the data again")
    # Hashes are checked because they name the files in the cache of remote shards.
    sound = all(isinstance(text, str) for text in texts) and all(SHA256.fullmatch(str(digest)) for digest in hashes)
    if not sound or not all(type(number) is int and number >= 0 for number in numbers):
        raise DataError(f"the index of {location} is damaged: copy or prepare the folder again")


def check_size(path: Path, entry: dict) -> None:
    """Raise BadFileError if a file is missing, or if its size differs from its index entry."""
    if not path.is_file():
        raise BadFileError(f"{path} is missing, but the index lists it: copy or prepare the folder again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise BadFileError(f"{path} has {size} bytes, but the index says {entry['bytes']}: copy or prepare it again")


def check_length(file: BufferedIOBase, name: str, entry: dict) -> None:
    """Raise BadFileError, with the given name, if the size of an open file differs from its index entry."""
    size = os.fstat(file.fileno()).st_size
    if size != entry["bytes"]:
        raise BadFileError(f"{name} has {size} bytes, but the index says {entry['bytes']}: copy or prepare it again")


def check_file(file: BufferedIOBase, name: str, entry: dict) -> None:
    """Raise BadFileError, with the given name, if size or sha256 of an open file differ from its index entry."""
    check_length(file, name, entry)
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
        raise BadFileError(f"{name} has changed since it was written: copy or prepare it again")
