"""Errors that a user can fix: one sentence on stderr, a non-zero exit code and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.errors import DataError
from launcher.exit_codes import FAILED, INTERRUPTED, LOST, WRONG_INPUT


class ConfigurationError(Exception):
    """A wrong configuration, run folder or argument; one sentence says what is wrong, where, and the fix. Exit code 2."""


class TrainingError(Exception):
    """A run that started but cannot continue; one sentence says why, and what to change. Exit code 1."""


class HardwareError(Exception):
    """A lost rank, machine or connection; starting again resumes the run. Exit code 77."""


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """End the program with one sentence for these errors and for Ctrl-C; other exceptions keep their traceback."""
    try:
        yield
    except (ConfigurationError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except HardwareError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(LOST)
