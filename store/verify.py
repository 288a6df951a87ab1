"""Re-read and re-hash everything, and name each damaged object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from store import layout
from store.errors import DamagedError
from store.layout import Plan
from store.objects import content_hash, leftovers
from store.records import canonical, decode_record
from store.writer import read_commit, read_plan_record, store_digest


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found: objects and bytes read, one sentence for each damage."""

    objects: int
    n_bytes: int
    shards: int
    digest: str | None
    damage: list[str]
    leftovers: list[Path]


def verify(root: Path, on_shard: Callable[[int, int], None]) -> Report:
    """Check a store, finished or not.

    Args:
        on_shard: called with (shards done, shards in the plan).

    Raises:
        NotAStoreError: no store there.
        DamagedError: plan.json itself is damaged, so that nothing else can be judged.
    """
    record = read_plan_record(root)
    plan = Plan.model_validate(record["plan"])
    damage: list[str] = []
    objects = n_bytes = 0
    for key, content in record["zarr"].items():
        objects += 1
        if _read(root, key) != canonical(content):
            damage.append(f"{root}/{key} is missing or altered.")
    commits = []
    sealed = (root / layout.SEALED_KEY).exists()
    for shard in range(plan.n_shards):
        if sealed or (root / layout.commit_key(shard)).exists():
            try:
                commit = read_commit(root, plan, shard)
            except DamagedError as error:
                damage.append(str(error))
            else:
                commits.append(commit)
                for key, entry in commit["objects"].items():
                    objects += 1
                    n_bytes += entry["bytes"]
                    damage.extend(_check_object(root, key, entry))
        on_shard(shard + 1, plan.n_shards)
    digest = None
    if sealed and len(commits) == plan.n_shards:
        digest = store_digest(plan, commits)
        damage.extend(_check_seal(root, plan, digest))
    return Report(objects, n_bytes, len(commits), digest, damage, leftovers(root))


def _check_object(root: Path, key: str, entry: dict[str, object]) -> Iterator[str]:
    data = _read(root, key)
    if data is None:
        yield f"{root}/{key} is missing."
    elif len(data) != entry["bytes"]:
        yield f"{root}/{key} has {len(data):,} bytes instead of {entry['bytes']:,}."
    elif content_hash(data) != entry["xxh3"]:
        yield f"{root}/{key} is altered: its hash is not the committed one."


def _check_seal(root: Path, plan: Plan, digest: str) -> Iterator[str]:
    data = _read(root, layout.SEALED_KEY)
    try:
        sealed = decode_record(data or b"", f"{root}/{layout.SEALED_KEY}")
    except DamagedError as error:
        yield str(error)
        return
    if sealed["plan"] != plan.hash or sealed["digest"] != digest:
        yield f"{root}/{layout.SEALED_KEY} does not match the commits beside it."


def _read(root: Path, key: str) -> bytes | None:
    try:
        return (root / key).read_bytes()
    except FileNotFoundError:
        return None
