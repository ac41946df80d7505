"""Errors a user can cause: one sentence on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.errors import DataError


class ConfigurationError(Exception):
    """What is wrong in a configuration, a run folder or an argument, where, and how to fix it, in one sentence."""


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """End the program with one sentence where the user caused the error, or with Ctrl-C; the rest keeps its traceback."""
    try:
        yield
    except (ConfigurationError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
