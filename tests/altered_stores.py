"""Stores that somebody has altered on purpose: the checksums are right, the content is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from sae_harvest.store import codec, layout
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import content_hash
from sae_harvest.store.records import CHECKSUM, canonical, digest_of

VALUES: tuple[Any, ...] = (
    -5, 0, 1, 10**15, 2**63, 2**70, 1e308, -1.5, 0.5, True, None, "", "a", "\0", "\ud800", "0" * 32,
    "../stolen", "../../stolen", "{outside}/stolen", "..", "activations/../../stolen", "a" * 300,
    [], {}, [1], {"a": 1}, [[[[[[[[]]]]]]]],
)  # fmt: skip


@dataclass
class Altered:
    """A copy of a store under alteration.

    Attributes:
        root: of the store.
        outside: a folder beside it, which nothing may touch.
        foreign: a store of the same plan with other rows.
        forged: whether a digest or an identity was made to fit as well, so that it is another
            store.
    """

    root: Path
    outside: Path
    foreign: Path
    forged: bool = False
    told: list[str] = field(default_factory=list)

    def files(self, part: str = "") -> list[Path]:
        """Regular files of the store whose path has `part` in it."""
        found = (Path(folder, name) for folder, _, names in os.walk(self.root) for name in names)
        return sorted(p for p in found if part in p.as_posix() and p.is_file())

    def records(self) -> list[Path]:
        return [p for p in self.files(".json") if p.name != "zarr.json"]


@dataclass(frozen=True)
class Alteration:
    """One thing to do to a store; the numbers choose among what is there."""

    kind: str
    which: int
    where: int
    other: int


def apply(altered: Altered, alteration: Alteration) -> None:
    """Do it; where what it needs is not there any more, nothing."""
    files = altered.files()
    if files:
        altered.told.append(str(alteration))
        KINDS[alteration.kind](altered, alteration)


def _pick(found: list[Any], number: int) -> Any:
    return found[number % len(found)]


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _record(altered: Altered, alteration: Alteration, change: Callable[..., None]) -> None:
    """Change a record and write it with a checksum that fits."""
    if not (records := altered.records()):
        return
    path = _pick(records, alteration.which)
    if (content := _content(path)) is None:
        return
    try:
        change(content, _pick(list(_places(content)) or [(content, "a")], alteration.where))
        _write(path, content)
    except ValueError:  # JSON has no such value
        return


def _write(path: Path, content: dict[str, Any]) -> None:
    whole = content | {CHECKSUM: digest_of(content)}
    path.write_bytes(canonical(whole) + b"\n")


def _content(path: Path) -> dict[str, Any] | None:
    """What a record says, without its checksum; None if it is no record."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return None
    if isinstance(content, dict):
        content.pop(CHECKSUM, None)
        return content
    return None


def _is_object(altered: Altered, path: Path) -> bool:
    return "\0" not in str(path) and path in altered.files()


def _value(altered: Altered, alteration: Alteration) -> Any:
    value = _pick(list(VALUES), alteration.other)
    return value.format(outside=altered.outside) if isinstance(value, str) else value


def set_value(altered: Altered, alteration: Alteration) -> None:
    def change(content: Any, place: tuple[Any, Any]) -> None:
        container, key = place
        container[key] = _value(altered, alteration)

    _record(altered, alteration, change)


def remove_value(altered: Altered, alteration: Alteration) -> None:
    _record(altered, alteration, lambda content, place: place[0].pop(place[1]))


def add_field(altered: Altered, alteration: Alteration) -> None:
    def change(content: Any, place: tuple[Any, Any]) -> None:
        container = place[0] if isinstance(place[0], dict) else content
        container[str(_value(altered, alteration))] = {"bytes": 4, "xxh3": "0" * 32}

    _record(altered, alteration, change)


def rename_field(altered: Altered, alteration: Alteration) -> None:
    def change(content: Any, place: tuple[Any, Any]) -> None:
        container, key = place
        if isinstance(container, dict):
            container[str(_value(altered, alteration))] = container.pop(key)

    _record(altered, alteration, change)


def exchange_values(altered: Altered, alteration: Alteration) -> None:
    def change(content: Any, place: tuple[Any, Any]) -> None:
        container, key = place
        other, name = _pick(list(_places(content)), alteration.other)
        container[key], other[name] = other[name], container[key]

    _record(altered, alteration, change)


def nudge_number(altered: Altered, alteration: Alteration) -> None:
    """A small change that stays plausible."""

    def change(content: Any, place: tuple[Any, Any]) -> None:
        numbers = [
            (container, key)
            for container, key in _places(content)
            if isinstance(container[key], int | float) and not isinstance(container[key], bool)
        ]
        if numbers:
            container, key = _pick(numbers, alteration.where)
            container[key] += (1, -1, 1024)[alteration.other % 3]

    _record(altered, alteration, change)


def fit_digests(altered: Altered, alteration: Alteration) -> None:
    """Make the plan's hash, or a seal's own digest, fit what they say now."""
    for path in altered.records():
        if (content := _content(path)) is None:
            continue
        if path.name == layout.PLAN_KEY and alteration.which % 2:
            content["hash"] = digest_of(content.get("plan"))
        elif path.parent.name == "seals":
            content.pop("digest", None)
            content["digest"] = digest_of(content)
        _write(path, content)
    altered.forged = True


def forge_all(altered: Altered, alteration: Alteration) -> None:
    """Make every record fit the others: commits the objects, seals the commits."""
    for path in altered.files("commits/"):
        content = _content(path)
        objects = content.get("objects") if content else None
        if content is None or not isinstance(objects, dict):
            continue
        for key, entry in objects.items():
            there = altered.root / key
            if isinstance(entry, dict) and _is_object(altered, there):
                entry |= {"bytes": there.stat().st_size, "xxh3": content_hash([there.read_bytes()])}
        _write(path, content)
    commits = {path.name: digest_of(_content(path)) for path in altered.files("commits/")}
    for path in altered.files("seals/"):
        if (content := _content(path)) is None or not isinstance(content.get("commits"), list):
            continue
        content.pop("digest", None)
        names = [f"{shard:06d}.json" for shard in range(len(content["commits"]))]
        content["commits"] = [commits.get(name, "0" * 32) for name in names]
        _write(path, content | {"digest": digest_of(content)})
    altered.forged = True


def exchange_objects(altered: Altered, alteration: Alteration) -> None:
    """Two objects change places, of one kind or of two."""
    kind = _pick(["activations/", "norms/", "tokens/", "contexts/", ""], alteration.where)
    files = [p for p in altered.files(kind) if p.name != "zarr.json"]
    if files:
        a, b = _pick(files, alteration.which), _pick(files, alteration.other)
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)


def take_foreign(altered: Altered, alteration: Alteration) -> None:
    """An object or a record of another store of the same plan takes the place of ours."""
    path = _pick(altered.files(), alteration.which)
    theirs = altered.foreign / path.relative_to(altered.root)
    if theirs.is_file():
        path.write_bytes(theirs.read_bytes())


def exchange_chunks(altered: Altered, alteration: Alteration) -> None:
    """Two chunks of activations change places, each with its checksum."""
    plan = _plan(altered)
    files = [p for p in altered.files("activations/") if p.name != "zarr.json"]
    if not files or plan is None:
        return
    a, b = _pick(files, alteration.which), _pick(files, alteration.other)
    step = codec.chunk_stride(plan, f"activations/{plan.sites[0].name}")
    first, second = bytearray(a.read_bytes()), bytearray(b.read_bytes())
    i, j = alteration.where % 4 * step, alteration.where // 4 % 4 * step
    x, y = first[i : i + step], second[j : j + step]
    first[i : i + step] = y
    a.write_bytes(first)
    second = bytearray(b.read_bytes())
    second[j : j + step] = x
    b.write_bytes(second)


def change_rows(altered: Altered, alteration: Alteration) -> None:
    """Other numbers in an array's first chunk, perhaps NaN, with a crc32c that fits."""
    plan = _plan(altered)
    kind = _pick(["activations/", "norms/", "tokens/", "quantization/"], alteration.where)
    files = [p for p in altered.files(kind) if p.name != "zarr.json"]
    if not files or plan is None:
        return
    path = _pick(files, alteration.which)
    array = path.parent.relative_to(altered.root).as_posix()
    step = codec.chunk_stride(plan, array)
    data = bytearray(path.read_bytes())
    if len(data) < step:
        return
    data[8:12] = (b"\x12\x34\x56\x78", b"\xff\xff\xff\xff", b"\0\0\0\0")[alteration.other % 3]
    data[step - 4 : step] = google_crc32c.value(bytes(data[: step - 4])).to_bytes(4, "little")
    path.write_bytes(data)


def damage(altered: Altered, alteration: Alteration) -> None:
    path = _pick(altered.files(), alteration.which)
    data = bytearray(path.read_bytes())
    if alteration.other % 3 == 0 or not data:
        path.unlink()
    elif alteration.other % 3 == 1:
        path.write_bytes(data[: alteration.where % len(data)])
    else:
        data[alteration.where % len(data)] ^= 1 + alteration.where % 255
        path.write_bytes(data)


def add_file(altered: Altered, alteration: Alteration) -> None:
    """A record under a name of somebody's choice."""
    folder = _pick(["commits", "seals", "seals", "contexts", "."], alteration.where)
    names = (
        "999999999999.json",
        "000000.json",
        "1.json",
        "000007.json",
        "٣.json",
        ".x.tmp",
        "-1.json",
    )
    path = altered.root / folder / _pick(list(names), alteration.other)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_pick(altered.files(), alteration.which).read_bytes())


def link_file(altered: Altered, alteration: Alteration) -> None:
    """A link, a pipe, a device or a folder takes the place of a file."""
    path = _pick(altered.files(), alteration.which)
    target = altered.outside / "copy"
    target.write_bytes(path.read_bytes())
    path.unlink()
    what = alteration.other % 5
    if what == 0:
        path.symlink_to(target)
    elif what == 1:
        path.symlink_to("/dev/zero")
    elif what == 2:
        path.mkdir()
    elif what == 3:
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)


def link_folder(altered: Altered, alteration: Alteration) -> None:
    """A folder of the store becomes a link to one outside that holds the same."""
    folders = sorted({path.parent for path in altered.files()} - {altered.root})
    if folders:
        folder = _pick(folders, alteration.which)
        target = altered.outside / f"folder-{len(list(altered.outside.iterdir()))}"
        folder.rename(target)
        folder.symlink_to(target)


def _plan(altered: Altered) -> Plan | None:
    """The plan as plan.json has it now, None if that is none."""
    try:
        return Plan.model_validate(
            json.loads((altered.root / layout.PLAN_KEY).read_bytes())["plan"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


KINDS: dict[str, Callable[[Altered, Alteration], None]] = {
    function.__name__: function
    for function in (
        set_value, remove_value, add_field, rename_field, exchange_values, nudge_number,
        fit_digests, forge_all, exchange_objects, take_foreign, exchange_chunks, change_rows,
        damage, add_file, link_file, link_folder,
    )
}  # fmt: skip
