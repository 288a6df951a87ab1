"""A disk that fails, or a process that dies, at a chosen call into the operating system."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sae_harvest.common.atomic
import sae_harvest.store.objects

# Every call by which `store.objects` and `common.atomic` change a disk; `replace` and `mkdir` are
# methods of a Path.
WRITING = ("open", "writev", "fsync", "link", "replace", "mkdir", "close")
CODES = (errno.EIO, errno.ENOSPC)


class Killed(BaseException):
    """The process is gone: nothing after it has an effect on the disk."""


class FaultyDisk:
    """Counts the calls of one function and lets the n-th fail; `writev` after half of its bytes.

    Args:
        function: one of WRITING, or "any" for a call of whichever.
        nth: which call, from 1; 0 lets all succeed.
        code: of the OSError; None kills the process, as far as the disk is concerned.
        for_good: later calls fail as well, as they do on a full disk.
    """

    def __init__(
        self, function: str, nth: int, code: int | None = None, for_good: bool = False
    ) -> None:
        self._function, self._nth, self._code, self._for_good = function, nth, code, for_good
        self.calls: Counter[str] = Counter()
        self._dead = False

    @property
    def count(self) -> int:
        """Calls so far of the function that may fail."""
        return self.calls.total() if self._function == "any" else self.calls[self._function]

    def call(self, name: str, function: Any, *arguments: Any, **options: Any) -> Any:
        """The call, or its failure."""
        if self._dead:
            if name == "close":  # the kernel does that
                function(*arguments)
            raise Killed
        if name not in (*WRITING, "unlink"):
            return function(*arguments, **options)
        self.calls[name] += 1
        due = self.count >= self._nth if self._for_good else self.count == self._nth
        if not (due and self._nth and self._function in (name, "any")):
            return function(*arguments, **options)
        if name == "writev":
            descriptor, pieces = arguments
            os.write(descriptor, pieces[0][: len(pieces[0]) // 2])
        if name == "close":
            function(*arguments)
        if self._code is None:
            self._dead = True
            raise Killed
        raise OSError(self._code, os.strerror(self._code))

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if not callable(function) or isinstance(function, type):
            return function
        return lambda *arguments, **options: self.call(name, function, *arguments, **options)


@contextmanager
def faulty(disk: FaultyDisk) -> Iterator[FaultyDisk]:
    """Put the disk under every store of this process."""

    def method(name: str) -> Any:
        real = getattr(Path, name)

        def wrapped(self: Path, *arguments: Any, **options: Any) -> Any:
            return disk.call(name, real, self, *arguments, **options)

        return wrapped

    with (
        patch.object(sae_harvest.store.objects, "os", disk),
        patch.object(sae_harvest.common.atomic, "os", disk),
        patch.object(Path, "replace", method("replace")),
        patch.object(Path, "mkdir", method("mkdir")),
        patch.object(Path, "unlink", method("unlink")),
    ):
        yield disk


def sentence_of(error: BaseException) -> str:
    """The message of a refusal, after checking that it is one sentence."""
    sentence = str(error)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence
