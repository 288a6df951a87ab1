"""The latents to export, and the pieces in which they are exported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sae_harvest.common.errors import InputError


def parse_latents(text: str | None, n_latents: int) -> list[range]:
    """Parse latents such as `0-99,512` to ranges in increasing order; None: all.

    Raises:
        InputError: it has another form, or names latents that do not exist.
    """
    if text is None:
        return [range(n_latents)]
    named = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(f"--latents {text!r} is not a list such as 0-99,512.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= n_latents:
            raise InputError(
                f"There is no latent {last}; these tables hold 0 to {n_latents - 1}, "
                "so choose from these with --latents."
            )
        named.add((first, last + 1))
    ranges: list[range] = []
    for first, end in sorted(named):
        if ranges and first <= ranges[-1].stop:
            ranges[-1] = range(ranges[-1].start, max(end, ranges[-1].stop))
        else:
            ranges.append(range(first, end))
    return ranges


def pieces(latents: Sequence[range], most: int) -> Iterator[range]:
    """Yield the same latents in ranges of at most `most`."""
    for whole in latents:
        for first in range(whole.start, whole.stop, most):
            yield range(first, min(first + most, whole.stop))
