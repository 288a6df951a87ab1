"""A JSON array of objects, read an object at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import IO, Any

BLOCK_CHARS = 1 << 20
CUT_CHARS = 16  # an error so near the end of the text read may come from the cut there


def array_values(stream: IO[bytes], max_chars: int) -> Iterator[Any]:
    """Yield the objects of an array, in order; memory holds one object and a block of text.

    Args:
        stream: UTF-8 bytes.
        max_chars: the most characters of an object.

    Raises:
        ValueError: it is not a JSON array of objects, or an object is too long; in one line.
        UnicodeDecodeError: it is not UTF-8. The stream's own errors are raised too.
    """
    text = _Text(io.TextIOWrapper(stream, "utf-8-sig", newline=""), max_chars)
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
        raise ValueError("there is text after the array")


class _Text:
    """The part of a text that has been read but not parsed."""

    def __init__(self, stream: io.TextIOWrapper, max_chars: int) -> None:
        self._stream, self._max_chars = stream, max_chars
        self._buffer, self._at = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """Return the next character that is not white space, and stay there; empty at the end."""
        blank = 0
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
                blank += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if blank > self._max_chars:
                raise ValueError(f"more than {self._max_chars:,} characters of white space")
            if not self._read(BLOCK_CHARS):
                return ""

    def skip(self) -> None:
        """Skip one character."""
        self._at += 1

    def value(self) -> Any:
        """Parse the JSON value that begins here; read text until the value is complete."""
        while True:
            n_chars = len(self._buffer) - self._at
            try:
                value, end = self._decode(self._buffer, self._at)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._buffer) - CUT_CHARS
                )
                if not cut:
                    raise ValueError(error.msg) from None
                if n_chars > self._max_chars:
                    raise ValueError(
                        f"more than {self._max_chars:,} characters in one object"
                    ) from None
                if not self._read(max(BLOCK_CHARS, n_chars)):
                    raise ValueError("it ends within an object") from None
                continue
            if end - self._at > self._max_chars:
                raise ValueError(f"more than {self._max_chars:,} characters in one object")
            self._at = end
            return value

    def _read(self, size: int) -> bool:
        block = self._stream.read(size)
        self._buffer, self._at = self._buffer[self._at :] + block, 0
        return bool(block)
