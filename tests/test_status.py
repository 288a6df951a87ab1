"""What `harvest status` says while a harvest runs, after it, and after it was killed."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import DamagedError, StoreError
from sae_harvest.harvest.run import status
from sae_harvest.harvest.run.status import Heartbeat, Status, describe_status, duration, read_status
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.layout import STATUS_KEY
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.records import encode_record
from sae_harvest.store.seals import seal
from sae_harvest.store.writer import create_store, write_shard
from tests.commands import wait_for
from tests.synthetic import make_plan, make_shard

PLAN = make_plan()


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    """A store with two committed shards."""
    there = LocalObjects(tmp_path / "store")
    create_store(there, PLAN, {})
    for number in range(2):
        commit_shard(there, write_shard(there, PLAN, make_shard(PLAN, number)))
    return there


def sign(objects: LocalObjects, ago: float, **changed: object) -> None:
    """Leave a sign of life of a while ago."""
    written = datetime.now(UTC) - timedelta(seconds=ago)
    fields = {
        "plan": PLAN.hash,
        "running": True,
        "shards": 13,
        "done": 2,
        "in_flight": (2, 3),
        "tokens_per_second": 4870.4,
        "seconds_left": 840.0,
        "host": "node7",
        "pid": 123,
        "started": written,
        "written": written,
        "interval": 2.0,
    }
    found = Status.model_validate(fields | changed).model_dump(mode="json")
    objects.replace(STATUS_KEY, [encode_record(found)])


def test_a_running_harvest_tells_how_far_it_is_and_how_long_it_takes(objects: LocalObjects) -> None:
    sign(objects, ago=1)
    assert describe_status(objects) == (
        "2 of 13 shards committed, 2 in flight, 4,870 tokens/s, about 14 min left; "
        "running on node7 (pid 123), last sign of life 1 s ago"
    )


def test_a_harvest_that_gives_no_sign_of_life_is_not_running(objects: LocalObjects) -> None:
    sign(objects, ago=14 * 60)
    assert describe_status(objects) == (
        "2 of 13 shards committed; not running: last sign of life 14 min ago"
    )
    sign(objects, ago=16)
    assert "not running" in describe_status(objects)
    sign(objects, ago=16, interval=10.0)  # as on S3
    assert "; running on" in describe_status(objects)


def test_a_harvest_that_was_interrupted_says_so_at_once(objects: LocalObjects) -> None:
    with contextlib.suppress(KeyboardInterrupt), Heartbeat(objects, PLAN, 13, print) as heartbeat:
        heartbeat.update(2, [2], 0, 1000)
        raise KeyboardInterrupt
    assert re.fullmatch(
        r"2 of 13 shards committed; not running: it ended [0-5] s ago", describe_status(objects)
    )


def test_a_store_without_a_heartbeat_is_described(objects: LocalObjects) -> None:
    assert describe_status(objects) == "2 shards committed, none sealed; not running"
    seal(objects, PLAN, 2)
    assert describe_status(objects) == "2 shards committed, all sealed; not running"
    commit_shard(objects, write_shard(objects, PLAN, make_shard(PLAN, 2)))
    assert describe_status(objects) == "3 shards committed, the first 2 sealed; not running"


def test_a_heartbeat_of_another_store_does_not_count(objects: LocalObjects) -> None:
    sign(objects, ago=1, plan="another")
    assert describe_status(objects) == "2 shards committed, none sealed; not running"


def test_a_damaged_heartbeat_is_said_to_be_damaged(objects: LocalObjects) -> None:
    sign(objects, ago=1)
    data = bytearray(objects.read(STATUS_KEY))
    data[len(data) // 2] ^= 1
    objects.replace(STATUS_KEY, [data])
    with pytest.raises(DamagedError, match=r"status\.json is damaged"):
        read_status(objects)
    assert describe_status(objects).startswith("2 shards committed; its status.json is damaged")


def test_a_heartbeat_is_there_while_the_harvest_runs_and_gone_after(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "INTERVAL_SECONDS", 0.05)
    clock = SimpleNamespace(monotonic=lambda: 50.0)
    monkeypatch.setattr(status, "time", clock)
    with Heartbeat(objects, PLAN, 13, print) as heartbeat:
        assert read_status(objects) is None
        heartbeat.update(2, [2, 3], 0, 10_000)
        assert wait_for(lambda: read_status(objects) is not None, 5)
        clock.monotonic = lambda: 52.5
        heartbeat.update(3, [3, 4], 1000, 10_000)

        def reached() -> bool:
            found = read_status(objects)
            return found is not None and found.done == 3

        assert wait_for(reached, 5)
        found = read_status(objects)
        assert found is not None
        assert (found.host, found.in_flight, found.shards) == (platform.node(), (3, 4), 13)
        assert found.alive
        assert (found.tokens_per_second, found.seconds_left) == (400, 22.5)
        before = found.written
        # It goes on while the driver is busy with something else.
        assert wait_for(lambda: (s := read_status(objects)) and s.written > before, 5)
    assert read_status(objects) is None
    assert objects.leftovers() == []


class FullDisk(LocalObjects):
    writes = 0

    def replace(self, key: str, pieces: Sequence[Buffer]) -> None:
        self.writes += 1
        raise StoreError("No space left.")


def test_a_heartbeat_that_cannot_be_written_is_reported_once_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "INTERVAL_SECONDS", 0.01)
    told: list[str] = []
    full = FullDisk(tmp_path)
    with Heartbeat(full, PLAN, 13, told.append) as heartbeat:
        heartbeat.update(0, [0], 0, 1000)
        assert wait_for(lambda: full.writes >= 3, 5)
        heartbeat.update(0, [0], 0, 1000)
        heartbeat.update(1, [1], 500, 1000)
    assert told == ["status.json cannot be written, the harvest continues: No space left."]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99, "99 s"), (840, "14 min"), (7200, "2.0 h"), (259_200, "3.0 days")],
)
def test_durations_are_for_people(seconds: float, words: str) -> None:
    assert duration(seconds) == words
