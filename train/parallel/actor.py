"""The Ray actor that is one process of a run on several.

Importing this module imports nothing else of ours, and not torch: CUDA reads which GPUs there are
once, and a worker is told that first.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

if TYPE_CHECKING:
    from sae_harvest.train.parallel.worker import Failure


class Place(NamedTuple):
    """The place of a worker."""

    node: str
    """Ray's name of its machine."""
    address: str
    """Of that machine."""
    port: int
    """A port there that the worker listens on."""
    gpu: str | None
    """The GPU that is its own, as CUDA_VISIBLE_DEVICES calls it."""


class TrainActor:
    """A worker, once it is clear where all of them are."""

    def place(self) -> Place:
        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family)
        gpus = context.get_accelerator_ids().get("GPU") or [None]
        return Place(context.get_node_id(), address, self._socket.getsockname()[1], gpus[0])

    def train(
        self, assignment: dict[str, Any], rank: int, first: Place, devices: str | None
    ) -> Failure | None:
        """Train together with the others.

        Args:
            assignment: fields of an `Assignment`.
            rank: of this worker.
            first: the place of the worker of rank 0, where the others find each other.
            devices: value of CUDA_VISIBLE_DEVICES, the worker's own GPU first; None without GPUs.
        """
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
        from sae_harvest.train.parallel.worker import Assignment, work

        listening = self._socket.detach() if rank == 0 else None
        return work(Assignment(**assignment), rank, first.address, first.port, listening)
