"""Copying batches to a GPU: through pinned memory, on a separate CUDA stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch

T = TypeVar("T")
Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch that is being copied to the GPU."""

    x: Parts
    """Tensors on the GPU, float32 [batch, width] each."""
    done: torch.cuda.Event
    """Event at which the copy is complete."""

    def arrive(self) -> Parts:
        """Return the tensors for the current stream.

        The stream waits for the copy; the host does not.
        """
        stream = torch.cuda.current_stream(self.x[0].device)
        stream.wait_event(self.done)
        for part in self.x:
            part.record_stream(stream)  # the other stream allocated its memory
        return self.x


class Upload:
    """Two sets of pinned buffers in turn: one is filled while the other is copied.

    Rows are copied in their stored dtype, half the bytes of float32, and converted to float32 on
    the GPU.

    Args:
        shapes: [batch, width] of each part of a batch.
        dtype: dtype of the rows as the store reads them.
        device: a CUDA device.
    """

    def __init__(
        self, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        sets = [
            (
                tuple(torch.empty(shape, dtype=dtype, pin_memory=True) for shape in shapes),
                torch.cuda.Event(),
            )
            for _ in range(2)
        ]
        self._turns = cycle(sets)

    def send(self, fill: Callable[[Parts], T]) -> tuple[T, Sent]:
        """Let `fill` write a batch to pinned memory, start the copy, return fill's result."""
        pinned, copied = next(self._turns)
        copied.synchronize()  # the copy of two batches ago; returns at once if there was none
        filled = fill(pinned)
        with torch.cuda.stream(self._stream):
            raw = [part.to(self._device, non_blocking=True) for part in pinned]
            copied.record(self._stream)
            x = tuple(part.float() for part in raw)
            done = torch.cuda.Event()
            done.record(self._stream)
        return filled, Sent(x, done)
