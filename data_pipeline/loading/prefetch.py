"""Make batches in the background, so that training steps do not wait for them."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from data_pipeline.loading.loader import BatchStream


class Prefetcher:
    """A batch stream whose next steps are made by threads while the caller works. Use it in a `with` statement.

    steps: the number of steps to make ahead.
    threads: the number of threads that make them; the batches are the same for any number.
    position: rows of the stream that were returned to the caller; rows made ahead are not counted.
    seconds_waited: how long the last call of `next_step` waited.
    """

    def __init__(self, stream: BatchStream, steps: int = 2, threads: int = 1) -> None:
        if steps < 1 or threads < 1:
            raise ValueError(f"steps is {steps} and threads is {threads}: both must be at least 1")
        self.stream = stream
        self.steps = steps
        self.seconds_waited = 0.0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._ahead: deque[Future[list[dict[str, torch.Tensor]]]] = deque()
        self._fill()

    @property
    def position(self) -> int:
        return self.stream.position

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """Return this rank's micro-batches of the next global batch, like `BatchStream.next_step`.

        An exception of a thread is raised here. The position then stays, and the next call tries again.
        """
        self._fill()
        started = time.perf_counter()
        try:
            micro_batches = self._ahead[0].result()
        except BaseException:
            self._forget()  # steps after the failed one must not be returned before it
            raise
        self.seconds_waited = time.perf_counter() - started
        self._ahead.popleft()
        self.stream.position += self.stream.global_batch_rows
        self._fill()
        return micro_batches

    def close(self) -> None:
        """Stop the threads, after they finish their current steps."""
        self._forget()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self) -> None:
        while len(self._ahead) < self.steps:
            position = self.stream.position + len(self._ahead) * self.stream.global_batch_rows
            self._ahead.append(self._threads.submit(self.stream.step_at, position))

    def _forget(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
