"""Errors that a user can fix: one sentence on stderr, a non-zero exit code and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.errors import DataError
from launcher.exit_codes import FAILED, INTERRUPTED, LOST, WRONG_INPUT


class OneSentenceError(Exception):
    """An error whose message is one sentence: what is wrong, where, and the fix. It ends a program with `exit_code`."""

    exit_code: int


class ConfigurationError(OneSentenceError):
    """A wrong configuration, run folder or argument."""

    exit_code = WRONG_INPUT


class DiskError(OneSentenceError):
    """A result that could not be written, mostly because the disk is full."""

    exit_code = WRONG_INPUT


class TrainingError(OneSentenceError):
    """A run that started but cannot continue."""

    exit_code = FAILED


class HardwareError(OneSentenceError):
    """A lost rank, machine or connection; starting again resumes the run."""

    exit_code = LOST


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """End the program with one sentence for these errors and for Ctrl-C; other exceptions keep their traceback."""
    try:
        yield
    except (OneSentenceError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT if isinstance(error, DataError) else error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
