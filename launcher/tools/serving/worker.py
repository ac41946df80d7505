"""Run the model in one thread: requests are answered one after another, and a limited number may wait."""

from __future__ import annotations

import asyncio
import codecs
import copy
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from launcher.tools.serving.requests import ChatRequest, Limits, RequestError
from model import LiquidForCausalLM


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for (Radford et al. 2019).

    Printable characters stand for themselves.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _bytes_of_characters()


class TextPieces:
    """Convert token ids to text piece by piece, up to the first stop text, and without partial characters.

    A token is a sequence of UTF-8 bytes that may end within a character, so incomplete characters are held back as bytes.
    `finish_reason` becomes `stop` at a stop text or at the end of the answer, and `length` if the answer was cut off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]):
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._special = set(tokenizer.all_special_ids)
        self._held = ""
        self.finish_reason: str | None = None

    def add(self, token: int) -> str:
        """Return the text that this token completes, possibly none."""
        if self.finish_reason is not None:
            return ""
        if token == self._tokenizer.eos_token_id:
            self.finish_reason = "stop"
            return self._flush()
        return self._until_stop(self._decoder.decode(self._bytes_of(token)))

    def end(self) -> str:
        """End an answer that was cut off, and return the text that was held back."""
        if self.finish_reason is not None:
            return ""
        self.finish_reason = "length"
        return self._flush()

    def _flush(self) -> str:
        reason, self.finish_reason = self.finish_reason, None
        shown = self._until_stop(self._decoder.decode(b"", final=True))
        if self.finish_reason is None:
            self.finish_reason = reason
            shown, self._held = shown + self._held, ""
        return shown

    def _bytes_of(self, token: int) -> bytes:
        if token in self._special:
            return b""
        return bytes(BYTES[character] for character in self._tokenizer.convert_ids_to_tokens(token))

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.finish_reason, self._held = "stop", ""
            return text[: min(found)]
        # Hold back an ending that may become a stop text.
        keep = max(
            (size for stop in self._stop for size in range(len(stop)) if size and text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Job(BaseStreamer, StoppingCriteria):
    """A request that is being answered: receives tokens from `generate` and tells it when to stop."""

    def __init__(self, request: ChatRequest, tokenizer: PreTrainedTokenizerFast, limits: Limits):
        self.request = request
        self.deadline = time.monotonic() + limits.seconds
        self.cancelled = False
        self.completion_tokens = 0
        self.text = TextPieces(tokenizer, request.stop)
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._read_prompt = False
        self.done: Future  # set by the worker

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def put(self, value: torch.Tensor) -> None:
        if not self._read_prompt:  # the first call of `generate` passes the prompt
            self._read_prompt = True
            return
        self.completion_tokens += 1
        self._send(self.text.add(int(value)))

    def end(self) -> None:
        self._send(self.text.end())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ended = self.cancelled or self.is_late or self.text.finish_reason is not None
        return torch.full((len(input_ids),), ended, device=input_ids.device)

    def _send(self, piece: str | None) -> None:
        if piece != "":
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def finished(self, _: Future) -> None:
        self._send(None)

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Yield the answer's text as it is generated. Raises `RequestError` if the request exceeds its time limit."""
        try:
            while (piece := await self._pieces.get()) is not None:
                yield piece
            await asyncio.wrap_future(self.done)  # raises the job's error
            if self.is_late and self.text.finish_reason in (None, "length") and not self._is_full():
                raise RequestError(
                    503, "the answer took longer than this server allows; ask for fewer tokens", code="timeout"
                )
        finally:
            self.cancelled = True

    def _is_full(self) -> bool:
        return self.completion_tokens >= self.request.decoding.max_new_tokens


class Worker:
    """Run jobs in the order of their arrival."""

    def __init__(self, model: LiquidForCausalLM, tokenizer: PreTrainedTokenizerFast, limits: Limits):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        # Requests are read while the thread decodes, and a tokenizer must not be reconfigured while in use.
        self.reading_tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._jobs: set[Job] = set()

    def submit(self, request: ChatRequest) -> Job:
        """Queue a request. Raises `RequestError` 429 if too many are waiting."""
        if len(self._jobs) > self.limits.waiting:  # one of the jobs is running
            raise RequestError(429, "too many requests are waiting; try again later", code="rate_limit_exceeded")
        job = Job(request, self.tokenizer, self.limits)
        self._jobs.add(job)
        job.done = self._thread.submit(self._run, job)
        job.done.add_done_callback(job.finished)
        loop = asyncio.get_running_loop()
        job.done.add_done_callback(lambda _: loop.call_soon_threadsafe(self._jobs.discard, job))
        return job

    @torch.inference_mode()
    def _run(self, job: Job) -> None:
        if job.cancelled or job.is_late:
            return
        if job.request.decoding.temperature > 0:
            torch.seed() if job.request.seed is None else torch.manual_seed(job.request.seed)
        ids = torch.tensor([job.request.prompt], device=self.model.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=job,
            stopping_criteria=StoppingCriteriaList([job]),
            **job.request.decoding.arguments(),
        )

    def stop(self) -> None:
        """Stop the running job at its next token, and drop the waiting ones."""
        for job in list(self._jobs):
            job.cancelled = True
        self._thread.shutdown(cancel_futures=True)
