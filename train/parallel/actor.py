"""The Ray actor that is one process of a distributed run.

This module imports neither torch nor our other modules. CUDA reads the list of GPUs only once, so
the actor sets it before it imports torch.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

if TYPE_CHECKING:
    from sae_harvest.train.parallel.worker import Failure


class Place(NamedTuple):
    """The machine, port and GPU of a worker."""

    node: str
    """Ray's name of its machine."""
    address: str
    """IP address of the machine."""
    port: int
    """Port on which the worker listens."""
    gpu: str | None
    """The worker's GPU, as named in CUDA_VISIBLE_DEVICES; None without one."""


class TrainActor:
    """One worker process."""

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
        """Train together with the other workers. Return the failure, None if training ended well.

        Args:
            assignment: fields of an `Assignment`.
            rank: rank of this worker.
            first: place of the worker of rank 0, where the workers connect to each other.
            devices: value of CUDA_VISIBLE_DEVICES, the worker's own GPU first; None without GPUs.
        """
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
        from sae_harvest.train.parallel.worker import Assignment, work

        listening = self._socket.detach() if rank == 0 else None
        return work(Assignment(**assignment), rank, first.address, first.port, listening)
