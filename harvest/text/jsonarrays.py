"""A JSON array of objects, read an object at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import IO, Any

BLOCK_CHARS = 1 << 20
CUT_CHARS = 16  # an error so near the end of what was read may come of its being cut there


def array_values(stream: IO[bytes], most: int) -> Iterator[Any]:
    """The objects of an array, in order; memory holds one of them, and a block of text.

    Args:
        stream: UTF-8.
        most: characters of an object.

    Raises:
        ValueError: it is not a JSON array of objects, or an object is too long. One line.
        UnicodeDecodeError, and what the stream raises.
    """
    text = _Text(io.TextIOWrapper(stream, "utf-8-sig", newline=""), most)
    if text.next() != "[":
        raise ValueError("it does not begin with [")
    text.skip()
    if text.next() == "]":
        text.skip()
    else:
        while True:
            if text.next() != "{":
                raise ValueError("expected an object, such as {...}")
            yield text.value()
            mark = text.next()
            text.skip()
            if mark == "]":
                break
            if mark != ",":
                raise ValueError("it ends within the array" if not mark else "expected , or ]")
    if text.next():
        raise ValueError("there is something after the array")


class _Text:
    """The part of a text that was read and is not parsed yet."""

    def __init__(self, stream: io.TextIOWrapper, most: int) -> None:
        self._stream, self._most = stream, most
        self._held, self._at = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """The next character that is not white space, which stays; empty at the end."""
        blank = 0
        while True:
            while self._at < len(self._held) and self._held[self._at] in " \t\r\n":
                self._at += 1
                blank += 1
            if self._at < len(self._held):
                return self._held[self._at]
            if blank > self._most:
                raise ValueError(f"more than {self._most:,} characters of white space")
            if not self._read(BLOCK_CHARS):
                return ""

    def skip(self) -> None:
        """Leaves one character behind."""
        self._at += 1

    def value(self) -> Any:
        """The JSON value that begins here; text is read until it is whole."""
        while True:
            held = len(self._held) - self._at
            try:
                value, end = self._decode(self._held, self._at)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._held) - CUT_CHARS
                )
                if not cut:
                    raise ValueError(error.msg) from None
                if held > self._most:
                    raise ValueError(f"more than {self._most:,} characters in one object") from None
                if not self._read(max(BLOCK_CHARS, held)):
                    raise ValueError("it ends within an object") from None
                continue
            if end - self._at > self._most:
                raise ValueError(f"more than {self._most:,} characters in one object")
            self._at = end
            return value

    def _read(self, size: int) -> bool:
        block = self._stream.read(size)
        self._held, self._at = self._held[self._at :] + block, 0
        return bool(block)
