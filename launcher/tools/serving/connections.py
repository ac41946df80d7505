"""Close connections that send no request, so that they do not block others."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# Time for a request's line and headers to arrive, counted from the start of the connection or the previous answer.
HEAD_SECONDS = 10


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a time limit for the request head, which uvicorn lacks."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head(None)

    def on_response_complete(self) -> None:
        answered = self.cycle  # the call below may start the next cycle
        super().on_response_complete()
        self._head_awaited.cancel()
        self._await_head(answered)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_awaited.cancel()
        super().connection_lost(exc)

    def _await_head(self, last: RequestResponseCycle | None) -> None:
        self._head_awaited = self.loop.call_later(HEAD_SECONDS, self._close_unless_asked, last)

    def _close_unless_asked(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last:
            self.transport.close()
