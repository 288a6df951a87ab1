"""The state of a running harvest, written beside its store for `harvest status` to read.

`status.json` is metadata. It is overwritten while the harvest runs, and removed when the harvest
has reached its target. No reader of the store uses it.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import deque
from datetime import UTC, datetime
from types import TracebackType

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from sae_harvest.common.errors import DamagedError, StoreError
from sae_harvest.common.parsing import first_line
from sae_harvest.harvest.run.log import Notify
from sae_harvest.store.commits import committed_shards, read_plan
from sae_harvest.store.layout import STATUS_KEY, Plan
from sae_harvest.store.objects import Objects
from sae_harvest.store.records import decode_record, encode_record
from sae_harvest.store.seals import sealed_counts

INTERVAL_SECONDS = 2.0
INTERVAL_SECONDS_S3 = 10.0  # each write is a request that costs money
STALE_INTERVALS = 3
MIN_STALE_SECONDS = 15.0
RATE_SECONDS = 60.0  # period over which the rate is computed


class Status(BaseModel):
    """One sign of life of a harvest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str = Field(description="hash of the store's plan")
    running: bool = Field(description="false: it was interrupted or failed, and could record that")
    shards: int | None = Field(
        ge=0, description="shards of the finished store; null: as many as the corpus fills"
    )
    done: int = Field(ge=0, description="shards that are committed")
    in_flight: tuple[int, ...] = Field(description="numbers of the shards being worked on")
    tokens_per_second: float | None = Field(description="over the last minute, if known")
    seconds_left: float | None = Field(description="remaining time at that rate, if known")
    host: str = Field(
        max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$", description="name of the driver's machine"
    )
    pid: int = Field(description="the driver's process there")
    started: AwareDatetime = Field(description="start of the harvest, UTC")
    written: AwareDatetime = Field(description="time of this sign of life, UTC")
    interval: float = Field(gt=0, lt=1e6, description="seconds between two signs of life")

    @property
    def age(self) -> float:
        """Seconds since the status was written, by this machine's clock."""
        return max(0.0, (datetime.now(UTC) - self.written).total_seconds())

    @property
    def alive(self) -> bool:
        """True if the harvest that wrote the status must still be running."""
        return self.running and self.age < max(MIN_STALE_SECONDS, STALE_INTERVALS * self.interval)


class Heartbeat:
    """Keeps `status.json` up to date while the block runs.

    A thread writes the file, so that a slow disk or network does not delay the workers, and a
    driver that reads far into its corpus still gives signs of life.
    """

    def __init__(self, objects: Objects, plan: Plan, n_shards: int | None, report: Notify) -> None:
        """Take `n_shards`, the shards of the finished store; None if that is not known yet."""
        self._objects, self._plan, self._n_shards = objects, plan.hash, n_shards
        self._report = report
        remote = objects.place.startswith("s3://")
        self._interval = INTERVAL_SECONDS_S3 if remote else INTERVAL_SECONDS
        self._started = datetime.now(UTC)
        self._done = 0
        self._in_flight: tuple[int, ...] = ()
        self._rows_todo: int | None = 0
        self._samples: deque[tuple[float, int]] = deque()  # (time, rows done)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._problem: str | None = None
        self._reported = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the file after a complete harvest; otherwise record that the harvest has ended."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if kind is not None:
            self._write(running=False)
        else:
            try:
                self._objects.remove(STATUS_KEY)
            except StoreError as failure:
                self._problem = str(failure)
        self._tell()

    def update(
        self, done: int, in_flight: list[int], rows_done: int, rows_todo: int | None
    ) -> None:
        """Set the latest figures; cheap enough for any number of calls.

        Args:
            done: shards of the store that are committed.
            in_flight: numbers of the shards being worked on.
            rows_done: rows of this run that have been through the model.
            rows_todo: rows that this run has to do in all, if known.
        """
        now = time.monotonic()
        with self._lock:
            self._done, self._in_flight, self._rows_todo = done, tuple(in_flight), rows_todo
            if not self._samples or now - self._samples[-1][0] >= 1:
                self._samples.append((now, rows_done))
            while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_SECONDS:
                self._samples.popleft()
        if self._thread.ident is None:
            self._thread.start()
        self._tell()

    def others_at_work(self) -> bool:
        """True if another harvest gives signs of life at the place, after this one has ended.

        This harvest has overwritten the other's sign of life, so this waits for the next one, as
        long as a harvest may be late.
        """
        deadline = time.monotonic() + STALE_INTERVALS * self._interval
        while True:
            try:
                status = read_status(self._objects)
            except DamagedError:
                return True  # it is being written
            if status is not None and status.alive:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(self._interval / 4)

    def _beat(self) -> None:
        while True:
            self._write(running=True)
            if self._stop.wait(self._interval):
                return

    def _write(self, running: bool) -> None:
        with self._lock:
            status = self._status(running)
        try:
            self._objects.replace(STATUS_KEY, [encode_record(status.model_dump(mode="json"))])
        except StoreError as failure:
            # The only failed write that does not end the harvest: the store does not depend on this
            # file, and a shard that cannot be written for the same cause ends the harvest anyway.
            self._problem = str(failure)

    def _status(self, running: bool) -> Status:
        rate = self._rate()
        seconds_left = None
        if rate and self._rows_todo is not None:
            seconds_left = max(0, self._rows_todo - self._samples[-1][1]) / rate
        return Status(
            plan=self._plan,
            running=running,
            shards=self._n_shards,
            done=self._done,
            in_flight=self._in_flight,
            tokens_per_second=rate,
            seconds_left=seconds_left,
            host=platform.node(),
            pid=os.getpid(),
            started=self._started,
            written=datetime.now(UTC),
            interval=self._interval,
        )

    def _rate(self) -> float | None:
        if len(self._samples) < 2:
            return None
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return max(0, last - first) / (end - start)  # a dead worker takes rows back

    def _tell(self) -> None:
        if self._problem is not None and not self._reported:
            self._report(f"{STATUS_KEY} cannot be written, the harvest continues: {self._problem}")
            self._reported = True


def read_status(objects: Objects) -> Status | None:
    """Read the latest sign of life; None if there is none; `DamagedError` if it is damaged."""
    try:
        data = objects.read(STATUS_KEY)
    except FileNotFoundError:
        return None
    name = f"{objects.place}/{STATUS_KEY}"
    try:
        return Status.model_validate(decode_record(data, name))
    except ValidationError as error:
        raise DamagedError(f"{name} is damaged: {first_line(error)}.") from None


def describe_status(objects: Objects) -> str:
    """Describe the progress of a harvest in one line; raises the errors of `read_plan`."""
    plan = read_plan(objects)
    committed = len(committed_shards(objects))
    sealed = max(sealed_counts(objects), default=0)
    try:
        status = read_status(objects)
    except DamagedError:
        return f"{committed} shards committed; its status.json is damaged, `harvest run` repairs it"
    if status is not None and status.plan != plan.hash:
        status = None  # left by another store at this place
    if status is None:
        state = "none" if not sealed else "all" if sealed == committed else f"the first {sealed}"
        return f"{_count(committed)} committed, {state} sealed; not running"
    if status.shards is None:
        words = [f"{_count(committed)} committed, of as many as the corpus fills"]
    else:
        words = [f"{committed} of {_count(status.shards)} committed"]
    if not status.alive:
        if status.shards is not None and min(committed, sealed) >= status.shards:
            return f"{words[0]}, all sealed; not running"
        event = "it ended" if not status.running else "last sign of life"
        return f"{words[0]}; not running: {event} {duration(status.age)} ago"
    words.append(f"{len(status.in_flight)} in flight")
    if status.tokens_per_second is not None:
        words.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.seconds_left is not None:
        words.append(f"about {duration(status.seconds_left)} left")
    return (
        f"{', '.join(words)}; running on {status.host} (pid {status.pid}), "
        f"last sign of life {duration(status.age)} ago"
    )


def duration(seconds: float) -> str:
    """Format a duration as `12 s`, `14 min`, `5.2 h` or `3.1 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _count(shards: int) -> str:
    return f"{shards} shard{'s' * (shards != 1)}"
