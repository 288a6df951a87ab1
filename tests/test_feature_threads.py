"""Several pieces of work at once in one process: each in threads of its own, to the same end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
import torch

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.pool import AT_ONCE, InProcess
from tests.feature_cases import BUILD_CONFIG, assert_same_files

Folders = tuple[Path, Path, Path]
THREADS = 3


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize(("given", "at_once", "each"), [(1, 1, 1), (3, 3, 1), (9, AT_ONCE, 2)])
def test_answers_are_in_order_and_threads_are_shared_out(
    given: int, at_once: int, each: int
) -> None:
    torch.set_num_threads(given)
    together = Barrier(at_once)

    def work(stopped: Event, number: int) -> tuple[int, int]:
        together.wait(30)  # or so many are never at work
        time.sleep(0.01 * (at_once - number % at_once))  # the last one answers first
        assert not stopped.is_set()
        return number, torch.get_num_threads()

    numbers = range(3 * at_once)
    assert list(InProcess().spread(work, ((n,) for n in numbers))) == [(n, each) for n in numbers]
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == given
    assert torch.get_num_threads() == given


def test_an_error_stops_the_others() -> None:
    begun, waited = list[int](), list[bool]()

    def work(stopped: Event, number: int) -> None:
        begun.append(number)
        if number == 1:
            raise RunError("no room")
        if number > 1:
            waited.append(stopped.wait(30))

    with pytest.raises(RunError, match="no room"):
        list(InProcess().spread(work, ((n,) for n in range(50))))
    assert waited
    assert all(waited)
    assert len(begun) <= 2 * THREADS
    assert not [t for t in threading.enumerate() if t.name.startswith("spread")]


def test_a_build_with_several_threads_makes_the_same_files(
    folders: Folders, tmp_path: Path
) -> None:
    build(*folders[:2], tmp_path / "out", BUILD_CONFIG)
    assert_same_files(tmp_path / "out", folders[2])
