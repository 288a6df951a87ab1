"""Many requests at once, from a caller that is not asynchronous.

They run in an event loop in one thread, since only there a request that hangs can be given up at
any moment: at its deadline, at Ctrl-C, and when another one has failed for good. A thread of its
own lets callers with a running loop, such as notebooks, use it as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

R = TypeVar("R")
S = TypeVar("S")


def in_parallel(
    requests: Sequence[R],
    ask: Callable[[R], Awaitable[S]],
    concurrency: int,
    session: AbstractAsyncContextManager[Any],
) -> Generator[tuple[int, S], None, None]:
    """Yield numbers and answers of requests, as they come, in the thread of the caller.

    An error of one request is raised here. After an error, and when the generator is closed, the
    others are given up, and the thread has ended.

    Args:
        requests: the requests; they begin in their order.
        ask: answers one.
        concurrency: requests under way at a time.
        session: entered before the first request, and left after the last.
    """
    if not requests:
        return
    found: queue.SimpleQueue[tuple[int, S] | BaseException] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()

    async def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            found.put((number, await ask(requests[number])))

    async def everything() -> None:
        numbers = iter(range(len(requests)))
        async with session, asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(work(numbers))

    task = loop.create_task(everything())

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except BaseExceptionGroup as group:
            found.put(group.exceptions[0])
        except BaseException as error:
            found.put(error)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())  # it looks up names
            loop.close()

    thread = threading.Thread(target=run, name="requests", daemon=True)
    thread.start()
    try:
        for _ in requests:
            answer = found.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
