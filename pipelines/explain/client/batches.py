"""Batches of texts of about the same length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], batch_tokens: int, padded: bool = True) -> Iterator[list[int]]:
    """Divide texts into batches; yield the numbers of each, the shortest texts first.

    Args:
        lengths: tokens of each text.
        batch_tokens: tokens of a batch with its padding, at most; a longer text is alone.
        padded: whether a batch may hold texts of different lengths.
    """
    some: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        full = (len(some) + 1) * lengths[number] > batch_tokens
        if some and (full or not (padded or lengths[number] == lengths[some[0]])):
            yield some
            some = []
        some.append(number)
    if some:
        yield some
