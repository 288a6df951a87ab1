"""Reading and writing a store's records: its plan, and the commit record of each shard.

Records come from files that may be damaged or malicious, so each record is checked in full before
any part of it is used. A commit record lists exactly the objects that the plan and
the number of its shard imply, so a name from a record never becomes a path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_harvest.common.errors import DamagedError, NotAStoreError, StoreError
from sae_harvest.common.parsing import first_line
from sae_harvest.store import codec, layout
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects, content_hash
from sae_harvest.store.records import decode_record, decode_with_digest, digest_of, encode_record
from sae_harvest.store.statistics.stats import HISTOGRAM_BINS

MAX_DIGITS = 18  # most digits of a number in a name
LARGEST = 1e120  # limit of a stored statistic; statistics of float32 rows are far below it

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Natural = Annotated[int, Field(gt=0, lt=1 << 62)]
Real = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Counts = dict[Annotated[str, Field(pattern=r"^-?[0-9]{1,18}$")], Natural]


class StrictModel(BaseModel):
    """A part of a record with exactly the declared fields and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Entry(StrictModel):
    bytes: Natural
    xxh3: Hash
    chunks: list[Annotated[int, Field(ge=0, lt=1 << 32)]] | None = None


class MomentsRecord(StrictModel):
    """The form of `store.statistics.stats.Moments` in a record."""

    rows: Count
    mean: list[Real]
    m2: list[NotNegative]


class _Statistics(StrictModel):
    norm_median: NotNegative
    norm_max: NotNegative
    norm_histogram: dict[Annotated[str, Field(pattern=r"^[0-9]{1,5}$")], Natural]
    ordinary: MomentsRecord
    outlier: MomentsRecord
    outlier_positions: Counts
    outlier_tokens: Counts
    quantization_error: list[NotNegative] | None = None


class _Commit(StrictModel):
    shard: Count
    plan: Hash
    contexts: Natural
    rows: Natural
    cursor: dict[str, Any]
    objects: dict[str, _Entry]
    statistics: dict[str, _Statistics]


class _PlanRecord(StrictModel):
    plan: dict[str, Any]
    hash: Hash
    made_with: dict[str, str]


def read_plan_record(objects: Objects) -> dict[str, Any]:
    """Return the checked content of plan.json: plan, hash, made_with.

    Raises:
        NotAStoreError: there is no plan.json.
        DamagedError: plan.json is damaged.
        StoreError: this version does not know the store's format.
    """
    name = f"{objects.place}/{layout.PLAN_KEY}"
    try:
        data = objects.read(layout.PLAN_KEY)
    except FileNotFoundError:
        raise NotAStoreError(
            f"{objects.place} holds no activation store (no {layout.PLAN_KEY}); "
            "give the place that `harvest run --store` wrote."
        ) from None
    record = decode_record(data, name)
    plan = record.get("plan")
    if not isinstance(plan, dict) or record.get("hash") != digest_of(plan):
        raise DamagedError(f"{name} is damaged: it is another kind of record.")
    found = plan.get("format")
    if found != layout.FORMAT:
        raise StoreError(
            f"{objects.place} is a store of format {found!r:.20}, this version reads "
            f"{layout.FORMAT}; use the version of sae-harvest that wrote it."
        )
    parse_plan(plan, name)
    validate(_PlanRecord, record, name)
    return record


def read_plan(objects: Objects) -> Plan:
    """Return the plan of the store at a place. Raises the errors of `read_plan_record`."""
    return Plan.model_validate(read_plan_record(objects)["plan"])


def parse_plan(content: Any, name: str) -> Plan:
    """Return the plan in a record. Raises `DamagedError` if it is not a plan in canonical form."""
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        raise DamagedError(f"{name} is damaged: {first_line(error)}.") from None
    if plan.model_dump(mode="json") != content:
        raise DamagedError(f"{name} is damaged: its plan is not in canonical form.")
    return plan


def validate(model: type[BaseModel], content: dict[str, Any], name: str) -> None:
    """Raise `DamagedError` if a record has a missing, unknown or wrongly typed field."""
    try:
        model.model_validate(content)
    except ValidationError as error:
        raise DamagedError(f"{name} is damaged: {first_line(error)}.") from None


def committed_shards(objects: Objects) -> list[int]:
    """Return the numbers of the committed shards, ascending."""
    return numbered(objects, layout.commit_key)


def read_commit(objects: Objects, plan: Plan, shard: int) -> dict[str, Any]:
    """Return the checked commit record of a shard; see `load_commit`."""
    return load_commit(objects, plan, shard)[0]


def load_commit(
    objects: Objects, plan: Plan, shard: int, sealed: str | None = None
) -> tuple[dict[str, Any], str]:
    """Return the checked commit record of a shard, and its digest.

    Args:
        sealed: digest of the record in a seal, if the shard is sealed.

    Raises:
        DamagedError: the record is missing, altered, belongs to another store or shard, or is not
            the sealed one.
    """
    key = layout.commit_key(shard)
    name = f"{objects.place}/{key}"
    try:
        data = objects.read(key)
    except FileNotFoundError:
        raise DamagedError(
            f"{name} is missing, and shard {shard} with it; run the same harvest again."
        ) from None
    record, digest = decode_with_digest(data, name)
    if record.get("plan") != plan.hash or record.get("shard") != shard:
        raise DamagedError(f"{name} belongs to another store or shard.")
    check_commit(plan, record, name)
    if sealed is not None and digest != sealed:
        raise DamagedError(f"{name} is altered: it is not the record that was sealed.")
    return record, digest


def check_commit(plan: Plan, record: dict[str, Any], name: str) -> None:
    """Raise `DamagedError` if no harvest writes a commit record with this content."""
    validate(_Commit, record, name)
    shard, contexts, entries = record["shard"], record["contexts"], record["objects"]
    if contexts > plan.contexts_per_shard or record["rows"] != contexts * plan.context_length:
        raise DamagedError(
            f"{name} is damaged: its numbers of contexts and rows contradict the plan."
        )
    expected = layout.object_keys(plan, shard)
    for key in sorted(entries.keys() - set(expected)):
        told = ascii(key)[1:-1][:80]
        raise DamagedError(
            f"{name} is damaged: it lists {told}, which is not an object of its shard."
        )
    if len(entries) < len(expected):
        raise DamagedError(f"{name} is damaged: it does not list all objects of its shard.")
    for key, entry in entries.items():
        path = layout.array_path(key)
        if path is None:
            fits = "chunks" not in entry
        else:
            length = codec.entries(plan, path, contexts)
            count = codec.chunk_count(plan, path, length)
            fits = entry["bytes"] == codec.object_bytes(plan, path, length)
            fits = fits and len(entry.get("chunks") or ()) == count
        if not fits:
            raise DamagedError(f"{name} is damaged: its entry for {key} is impossible.")
    if record["statistics"].keys() != {site.name for site in plan.sites}:
        raise DamagedError(f"{name} is damaged: its statistics belong to other sites.")
    for site in plan.sites:
        found = record["statistics"][site.name]
        histogram, rows = found["norm_histogram"], record["rows"]
        fits = sum(histogram.values()) == rows and max(map(int, histogram)) < HISTOGRAM_BINS
        if not (fits and moments_fit(found, plan, site.name, rows)):
            raise DamagedError(f"{name} is damaged: its statistics of {site.name} are impossible.")


def place_in_corpus(record: dict[str, Any]) -> dict[str, Any]:
    """Return the cursor in a commit record: where the shard's text begins in the corpus.

    Raises:
        DamagedError: the cursor is not a place in a corpus.
    """
    cursor = record["cursor"]
    corpus = cursor.get("corpus")
    numbers = [cursor.get(name) for name in ("window", "document", "token")]
    numbers += [] if corpus is None else corpus.values() if isinstance(corpus, dict) else [None]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise DamagedError(f"The commit record of shard {record['shard']} has no valid cursor.")
    return cursor


def moments_fit(statistics: dict[str, Any], plan: Plan, site: str, rows: int) -> bool:
    """True if validated statistics have the site's width and count `rows` rows."""
    width, groups = plan.width(site), [statistics["ordinary"], statistics["outlier"]]
    lists = [group[name] for group in groups for name in ("mean", "m2")]
    if plan.dtype == "int8":
        lists.append(statistics.get("quantization_error") or ())
    elif "quantization_error" in statistics:
        return False
    return sum(group["rows"] for group in groups) == rows and all(len(x) == width for x in lists)


def commit_shard(objects: Objects, record: dict[str, Any]) -> dict[str, Any]:
    """Publish a commit record. If one exists already, return that one instead."""
    key = layout.commit_key(record["shard"])
    if objects.publish(key, [encode_record(record)]):
        return record
    return decode_record(objects.read(key), f"{objects.place}/{key}")


def numbered(objects: Objects, key_of: Callable[[int], str]) -> list[int]:
    """Return the numbers of the records in a folder, ascending.

    Args:
        key_of: `layout.commit_key` or `layout.seal_key`; other names are ignored.
    """
    folder = key_of(0).rpartition("/")[0] + "/"
    found = []
    for key in objects.keys(folder):
        name = key.removeprefix(folder).removesuffix(".json")
        if name.isdecimal() and len(name) < MAX_DIGITS and key_of(int(name)) == key:
            found.append(int(name))
    return sorted(found)


def read_object(objects: Objects, key: str, entry: dict[str, Any], remedy: str = "") -> bytes:
    """Return the bytes of an object, checked against its entry in the commit record.

    Args:
        entry: the object's entry in the commit record: bytes and xxh3.
        remedy: advice for the error message, beginning with a semicolon.

    Raises:
        DamagedError: the object is missing, has another length, or is altered.
    """
    name = f"{objects.place}/{key}"
    try:
        data = objects.read(key)
    except FileNotFoundError:
        raise DamagedError(f"{name} is missing{remedy}.") from None
    if len(data) != entry["bytes"]:
        raise DamagedError(f"{name} has {len(data):,} bytes instead of {entry['bytes']:,}{remedy}.")
    if content_hash([data]) != entry["xxh3"]:
        raise DamagedError(f"{name} is altered: its hash is not the committed one{remedy}.")
    return data
