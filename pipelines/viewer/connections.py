"""Connections of people who have not shown that they may come in: few, and with a deadline.

The server answers so many connections at a time. One that sends nothing, or its headers a byte a
minute, or that asks without the token, must not take the place of somebody who may ask. So the
headers of a request have a deadline, and of the connections that no request of which the guard has
let in, the oldest is closed when there are too many: a new one is always heard.

uvicorn documents that its `http` setting may be a class, but neither the class that ours derives
from nor the methods and attributes that it uses. Read in uvicorn 0.54; once one of them is gone,
`tests/test_private_apis.py` fails.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

ADMIT = "sae_harvest.admit"  # extension of the ASGI scope: called for a request that is let in
HEADER_SECONDS = 10.0  # from the connection, or the answer before, to the end of the headers
STRANGERS = 32  # connections not let in, at a time
CONNECTIONS = 64  # let in, at a time; uvicorn answers more with 503

_number = itertools.count()


class Connection(H11Protocol):
    """uvicorn's protocol with a deadline and with places for those who are let in."""

    header_seconds = HEADER_SECONDS
    most_strangers = STRANGERS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.admitted = False
        self.number = next(_number)  # of connections, in order
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
        self._wait_for_headers()  # first: a request that waits in the pipe begins at once
        super().on_response_complete()

    def abort(self) -> None:
        """Close it now, whatever is under way."""
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
        """The application, with the means to let this connection in."""

        def admit() -> None:
            self.admitted = True

        async def told(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), ADMIT: admit}
            await app(scope, receive, send)

        return told
