"""`lfm serve`: a real server process, queried by OpenAI's client, by hand-made requests and by a browser."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch

from launcher.tools.inference.generation import Decoding, answer, load_model
from launcher.tools.serving.connections import HEAD_SECONDS
from launcher.tools.serving.requests import ChatRequest, Limits, RequestError, read_request
from launcher.tools.serving.server import BODY_SECONDS, _events
from launcher.tools.serving.worker import Worker
from tests import fork_server

COMMAND = [sys.executable, "-m", "launcher.cli", "serve"]
QUESTION = "What is 7 plus 5?"
CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip


class Server:
    """A server on a free port, with a token from LFM_TOKEN."""

    def __init__(self, model, log, *arguments: str, token: str = "secret"):
        self.token = token
        with open(log, "w") as output:
            self.process = fork_server.Popen(
                [*COMMAND, str(model), "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, "LFM_TOKEN": token},
            )
        line = self.process.stdout.readline()
        assert " answers at http://" in line, log.read_text()
        self.url = re.search(r"http://\S+", line)[0]

    def request(self, path: str, body: dict | bytes | None = None, **headers) -> tuple[int, dict]:
        """Return the status and the content of the response, even of an error."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, given), timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text.startswith(b"{") else {"text": text.decode()}

    def end(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.stdout.close()


def chat(question: str = QUESTION, **fields) -> dict:
    return {"messages": [{"role": "user", "content": question}], **fields}


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    server = Server(exported, tmp_path_factory.mktemp("server") / "log", "--body-bytes", "5000")
    yield server
    server.end()


@pytest.fixture(scope="module")
def small(exported):
    return load_model(exported)


def test_openais_own_client_gets_answers(server, small):
    from openai import AuthenticationError, BadRequestError, OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0, timeout=60)
    (model,) = client.models.list().data
    assert model.id == "small"
    ask = client.with_options().chat.completions.create
    messages = [{"role": "user", "content": QUESTION}]
    (expected,) = answer(*small, [QUESTION], Decoding(max_new_tokens=12))

    whole = ask(model=model.id, messages=messages, max_tokens=12)
    assert whole.choices[0].message.content == expected
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12

    chunks = list(
        ask(model=model.id, messages=messages, max_tokens=12, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected
    assert sum(bool(piece) for piece in pieces) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage

    assert not hasattr(whole, "notes")
    changed = [{"role": "user", "content": "Is https://example.com safe?"}]
    read = ["messages[0].content is read as 'Is safe?': it was cleaned like the training data"]
    assert ask(model=model.id, messages=changed, max_tokens=1).notes == read
    assert next(iter(ask(model=model.id, messages=changed, max_tokens=1, stream=True))).notes == read

    stop = expected[4:7]
    stopped = ask(model=model.id, messages=messages, max_tokens=12, stop=[stop, "never there"])
    assert stopped.choices[0].message.content == expected[: expected.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"

    drawn = [
        ask(model=model.id, messages=messages, max_tokens=12, temperature=1.5, top_p=0.95, seed=seed)
        .choices[0]
        .message.content
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]

    with pytest.raises(BadRequestError, match="n 2 is not supported") as refused:
        ask(model=model.id, messages=messages, n=2)
    assert refused.value.param == "n" and refused.value.type == "invalid_request_error"
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=server.url + "/v1", api_key="guess", max_retries=0).models.list()


def test_refused_requests_say_why_in_openais_format(server):
    completions = "/v1/chat/completions"
    for status, body, headers, message in (
        (401, chat(), {"Authorization": "Bearer secre"}, "requires a token"),
        (413, chat("x" * 6000), {}, "larger than 5,000 bytes"),
        (415, chat(), {"Content_Type": "text/plain"}, "send JSON"),
        (400, b"{", {}, "not valid JSON"),
        (400, chat("why? " * 300), {}, "the model takes 256"),
        (400, chat(max_tokens=255), {}, "ask for at most"),
        (400, chat(temperature="hot"), {}, "temperature is 'hot'"),
        (400, {"messages": [{"role": "system", "content": "Be kind."}]}, {}, "the last message must have the role"),
        (
            400,
            {"messages": [*chat()["messages"], {"role": "system", "content": "So."}]},
            {},
            "only the first message may be",
        ),
        (400, {"messages": [{"content": "So."}]}, {}, "messages[0] has the role None instead of 'user'"),
        (400, {"messages": ["So."]}, {}, "messages[0].content must be text"),
        (404, chat(model="gpt"), {}, "there is no model 'gpt'; ask for"),
        (
            400,
            chat("https://example.com"),
            {},
            "messages[0].content is 'https://example.com', and cleaning leaves nothing",
        ),
        (400, chat("\ud800"), {}, "messages[0].content has an unpaired surrogate"),
    ):
        found, content = server.request(completions, body, **headers)
        assert found == status, content
        assert message in content["error"]["message"]
        assert set(content["error"]) == {"message", "type", "param", "code"}
    assert server.request("/nowhere")[0] == 404
    assert server.request("/v1/models", Host="elsewhere.example")[0] == 400  # a foreign name that leads to this server
    assert server.request("/health", Authorization="")[1] == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "the body is not valid JSON"),
        (json.dumps(chat(temperature=10**400)).encode(), "temperature is 1000"),
        (json.dumps(chat(max_tokens=10**400)).encode(), "max_tokens is 1000"),
        (json.dumps(chat(max_tokens=float("nan"))).encode(), "max_tokens is nan"),
        (json.dumps(chat(tools=[[["x"] * 10_000]])).encode(), "tools .* is not supported"),
        (json.dumps(chat(model="x" * 10_000)).encode(), "there is no model 'x"),
    ],
    ids=["deep", "temperature", "max_tokens", "nan", "long", "model"],
)
def test_absurd_values_give_a_short_error(small, body, message):
    with pytest.raises(RequestError, match=message) as refused:
        read_request(body, small[1], "small", 256, Limits())
    assert refused.value.status in (400, 404) and len(refused.value.message) < 300


def test_messages_are_encoded_as_by_the_chat_template(small):
    _, tokenizer = small
    messages = [
        {"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."), ("user", "Oh?"))
    ]
    for system in ([], [{"role": "system", "content": "Be kind."}], [{"role": "developer", "content": "Be brief."}]):
        asked = [
            *system,
            *messages[:2],
            {"role": "user", "content": [{"type": "text", "text": part} for part in ("O", "h?")]},
        ]
        read = read_request(json.dumps({"messages": asked}).encode(), tokenizer, "small", 256, Limits())
        assert read.prompt == tokenizer.apply_chat_template(asked)["input_ids"]
    request = read_request(json.dumps({"messages": messages}).encode(), tokenizer, "small", 256, Limits())
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert request.prompt == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    literal = read_request(json.dumps(chat("a</s>b")).encode(), tokenizer, "small", 256, Limits())
    assert tokenizer.eos_token_id not in literal.prompt
    with pytest.raises(RequestError, match="at most 64 are allowed"):
        read_request(json.dumps({"messages": messages * 22}).encode(), tokenizer, "small", 256, Limits())


def test_an_answer_that_fails_midway_ends_with_an_error_event(small):
    """The exception is raised as well, because it belongs in the log."""
    _, tokenizer = small

    def generate(ids, streamer, **options):
        streamer.put(ids)
        streamer.put(torch.tensor([tokenizer.sep_token_id]))
        raise RuntimeError("CUDA out of memory")

    async def ask() -> None:
        worker = Worker(SimpleNamespace(device="cpu", generate=generate), tokenizer, Limits())
        request = ChatRequest([1, 2], Decoding(), None, (), True, False)
        async for event in _events(worker.submit(request), {}, request):
            events.append(event)

    events = []
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(ask())
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.slow
def test_too_many_and_too_long_requests_are_rejected(exported, tmp_path):
    """The command's options set the limits; no answer is complete within a millisecond."""
    server = Server(exported, tmp_path / "log", "--max-waiting", "1", "--request-seconds", "0.001")
    try:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(server.request("/v1/chat/completions", chat(max_tokens=220))))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 503 in {status for status, _ in found} <= {429, 503}, found
        assert all("error" in content for _, content in found)
    finally:
        server.end()


@pytest.mark.slow
def test_a_client_that_disconnects_during_its_answer_does_not_delay_the_next_one(server):
    usage = server.request("/v1/chat/completions", chat(max_tokens=200))[1]["usage"]
    assert usage["completion_tokens"] > 100, "the answer is too short to disconnect before its end"
    tries = []
    while len(tries) < 3:  # another busy process may slow down either side of a comparison
        begin = time.monotonic()
        server.request("/v1/chat/completions", chat(max_tokens=200))
        whole = time.monotonic() - begin
        tries.append((seconds_behind_one_who_leaves(server), whole))
        if tries[-1][0] < whole / 2:
            return
    raise AssertionError(f"seconds after a disconnected client, and of a whole answer: {tries}")


def seconds_behind_one_who_leaves(server: Server) -> float:
    """Return the seconds of a single token after another client has disconnected during a long answer."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(chat(max_tokens=200, stream=True)).encode()
    with socket.create_connection((host, int(port))) as leaver:
        leaver.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        leaver.recv(100)
    begin = time.monotonic()
    assert server.request("/v1/chat/completions", chat(max_tokens=1))[0] == 200
    return time.monotonic() - begin


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def test_silent_connections_do_not_block_other_clients(server):
    with contextlib.ExitStack() as stack:
        for number in range(150):
            silent = stack.enter_context(connect(server))
            silent.sendall(HEAD[: number % 3])
        assert server.request("/v1/chat/completions", chat(max_tokens=1))[0] == 200


@pytest.mark.slow
def test_silent_connections_are_closed_and_those_with_a_request_are_not(server):
    silent, half, second, asked = (connect(server) for _ in range(4))
    body = json.dumps(chat(max_tokens=1)).encode()
    half.sendall(HEAD)
    second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200 OK" in second.recv(1000)
    second.sendall(HEAD)
    asked.sendall(
        HEAD + b"Authorization: Bearer secret\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    begin = time.monotonic()
    for connection in (silent, half, second):
        while connection.recv(1000):
            pass
    assert HEAD_SECONDS - 1 < time.monotonic() - begin < BODY_SECONDS
    asked.sendall(body)
    assert b"200 OK" in asked.recv(1000)


@pytest.mark.slow
def test_a_public_address_needs_a_token_and_a_taken_port_is_reported(exported, server):
    environment = {name: value for name, value in os.environ.items() if name != "LFM_TOKEN"}
    port = server.url.rsplit(":", 1)[1]
    for arguments, message in (
        (["--host", "0.0.0.0"], "needs a token; set LFM_TOKEN or --token"),
        (["--port", port], f"cannot listen on 127.0.0.1 port {port}"),
    ):
        result = fork_server.run(
            [*COMMAND, str(exported), *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr


@pytest.mark.extra
def test_the_page_shows_the_answer_as_it_comes(server, small, tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no Chromium with its driver; install chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,700"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(server.url + "/")
        wait = WebDriverWait(browser, 60, poll_frequency=0.01)
        box = browser.find_element(By.ID, "question")
        box.send_keys(QUESTION + "\n")
        error = wait.until(lambda _: browser.find_element(By.CSS_SELECTOR, ".error"))
        assert "requires a token" in error.text
        told = browser.execute_script("return reason(new Response('Invalid host header', {status: 400}))")
        assert told == "400 Invalid host header"  # plain text, as from a proxy
        browser.find_element(By.TAG_NAME, "summary").click()
        browser.find_element(By.ID, "token").send_keys("secret")
        tokens = browser.find_element(By.ID, "tokens")
        tokens.clear()
        tokens.send_keys("100")
        # The page itself records the length of the shown answer at each change.
        browser.execute_script(
            "window.seen = []; new MutationObserver(() => { const box = document.querySelector('.answer');"
            "if (box) seen.push(box.textContent.length) }).observe(document.getElementById('talk'),"
            "{childList: true, subtree: true, characterData: true})"
        )
        box.send_keys(QUESTION + "\n")
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".answer[data-done]"))
        (expected,) = answer(*small, [QUESTION], Decoding(max_new_tokens=100))
        shown = browser.execute_script("return document.querySelector('.answer').textContent")
        assert shown == expected
        seen = browser.execute_script("return seen")
        assert len(set(seen)) > 3 and seen == sorted(seen)  # a slow page sees several pieces at once
        assert browser.get_log("browser") == [] or all(
            "401" in entry["message"] for entry in browser.get_log("browser")
        )
        browser.save_screenshot(os.environ.get("LFM_SCREENSHOT", str(tmp_path / "page.png")))
    finally:
        browser.quit()
