"""The exchange of numbers between the processes of one training step.

A group divides the work in one of two ways:

    by rows      each process has all latents and a part of the batch's rows (data parallel)
    by latents   each process has all rows and a part of the latents (latent-sharded)

`train.step.loss_and_gradients` calls these methods for every sum over divided rows or latents, and
nowhere else. So each way gives the numbers of a single process, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels import Gradients

T = TypeVar("T")
GREATEST_KEY = 0x7F800000  # the bits of float32 infinity


class ProcessGroup:
    """A group of one process; `train.parallel.distributed` has groups of several."""

    rank = 0
    """Number of this process, from 0."""
    world = 1
    """Number of processes."""
    row_parts = 1
    """Number of parts into which the rows of a batch are divided."""
    latent_part = 0
    """Number of the part of the latents that this process holds, from 0."""
    latent_parts = 1
    """Number of parts into which the latents are divided."""

    def latents(self, n_latents: int) -> tuple[int, int]:
        """Return the latents [first, last) that this process holds."""
        return 0, n_latents

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """Add the tensors of all parts of the rows, in place, and return the tensor."""
        return tensor

    def sum_latents(self, tensor: Tensor) -> Tensor:
        """Add the tensors of all parts of the latents, in place, and return the tensor."""
        return tensor

    def keep_top(self, indices: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest pairs of each row over all parts of the latents.

        Args:
            indices: int32 [batch, w], values: float32 [batch, w] of this part, decreasing.

        Returns:
            The same tensors; all other pairs have index -1 and value 0.
        """
        return indices, values

    def gather_pairs(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pairs of all parts of the latents, [batch, all w], part after part."""
        return indices, values

    def reduce_gradients(self, into: Gradients) -> None:
        """Sum enc, dec and bias over the parts of the rows and recompute `squares`."""

    def collect(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes. It may be the tensor itself, changed in place."""
        return tensor

    def anywhere(self, here: bool) -> bool:
        """Whether `here` is true in any process. Every process waits for the others."""
        return bool(self.collect(torch.tensor(int(here))))

    def from_first(self, number: int) -> int:
        """Return the first process's number, in every process."""
        return int(self.collect(torch.tensor(number if self.rank == 0 else 0)))

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` in every process, wait for all, and return this process's result.

        If one process fails, all fail.
        """
        return work()

    def check_shared(self, folder: Path) -> None:
        """Raise `InputError` unless the folder is the same one for all processes."""

    def reach(self, values: Tensor, count: int) -> float:
        """Return the largest number that `count` of the values of all processes reach.

        Found by bisection of float32 numbers: processes exchange counts and no values.

        Args:
            values: float32, any shape; NaN and numbers that are not positive are ignored.

        Returns:
            The count-th largest value; 0 if fewer are positive.
        """
        keys = values.contiguous().view(torch.int32).flatten()  # positive floats sort so
        keys = keys[(keys > 0) & (keys <= GREATEST_KEY)].sort().values
        low, high = 0, GREATEST_KEY
        while low < high:
            middle = (low + high + 1) // 2
            reached = len(keys) - torch.searchsorted(keys, middle)
            if int(self.sum_latents(self.sum_rows(reached))) >= count:
                low = middle
            else:
                high = middle - 1
        return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))
