"""The thread behind `lfm serve`: pieces of text, a queue that ends, and answers that come too late."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from data_pipeline.tokens.tokenization import decode_answer
from launcher.inference.generation import Decoding
from launcher.serving.requests import ChatRequest, Limits, RequestError
from launcher.serving.worker import TextPieces, Worker


@pytest.fixture(scope="module")
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported)


@pytest.mark.parametrize(
    ("stop", "shown", "reason"),
    [
        ((), "zwölf 😀 ok", "stop"),
        (("ö",), "zw", "stop"),
        (("😀 o", "k"), "zwölf ", "stop"),
        (("okay",), "zwölf 😀 ok", "stop"),
    ],
)
def test_pieces_hold_no_half_character_and_nothing_of_a_stop_text(tokenizer, stop, shown, reason):
    pieces = TextPieces(tokenizer, stop)
    ids = [*tokenizer("zwölf 😀 ok", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    parts = [pieces.add(token) for token in ids]
    assert "".join(parts) == shown
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)
    assert pieces.finish_reason == reason and pieces.end() == ""
    if not stop:
        assert shown == decode_answer(tokenizer, ids)


async def read(job) -> str:
    return "".join([piece async for piece in job.pieces()])


def test_one_is_answered_one_waits_and_the_third_is_told_to_come_back(tokenizer):
    may_end = threading.Event()

    def generate(ids, streamer, **options):
        assert may_end.wait(60)
        streamer.end()

    async def ask() -> None:
        worker = Worker(SimpleNamespace(device="cpu", generate=generate), tokenizer, Limits(waiting=1))
        request = ChatRequest([1, 2], Decoding(), None, (), False, False)
        try:
            jobs = [worker.submit(request), worker.submit(request)]
            with pytest.raises(RequestError, match="too many requests are waiting") as refused:
                worker.submit(request)
        finally:
            may_end.set()
        assert refused.value.status == 429
        assert [await read(job) for job in jobs] == ["", ""]
        assert await read(worker.submit(request)) == ""

    asyncio.run(ask())


def test_an_answer_that_takes_too_long_is_ended_and_said_to_be_late(tokenizer):
    ended = []

    def generate(ids, streamer, stopping_criteria, **options):
        deadline = time.monotonic() + 60
        while not stopping_criteria(ids, None).all() and time.monotonic() < deadline:
            time.sleep(0.01)
        ended.append(time.monotonic() < deadline)
        streamer.end()

    async def ask(seconds: float) -> None:
        worker = Worker(SimpleNamespace(device="cpu", generate=generate), tokenizer, Limits(seconds=seconds))
        await read(worker.submit(ChatRequest([1, 2], Decoding(), None, (), False, False)))

    for seconds, ends in ((-1.0, []), (1.0, [True])):  # late before its turn comes, and in the middle
        with pytest.raises(RequestError, match="longer than this server allows") as refused:
            asyncio.run(ask(seconds))
        assert refused.value.status == 503 and ended == ends
