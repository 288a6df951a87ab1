"""File systems without hard links: a name is given once all the same, or the cause is told."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq
import pytest

import sae_harvest.common.atomic
from sae_harvest.common.atomic import NO_LINKS, NoExclusiveNamesError
from sae_harvest.common.errors import StoreError
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from tests.faulty_disk import FaultyDisk, Killed, faulty
from tests.feature_cases import BUILD_CONFIG
from tests.synthetic import make_plan, make_store

pytestmark = pytest.mark.usefixtures("unflushed")

SHORT = 20  # contexts: 3 shards


@pytest.fixture(params=NO_LINKS[:2], ids=errno.errorcode.get)
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links, as exFAT (EPERM) and some network mounts are."""

    def refuse(*names: Any) -> NoReturn:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", refuse)


def refuse_links(*names: Any) -> NoReturn:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def unable(*names: Any) -> NoReturn:
    raise NoExclusiveNamesError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.fixture
def no_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose rename knows no conditions, as FUSE's of before 2014."""

    monkeypatch.setattr(sae_harvest.common.atomic, "_renamed", unable)


def test_a_store_made_without_hard_links_is_the_same(tmp_path: Path, no_links: None) -> None:
    make_store(tmp_path / "s", make_plan(), SHORT)
    objects = LocalObjects(tmp_path / "s")
    report = verify(objects, lambda done, total: None)
    assert (report.damage, report.leftovers) == ([], [])
    assert ActivationStore.open(tmp_path / "s").n_rows == SHORT * 16


def test_the_first_to_publish_wins_whole_without_hard_links(tmp_path: Path, no_links: None) -> None:
    objects = LocalObjects(tmp_path / "s")
    offers = [bytes([number]) * 10_000 for number in range(16)]
    barrier = threading.Barrier(len(offers))
    results: list[bool] = []

    def offer(data: bytes) -> None:
        barrier.wait()
        results.append(objects.publish("a/b", [data]))

    threads = [threading.Thread(target=offer, args=(data,)) for data in offers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 15 + [True]
    first = objects.read("a/b")
    assert first in offers
    assert not objects.publish("a/b", [b"later"])
    assert objects.read("a/b") == first
    assert (objects.keys(""), objects.leftovers()) == (["a/b"], [])


def test_a_name_taken_between_the_look_and_the_rename_is_not_overwritten(
    tmp_path: Path, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = LocalObjects(tmp_path / "s")
    objects.publish("a", [b"first"])
    monkeypatch.setattr(LocalObjects, "size", lambda self, key: None)  # the other came just after
    assert not objects.publish("a", [b"second"])
    assert objects.read("a") == b"first"
    assert objects.leftovers() == []


def test_a_process_that_dies_without_hard_links_leaves_a_store_that_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse_links)
    plan = make_plan()
    with faulty(FaultyDisk("any", 0)) as disk:
        make_store(tmp_path / "whole", plan, SHORT)
    digest = ActivationStore.open(tmp_path / "whole").digest
    for nth in range(1, disk.count + 1, 29):
        place = tmp_path / f"{nth}"
        with faulty(FaultyDisk("any", nth)), pytest.raises(Killed):
            make_store(place, plan, SHORT)
        make_store(place, plan, SHORT)
        report = verify(LocalObjects(place), lambda done, total: None)
        assert (report.digest, report.damage, report.leftovers) == (digest, [], [])
        shutil.rmtree(place)


def test_a_file_system_that_can_do_neither_is_named_as_the_cause(
    tmp_path: Path, no_links: None, no_conditions: None
) -> None:
    sentence = f"The file system of {tmp_path / 's'} has neither hard links nor a rename"
    with pytest.raises(StoreError, match=rf"^{sentence}[^\n]*another file system\.$"):
        make_store(tmp_path / "s", make_plan(), SHORT)
    assert list(LocalObjects(tmp_path / "s").keys("")) == []
    assert LocalObjects(tmp_path / "s").leftovers() == []


def test_another_failure_to_link_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*names: Any) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StoreError, match=r"^Cannot write a into .*: Input/output error\.$"):
        LocalObjects(tmp_path / "s").publish("a", [b"1"])
    assert LocalObjects(tmp_path / "s").leftovers() == []


def test_tables_are_built_without_hard_links_or_the_cause_is_told(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, sae, features = folders
    monkeypatch.setattr(os, "link", refuse_links)
    build(place, sae, tmp_path / "a", BUILD_CONFIG)
    for table in ("latents.parquet", "firings"):
        assert pq.read_table(tmp_path / "a" / table).equals(pq.read_table(features / table))
    monkeypatch.setattr(sae_harvest.common.atomic, "_renamed", unable)
    with pytest.raises(StoreError, match="has neither hard links nor a rename"):
        build(place, sae, tmp_path / "b", BUILD_CONFIG)
