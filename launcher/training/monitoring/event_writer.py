"""A TensorBoard writer that survives a full disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

# Figures that are kept in memory while the disk is full. A step writes about a hundred.
KEPT = 200_000
FLUSH_AFTER = 5_000  # figures
RETRY_SECONDS = 60.0


class EventWriter:
    """A `SummaryWriter` that keeps figures in memory if the disk is full, and writes them once there is space.

    purge_step: TensorBoard hides what earlier writers wrote for this step and later ones.
    say: called with a sentence when writing starts to fail, and when it works again.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._kept: deque[tuple[str, str, object, int]] = deque(maxlen=KEPT)  # since the last flush
        self._writer: SummaryWriter | None = None
        self._purge_step = purge_step
        self._failed_at: float | None = None
        self._attempt(self._open)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._add("add_scalar", tag, value, step)

    def add_image(self, tag: str, image: object, step: int) -> None:
        self._add("add_image", tag, image, step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self._add("add_text", tag, text, step)

    def add_summary(self, summary: object, step: int) -> None:
        """Add a ready-made summary, such as one of a TensorBoard plugin."""
        self._add("add_summary", "", summary, step)

    def flush(self) -> None:
        """Write all figures so far to disk, so that TensorBoard can read them."""
        self._attempt(self._flush)

    def forget_after(self, step: int) -> None:
        """Discard all figures after `step`, because training repeats those steps."""
        self._attempt(self._flush)
        self._kept = deque((entry for entry in self._kept if entry[3] <= step), maxlen=KEPT)
        self._purge_step = step + 1
        self._close()
        self._attempt(self._open)

    def close(self) -> None:
        self._attempt(self._flush)
        if self._kept:
            self._say(
                f"{len(self._kept)} TensorBoard figures of the last steps are lost: {self._folder} cannot be written"
            )
        self._close()

    def _add(self, method: str, tag: str, value: object, step: int) -> None:
        self._kept.append((method, tag, value, step))
        if self._writer is not None:
            self._attempt(lambda: self._hand_over(method, tag, value, step))
        is_due = time.monotonic() > (self._failed_at or 0.0) + RETRY_SECONDS
        if (len(self._kept) >= FLUSH_AFTER and self._writer is not None) or (self._writer is None and is_due):
            self._attempt(self._flush)

    def _open(self) -> None:
        """Open a new event file and write all kept figures to it.

        The previous file may hold some of them already; `purge_step` hides those.
        """
        first = min((step for *_, step in self._kept), default=self._purge_step)
        self._writer = SummaryWriter(str(self._folder), purge_step=min(first, self._purge_step))
        for entry in self._kept:
            self._hand_over(*entry)

    def _hand_over(self, method: str, tag: str, value: object, step: int) -> None:
        if method == "add_summary":
            self._opened().file_writer.add_summary(value, step)
        else:
            getattr(self._opened(), method)(tag, value, step)

    def _opened(self) -> Any:
        if self._writer is None:
            self._open()
        return self._writer

    def _flush(self) -> None:
        self._opened().flush()
        if self._kept:
            self._purge_step = max(step for *_, step in self._kept) + 1
        self._kept.clear()

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._close()
            if self._failed_at is None:
                self._say(
                    f"TensorBoard files in {self._folder} cannot be written ({error.strerror or error}); training "
                    "continues, and the figures are kept in memory until they can be written"
                )
            self._failed_at = time.monotonic()
            return
        if self._failed_at is not None and self._writer is not None and not self._kept:
            self._say(f"TensorBoard files can be written to {self._folder} again")
            self._failed_at = None

    def _close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with suppress(OSError):  # reported by the failed write or flush
                writer.close()
