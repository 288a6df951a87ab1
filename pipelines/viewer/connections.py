"""Limits and deadlines for connections that have sent no admitted request.

The server holds a limited number of connections. A connection that sends nothing, that sends its
headers very slowly, or that lacks the token must not block an admitted user. So the headers of a
request have a deadline. If there are too many connections without an admitted request, the oldest
of them is closed, so that a new connection is always accepted.

uvicorn documents that its `http` setting may be a class. It documents neither the base class of
ours nor the methods and attributes that ours uses. They were read in uvicorn 0.54;
`tests/test_private_apis.py` fails when one of them is gone.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

ADMIT = "sae_harvest.admit"  # extension of the ASGI scope: called for an admitted request
HEADER_SECONDS = 10.0  # from the connection, or the previous answer, to the end of the headers
STRANGERS = 32  # largest number of connections without an admitted request
CONNECTIONS = 64  # largest number of admitted connections; uvicorn answers more with 503

_number = itertools.count()


class Connection(H11Protocol):
    """uvicorn's protocol with a deadline for headers and a limit for connections not admitted."""

    header_seconds = HEADER_SECONDS
    most_strangers = STRANGERS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.admitted = False
        self.number = next(_number)  # connections are numbered in the order of their start
        self._deadline: asyncio.TimerHandle | None = None
        self.app = self._telling(self.app)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        strangers = [c for c in self.connections if isinstance(c, Connection) and not c.admitted]
        if len(strangers) >= self.most_strangers:
            min(strangers, key=lambda c: c.number).abort()
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # the headers of a request are complete
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait_for_headers()  # before super: a pipelined request begins at once
        super().on_response_complete()

    def abort(self) -> None:
        """Close the connection at once, even during an answer."""
        self.connections.discard(self)
        self.transport.abort()

    def _wait_for_headers(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self.header_seconds, self.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _telling(self, app: ASGIApp) -> Callable[..., Any]:
        """Wrap the application so that a request can admit this connection."""

        def admit() -> None:
            self.admitted = True

        async def told(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), ADMIT: admit}
            await app(scope, receive, send)

        return told
