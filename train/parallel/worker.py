"""The work of one process of a distributed run."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sae_harvest.common.device import choose_device, use_threads
from sae_harvest.common.errors import InputError, SaeHarvestError
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.distributed import (
    TIMEOUT,
    Parallel,
    PeerFailed,
    PeerLost,
    appears,
    group_of,
    reaching_peers,
)
from sae_harvest.train.run.exit_codes import may_pass
from sae_harvest.train.run.trainer import train


@dataclass(frozen=True)
class Assignment:
    """The task of the workers; see `train.run.trainer.train`."""

    config: dict[str, Any]
    """Fields of `TrainConfig`."""
    store: str
    """Place of the store."""
    out: str
    """Folder of the run."""
    site: str | None
    """Site to train on; None for the store's only site."""
    device: str
    """cpu or cuda."""
    parallel: Parallel
    """What the workers divide."""
    workers: int
    """Number of workers."""
    threads: int
    """Number of threads of each worker."""
    number: str
    """Random number of the command, in the names of its temporary files."""

    @property
    def seen(self) -> Path:
        return Path(self.out) / f".driver-{self.number}.tmp"

    @property
    def stop(self) -> Path:
        return Path(self.out) / f".stop-{self.number}.tmp"


@dataclass(frozen=True)
class Failure:
    """The answer of a worker that failed."""

    sentence: str
    """The message for the user."""
    passes: bool
    """Whether a retry may help."""
    is_echo: bool
    """Whether the message only says that another worker failed."""


def work(
    assignment: Assignment, rank: int, address: str, port: int, listening: int | None
) -> Failure | None:
    """Train as the worker of this rank, in its own process. Return the failure, or None.

    Args:
        assignment: the task, the same for all workers.
        rank: rank of this worker, from 0.
        address: address of rank 0, to which all workers connect.
        port: port of rank 0.
        listening: file descriptor of the socket on which rank 0 listens.
    """
    use_threads(assignment.threads)
    config = TrainConfig.model_validate(assignment.config)
    try:
        if not appears(assignment.seen):
            raise InputError(
                f"{assignment.out} on {platform.node()} is not the folder that the command was "
                "given; give an --out on storage that all machines of the run share."
            )
        device = torch.device(choose_device(assignment.device))
        _join(assignment, rank, address, port, listening)
        group = group_of(assignment.parallel, config.n_latents, config.batch_rows, device)
        train(
            config,
            assignment.store,
            assignment.out,
            assignment.site,
            assignment.device,
            group=group,
            asked=lambda: rank == 0 and assignment.stop.exists(),
        )
    except SaeHarvestError as error:
        return Failure(str(error), may_pass(error), isinstance(error, PeerLost | PeerFailed))
    dist.destroy_process_group()
    return None


def _join(
    assignment: Assignment, rank: int, address: str, port: int, listening: int | None
) -> None:
    """Initialise torch.distributed."""
    if "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:  # a user's choice; the two exclude each other
        # NCCL ends this process if a peer does not answer in time
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    with reaching_peers():
        store = dist.TCPStore(
            address,
            port,
            assignment.workers,
            is_master=rank == 0,
            timeout=TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listening,
        )
        dist.init_process_group(
            "nccl" if assignment.device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=assignment.workers,
            timeout=TIMEOUT,
        )
