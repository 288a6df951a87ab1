"""Latents as they are typed: numbers, ranges, or a random sample."""

from __future__ import annotations

import re

import click
import numpy as np
import numpy.typing as npt


def chosen_latents(text: str, alive: npt.NDArray[np.int64], n_latents: int) -> list[int]:
    """Return the latents that a text names, in increasing order.

    Args:
        text: `all`, `random:100`, or numbers and ranges such as `3,5,10:20` (20 is left out).
        alive: the latents that fire.
        n_latents: number of latents.

    Raises:
        click.UsageError: it is none of these, or a latent does not exist.

    >>> import numpy as np
    >>> chosen_latents("3,5:8", np.arange(10), 10)
    [3, 5, 6, 7]
    """
    if text == "all":
        return list(map(int, alive))
    if match := re.fullmatch(r"random:(\d+)", text):
        drawn = np.random.default_rng(0).permutation(alive)[: int(match[1])]
        return sorted(map(int, drawn))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", part)
        if match is None:
            raise click.UsageError(
                f"--latents {text!r:.60} is not understood; give numbers and ranges such as "
                "3,5,10:20, or random:100, or all."
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first + 1
        if last > n_latents or first >= n_latents:
            raise click.UsageError(
                f"--latents names latent {max(first, last - 1)}; the tables hold 0 to "
                f"{n_latents - 1}."
            )
        found |= set(range(first, last))
    return sorted(found)
