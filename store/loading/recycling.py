"""Memory for tensors, used again once nobody holds them."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import torch


class Recycled:
    """Uninitialised float32 tensors of one shape. The holder of a tensor owns its memory.

    When the last tensor or view of a memory block is gone, the block is used again. The system's
    allocator would return and reallocate it, with a page fault every 4 KiB for megabytes: that
    takes as long as the rest of a batch.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: list[npt.NDArray[np.float32]] = []

    def tensor(self) -> torch.Tensor:
        """Return a tensor [shape]."""
        memory = self._free.pop() if self._free else np.empty(self._shape, np.float32)
        lent = memory[:]  # a separate object that only the tensor's storage keeps alive
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)
