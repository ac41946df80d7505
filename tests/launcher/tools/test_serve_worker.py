"""The thread behind `lfm serve`: pieces of text, a queue with a limit, and answers that take too long."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from data_pipeline.tokens.tokenization import decode_answer
from data_pipeline.tokens.tokenizer import load_tokenizer
from launcher.tools.inference.generation import Decoding
from launcher.tools.serving.requests import ChatRequest, Limits, RequestError
from launcher.tools.serving.worker import TextPieces, Worker
from tests.data_pipeline.conftest import LED_TOKENIZER


@pytest.fixture(scope="module")
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported)


@pytest.fixture(scope="module")
def led(tmp_path_factory):
    if not LED_TOKENIZER.is_dir():
        pytest.skip(f"the LED tokenizer is not at {LED_TOKENIZER}")
    folder = tmp_path_factory.mktemp("led")
    load_tokenizer(str(LED_TOKENIZER)).save(folder)
    return AutoTokenizer.from_pretrained(folder)


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


TEXTS = [
    "現在の状況を確認してください。",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 zwölf",
    "x² ≤ π",
    "한국어 텍스트",
    "a\ufffdb",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [(), ("never",)])
def test_text_of_any_script_is_decoded_whole_with_leds_vocabulary(led, text, stop):
    """Some of its tokens have the end of one character and the beginning of the next."""
    ids = led(text, add_special_tokens=False)["input_ids"]
    pieces = TextPieces(led, stop)
    assert "".join([*map(pieces.add, ids), pieces.end()]) == text
    for cut in range(len(ids)):  # an answer that is cut anywhere decodes as its ids do
        pieces = TextPieces(led, ())
        assert "".join([*map(pieces.add, ids[:cut]), pieces.end()]) == decode_answer(led, ids[:cut])


def test_special_tokens_are_not_shown(led):
    pieces = TextPieces(led, ())
    assert pieces.add(led.mask_token_id) + pieces.add(led.pad_token_id) + pieces.end() == ""


async def read(job) -> str:
    return "".join([piece async for piece in job.pieces()])


def test_one_request_is_answered_one_waits_and_the_third_is_rejected(tokenizer):
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


def test_an_answer_that_takes_too_long_is_stopped_with_an_error(tokenizer):
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

    for seconds, ends in ((-1.0, []), (1.0, [True])):  # too late before its turn, and midway
        with pytest.raises(RequestError, match="longer than this server allows") as refused:
            asyncio.run(ask(seconds))
        assert refused.value.status == 503 and ended == ends
