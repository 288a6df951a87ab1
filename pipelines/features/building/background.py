"""Work in a background thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def aside() -> Iterator[Callable[..., None]]:
    """Give a function that makes calls in another thread, one at a time, in order.

    An error of a call is raised by the next call, or at the end.
    """
    with ThreadPoolExecutor(1, "aside") as thread:
        last = thread.submit(lambda: None)

        def call(work: Callable[..., None], *arguments: Any) -> None:
            nonlocal last
            last.result()
            last = thread.submit(work, *arguments)

        yield call
        last.result()
