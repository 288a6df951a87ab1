"""The output of a thread, sent as lines of JSON while it is written.

The first line decides the status of the answer, as everything after it comes too late for that. If
whoever asked leaves, before the first line or later, the thread is told to stop.
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

Tell = Callable[[str], bool]  # the text so far; False: nobody wants more


class AnswerStream:
    """The lines of one answer.

    Args:
        write: runs in a thread; calls what it is given with the text so far, and returns the last
            line.
    """

    def __init__(self, write: Callable[[Tell], dict[str, Any]]) -> None:
        self._write = write
        self._lines: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        self._left = threading.Event()

    async def response(self, request: Request) -> Response:
        """The answer, once its first line is there.

        Raises:
            SaeHarvestError: there is no first line.
        """
        self._task = asyncio.create_task(self._run())  # kept: asyncio itself does not
        first = asyncio.create_task(self._lines.get())
        left = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({first, left}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                self._left.set()
                return Response(status_code=499)  # nobody reads it
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
        except Exception as error:  # raised again by whoever waits for the line
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
    """Returns when whoever asked has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
