"""Verification of a store: read and hash every object, and name each damaged one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, count, islice, takewhile
from typing import Any

from sae_harvest.common.errors import DamagedError
from sae_harvest.common.finite import all_finite
from sae_harvest.store import codec, layout
from sae_harvest.store.commits import committed_shards, load_commit, read_object, read_plan
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects
from sae_harvest.store.records import canonical, decode_record
from sae_harvest.store.seals import SealBuilder, read_seal, sealed_counts
from sae_harvest.store.tables import parse_table
from sae_harvest.store.zarrjson import zarr_metadata

READERS = 4  # objects read at once; a cold disk or a bucket needs several concurrent reads
# A damaged seal's name is believed up to this many shards plus twice the committed ones.
SHARDS_BELIEVED = 1000


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged object."""

    key: str
    """Key of the object."""
    shard: int | None
    """Number of its shard; None if it belongs to no shard."""
    sentence: str
    """The message for the user."""


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of a verification."""

    objects: int
    """Number of objects that were checked."""
    n_bytes: int
    """Size of these objects, in bytes."""
    shards: int
    """Number of shards with a valid commit record."""
    beyond_seal: int
    """Number of shards that are committed and not sealed yet."""
    digest: str | None
    """Digest of the store; None if something is damaged or nothing is sealed."""
    sealed_digest: str | None
    """Digest in the latest seal; None without a valid one."""
    damage: list[Damage]
    """Every damaged object."""
    leftovers: list[str]
    """Keys of temporary files of killed writers."""


def verify(objects: Objects, on_progress: Callable[[int, int], None]) -> Verification:
    """Check a store, finished or not: every byte, and that every record agrees with the others.

    Args:
        on_progress: called with (bytes read, bytes to read).

    Raises:
        NotAStoreError: there is no store.
        DamagedError: plan.json itself is damaged, so nothing else can be checked.
    """
    plan = read_plan(objects)
    records = _Records(objects, plan)
    damage, commits = records.damage, records.commits
    items = [(u, *entry) for u, commit in commits.items() for entry in commit["objects"].items()]
    total, done = sum(entry["bytes"] for _, _, entry in items), 0

    def look(item: tuple[int, str, dict[str, Any]]) -> str | None:
        shard, key, entry = item
        return _damage_of(objects, plan, shard, key, entry, commits[shard]["contexts"])

    with ThreadPoolExecutor(READERS) as pool:
        for (shard, key, entry), text in zip(items, pool.map(look, items), strict=True):
            if text:
                damage.append(Damage(key, shard, text))
            done += entry["bytes"]
            on_progress(done, total)
    damage += _metadata_damage(objects, plan, records)
    latest = records.latest
    return Verification(
        objects=len(items),
        n_bytes=done,
        shards=len(commits),
        beyond_seal=sum(shard >= max(records.counts, default=0) for shard in records.committed),
        digest=None if damage or latest is None else latest["digest"],
        sealed_digest=None if latest is None else latest["digest"],
        damage=damage,
        leftovers=objects.leftovers(),
    )


class _Records:
    """The seals and commit records of a store, compared with each other.

    Attributes:
        counts: numbers of shards that have been sealed, damaged seals included.
        committed: shards that have a commit record, damaged records included.
        commits: shard → contexts and objects of its record, if the record is valid.
        damage: records that are damaged or contradict others.
    """

    def __init__(self, objects: Objects, plan: Plan) -> None:
        self._objects, self._plan = objects, plan
        self.damage: list[Damage] = []
        self.counts = sealed_counts(objects)
        self.committed = committed_shards(objects)
        self.commits: dict[int, dict[str, Any]] = {}
        self._seals: dict[int, dict[str, Any]] = {}
        for n_shards in self.counts:
            try:
                self._seals[n_shards] = read_seal(objects, plan, n_shards)
            except DamagedError as error:
                self.damage.append(Damage(layout.seal_key(n_shards), None, str(error)))
        # The seal that follows from the commits so far, as long as all of them are right.
        self._follows: SealBuilder | None = SealBuilder(objects.place, plan)
        trusted = self._seals[max(self._seals)]["commits"] if self._seals else []
        for shard in self._shards(len(trusted)):
            self._read(shard, trusted[shard] if shard < len(trusted) else None)

    @property
    def latest(self) -> dict[str, Any] | None:
        """The latest seal; None if it is damaged or missing."""
        return self._seals.get(max(self.counts, default=0))

    def _shards(self, n_sealed: int) -> list[int]:
        """Return the shards that exist or should exist.

        The name of a damaged seal counts if its number of shards is plausible.
        """
        believable = 2 * len(self.committed) + SHARDS_BELIEVED
        named = max((n for n in self.counts if n <= believable), default=0)
        return sorted({*self.committed, *range(max(named, n_sealed))})

    def _read(self, shard: int, sealed: str | None) -> None:
        try:
            record, digest = load_commit(self._objects, self._plan, shard, sealed)
        except DamagedError as error:  # so its objects are unknown
            self._report(layout.commit_key(shard), shard, str(error))
            self._follows = None
            return
        # without statistics: those of all shards would fill the memory
        self.commits[shard] = {name: record[name] for name in ("contexts", "objects")}
        if self._follows is None or self._follows.shards != shard:  # there is a gap before it
            return
        try:
            self._follows.add(record, digest)
        except DamagedError as error:
            self._report(layout.commit_key(shard - 1), shard - 1, str(error))
            self._follows = None
            return
        seal = self._seals.get(shard + 1)
        if seal is not None and self._follows.record() != seal:
            key = layout.seal_key(shard + 1)
            text = f"{self._objects.place}/{key} does not match the store's commits."
            self._report(key, None, text)

    def _report(self, key: str, shard: int | None, sentence: str) -> None:
        self.damage.append(Damage(key, shard, sentence))


def _damage_of(
    objects: Objects, plan: Plan, shard: int, key: str, entry: dict[str, Any], contexts: int
) -> str | None:
    """Return a sentence about the damage of an object; None if it is undamaged."""
    name = f"{objects.place}/{key}"
    try:
        data = read_object(objects, key, entry)
        path = layout.array_path(key)
        if path is None:
            parse_table(data, plan, key, shard, name)
            return None
        length = codec.entries(plan, path, contexts)
        if codec.checksums(plan, path, [data], length) != entry["chunks"]:
            return f"{name} is altered: it holds other chunks than were committed."
        for chunk in codec.chunks(plan, path, data, length, name):
            if chunk.dtype.kind == "f" and not all_finite(chunk):
                return f"{name} holds numbers that are not finite."
    except DamagedError as error:
        return str(error)
    return None


def _metadata_damage(objects: Objects, plan: Plan, records: _Records) -> Iterator[Damage]:
    """Yield damage of zarr.json files, compared with the latest seal, and of status.json.

    A harvest that was killed just before sealing has already written the new array shapes.
    """
    if records.latest is not None:  # a damaged seal is reported already, and repaired first
        unbroken = takewhile(records.commits.__contains__, count())
        lengths = accumulate(records.commits[shard]["contexts"] for shard in unbroken)
        grown = islice(lengths, records.counts[-1], None)
        wrong = {key: _bytes_or_none(objects, key) for key in zarr_metadata(plan, 1)}
        for contexts in chain([records.latest["contexts"]], grown):
            wanted = zarr_metadata(plan, contexts)
            wrong = {k: there for k, there in wrong.items() if there != canonical(wanted[k])}
            if not wrong:
                break
        for key in wrong:
            yield Damage(key, None, f"{objects.place}/{key} is missing or altered.")
    try:
        decode_record(objects.read(layout.STATUS_KEY), f"{objects.place}/{layout.STATUS_KEY}")
    except FileNotFoundError:
        pass
    except DamagedError as error:
        yield Damage(layout.STATUS_KEY, None, str(error))


def _bytes_or_none(objects: Objects, key: str) -> bytes | None:
    try:
        return objects.read(key)
    except FileNotFoundError:
        return None
