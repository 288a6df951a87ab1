"""Real processes that train together over gloo, for tests: a few, with one thread each."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import numba
import torch
import torch.distributed as dist

from tests.forked import SERVER

CPU = torch.device("cpu")
GROUPS = count()


@cache
def meeting_place() -> dist.TCPStore:
    """Where the processes of a group find each other: outlives any of them, on its own port."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _main(
    work: Callable[..., Any],
    rank: int,
    world: int,
    port: int,
    group: int,
    timeout: timedelta,
    answer: Connection,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = dist.PrefixStore(str(group), dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=place, rank=rank, world_size=world, timeout=timeout)
    # A process that is done before a slower one has connected to it would fail that one.
    if place.add("connected", 1) == world:
        place.set("all connected", "")
    place.wait(["all connected"])
    try:
        answer.send((True, work(*arguments)))
    except Exception as error:
        answer.send((False, error))
    # dist.destroy_process_group() would wait for peers that a test has killed
    answer.close()
    os._exit(0)


def start(
    work: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: timedelta = timedelta(minutes=2),
) -> list[tuple[Any, Connection]]:
    """`work(*arguments)` in each of so many processes of one group: processes, and answers."""
    group, started = next(GROUPS), []
    for rank in range(world):
        ours, theirs = SERVER.Pipe(duplex=False)
        process = SERVER.Process(
            target=_main,
            args=(work, rank, world, meeting_place().port, group, timeout, theirs, arguments),
            daemon=True,
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def answers(started: list[tuple[Any, Connection]]) -> list[Any]:
    """What each process returned or raised; None of one that was killed."""
    found: list[Any] = []
    for process, answer in started:
        try:
            found.append(answer.recv()[1])
        except EOFError:
            found.append(None)
        process.join(30)
    return found


def together(work: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of so many processes; its error is raised here."""
    found = answers(start(work, world, *arguments))
    for answer in found:
        if isinstance(answer, Exception):
            raise answer
    return found
