"""An answer that is sent as lines of JSON while a thread writes it.

The status of the answer is decided when the first line is ready, as it is sent first. If the client
disconnects, before the first line or later, the thread is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sae_harvest.common.errors import SaeHarvestError

Tell = Callable[[str], bool]  # takes the text so far; returns False if the client has left


class AnswerStream:
    """The lines of one answer.

    Args:
        write: function that runs in a thread. It calls its argument with the text so far, as often
            as it likes, and returns the last line.
    """

    def __init__(self, write: Callable[[Tell], dict[str, Any]]) -> None:
        self._write = write
        self._lines: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        self._left = threading.Event()

    async def response(self, request: Request) -> Response:
        """Return the answer as soon as its first line is ready.

        Raises:
            SaeHarvestError: the thread failed before the first line.
        """
        self._task = asyncio.create_task(self._run())  # asyncio holds only a weak reference
        first = asyncio.create_task(self._lines.get())
        left = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({first, left}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                self._left.set()
                return Response(status_code=499)  # the client has left
            line = first.result()
        finally:
            for task in (first, left):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if isinstance(line, Exception):
            raise line
        return StreamingResponse(self._rest(line), media_type="application/x-ndjson")

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()

        def tell(text: str) -> bool:
            loop.call_soon_threadsafe(self._lines.put_nowait, {"text": text})
            return not self._left.is_set()

        try:
            await self._lines.put(await run_in_threadpool(self._write, tell))
        except Exception as error:  # raised again where the line is read
            await self._lines.put(error)
        await self._lines.put(None)

    async def _rest(self, line: dict[str, Any] | Exception | None) -> AsyncIterator[bytes]:
        try:
            while line is not None:
                if isinstance(line, SaeHarvestError):
                    line = {"error": str(line)}
                elif isinstance(line, Exception):
                    raise line
                yield json.dumps(line, allow_nan=False).encode() + b"\n"
                line = await self._lines.get()
        finally:
            self._left.set()


async def _left(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
