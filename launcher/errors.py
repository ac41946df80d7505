"""Errors that a user can do something about: one sentence on stderr, an exit code that is not 0, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.errors import DataError
from launcher.exit_codes import FAILED, INTERRUPTED, LOST, WRONG_INPUT


class ConfigurationError(Exception):
    """What is wrong in a configuration, a run folder or an argument, where, and how to fix it, in one sentence."""


class TrainingError(Exception):
    """Why a run that began well cannot go on, and what to change, in one sentence; exit code 1, not 2."""


class HardwareError(Exception):
    """A rank, a machine or the connection between them is lost; exit code 77, and starting again goes on."""


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """End the program with one sentence where the user caused the error, or with Ctrl-C; the rest keeps its traceback."""
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
