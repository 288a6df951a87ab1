"""Memory for tensors that are given away, used again once nobody holds them."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import torch


class Recycled:
    """float32 tensors of one shape, not cleared. Each is its holder's own for as long as it lives.

    When the last tensor or view of one is gone, its memory is given out again. The system's
    allocator would hand it back and get it anew, which for megabytes is a page fault every 4 KiB:
    as long as all the rest of a batch takes.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: list[npt.NDArray[np.float32]] = []

    def tensor(self) -> torch.Tensor:
        """Return a tensor [shape]."""
        memory = self._free.pop() if self._free else np.empty(self._shape, np.float32)
        lent = memory[:]  # an object of its own: the tensor's storage keeps it, and nothing else
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)
