"""Masking of passwords in printed, logged or recorded text."""

from __future__ import annotations

import re

MASK = "***"
# `user:password@` or `user@` after a scheme, up to the last @ before the path; a password may
# contain a slash that should have been encoded. Without a scheme only `user:password@` before a
# host.
_BEHIND_SCHEME = re.compile(r"(?<=://)(?:[^\s/@:]+:[^\s@]*|[^\s/]*)@")
_BEFORE_HOST = re.compile(r"(?<![^\s'\"(=,])[^\s/@:'\"(=,]+:[^\s/@]+@(?=[\w\[])")


def masked(text: str) -> str:
    """Return the text with the user and password of every address in it replaced by `***`.

    >>> masked("https://me:secret@example.org:9000 cannot be reached")
    'https://***@example.org:9000 cannot be reached'
    """
    return _BEFORE_HOST.sub(f"{MASK}@", _BEHIND_SCHEME.sub(f"{MASK}@", text))
