"""The HTTP application: OpenAI's chat completions, the list of models, the web page, and access control."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from launcher.tools.serving.requests import ChatRequest, RequestError, read_request
from launcher.tools.serving.worker import Job, Worker

PAGE = Path(__file__).with_name("page.html")
BODY_SECONDS = 15  # time for a request's body to arrive
OUR_MISTAKE = RequestError(500, "the server failed; its log has the error")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The page loads nothing from elsewhere, and no other site may frame it.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'"
)


def build_app(worker: Worker, model_name: str, host: str, token: str | None) -> FastAPI:
    """Build the application. With `token`, all addresses except the page and `/health` require it as a bearer token."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    if host in LOOPBACK:
        # Otherwise a foreign web page could reach this server through a host name that resolves to 127.0.0.1.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    _add_error_handlers(app)
    began = int(time.time())

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        _authorise(request, token)
        model = {"id": model_name, "object": "model", "created": began, "owned_by": "local"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        _authorise(request, token)
        body = await _read_body(request, worker.limits.body_bytes)
        positions = worker.model.config.max_position_embeddings
        chat_request = read_request(body, worker.reading_tokenizer, model_name, positions, worker.limits)
        job = worker.submit(chat_request)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        if chat_request.notes:  # not part of OpenAI's format, but its clients pass it on
            head["notes"] = chat_request.notes
        if chat_request.stream:
            events = _events(job, head, chat_request)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return JSONResponse(await _whole(job, head, request))

    return app


def _authorise(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise RequestError(
            401, "this server requires a token; send it as `Authorization: Bearer TOKEN`", code="invalid_api_key"
        )


async def _read_body(request: Request, limit: int) -> bytes:
    # Browsers let foreign pages send other content types without a CORS preflight request.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "send JSON, with the header `Content-Type: application/json`")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise RequestError(413, f"the request is larger than {limit:,} bytes; shorten its messages")
    except TimeoutError as error:
        raise RequestError(408, f"the request did not arrive within {BODY_SECONDS} seconds") from error
    return bytes(body)


async def _whole(job: Job, head: dict, request: Request) -> dict:
    """Return the answer as one object; stop early if the client disconnects."""
    watcher = asyncio.create_task(_watch(request, job))
    try:
        text = "".join([piece async for piece in job.pieces()])
    finally:
        watcher.cancel()
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": job.text.finish_reason}
    return {**head, "object": "chat.completion", "choices": [{**choice, "logprobs": None}], "usage": _usage(job)}


async def _watch(request: Request, job: Job) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(1)
    job.cancelled = True


async def _events(job: Job, head: dict, chat_request: ChatRequest) -> AsyncIterator[str]:
    """Yield the answer as server-sent events; an error after the first event is also sent as an event."""

    def event(delta: dict | None, finish_reason: str | None = None, **more: Any) -> str:
        choices = (
            [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}]
        )
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        async with aclosing(job.pieces()) as pieces:
            async for piece in pieces:
                yield event({"content": piece})
    except RequestError as error:
        yield f"data: {json.dumps(error.content())}\n\n"
        return
    except Exception:  # uvicorn logs it and closes the connection without telling the client
        yield f"data: {json.dumps(OUR_MISTAKE.content())}\n\n"
        raise
    yield event({}, job.text.finish_reason)
    if chat_request.include_usage:
        yield event(None, usage=_usage(job))
    yield "data: [DONE]\n\n"


def _usage(job: Job) -> dict:
    prompt, completion = len(job.request.prompt), job.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _add_error_handlers(app: FastAPI) -> None:
    """Return every error in OpenAI's format."""

    @app.exception_handler(RequestError)
    async def wrong_request(_: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "5"} if error.status == 429 else {}
        return JSONResponse(error.content(), error.status, headers=headers)

    @app.exception_handler(StarletteHTTPException)
    async def wrong_address(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(RequestError(error.status_code, str(error.detail)).content(), error.status_code)

    @app.exception_handler(Exception)  # uvicorn logs its traceback
    async def our_mistake(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(OUR_MISTAKE.content(), OUR_MISTAKE.status)
