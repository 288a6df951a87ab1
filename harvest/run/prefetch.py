"""The next items of an iterator, made by a thread before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")

DEPTH = 2  # items made in advance
POLL_SECONDS = 0.1


class Ahead(Generic[T]):
    """Makes items two in advance. An error is raised in place of its item."""

    def __init__(self, items: Iterator[T], stop: Callable[[], None] = lambda: None) -> None:
        """Take the items, and `stop`, which `close` calls to end the item in progress early."""
        self._items, self._stop_items = items, stop
        self._queue: Queue[tuple[T | None, BaseException | None]] = Queue(DEPTH)
        self._next: tuple[T | None, BaseException | None] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def ready(self, wait: bool) -> bool:
        """True if `take` returns at once; with `wait`, wait until it does.

        Raises the error of making the item.
        """
        if self._next is None:
            try:
                self._next = self._queue.get(block=wait)
            except Empty:
                return False
        if self._next[1] is not None:
            raise self._next[1]
        return True

    def take(self) -> T | None:
        """Return the next item, None after the last one."""
        self.ready(wait=True)
        assert self._next is not None
        item, _ = self._next
        if item is not None:
            self._next = None
        return item

    def ended(self) -> bool:
        """True if there is no next item; waits until that is known."""
        self.ready(wait=True)
        assert self._next is not None
        return self._next[0] is None

    def close(self) -> None:
        """Stop making items; return when the item in progress has ended."""
        self._stop.set()
        self._stop_items()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._put(item, None)
                if self._stop.is_set():
                    return
            self._put(None, None)
        except BaseException as error:  # raised again in the consumer's thread
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put((item, error), timeout=POLL_SECONDS)
            except Full:
                continue
        return None
