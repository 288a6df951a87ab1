"""Records and objects that somebody changed on purpose: named as damage, mended, never obeyed."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from sae_harvest.common.errors import DamagedError
from sae_harvest.store import codec, layout
from sae_harvest.store.commits import commit_shard, read_plan
from sae_harvest.store.loading.loader import ShuffledLoader
from sae_harvest.store.maintenance.repair import mend_commit, remove_damaged, reseal
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects, content_hash
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.records import CHECKSUM, digest_of, encode_record
from sae_harvest.store.rules import RowRule
from sae_harvest.store.seals import seal
from sae_harvest.store.writer import create_store, write_shard
from tests.commands import invoke, refusal
from tests.synthetic import SITE, make_plan, make_shard, make_store, replace_array
from tests.test_faults import assert_whole

pytestmark = pytest.mark.usefixtures("unflushed")

ALL = RowRule(split="all", max_norm_medians=None)
TINY = "resid_post.1"  # the site of the store that the fixture model made
COMMIT, SEAL = "commits/000002.json", "seals/000008.json"
REPAIR = ("verify", "--repair", "--workers", 0)

Change = Callable[[dict[str, Any]], object]


def change(path: Path, how: Change, fit_digest: bool = False) -> None:
    """Change a record; its checksum fits again, and a seal's own digest if asked."""
    content = json.loads(path.read_bytes())
    del content[CHECKSUM]
    how(content)
    if fit_digest:
        content.pop("digest", None)
        content["digest"] = digest_of(content)
    path.write_bytes(encode_record(content))


def damaged(place: Path) -> set[str]:
    return {item.key for item in verify(LocalObjects(place), lambda done, total: None).damage}


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Path, Path]:
    """A store, and one of the same plan with other rows."""
    plan = make_plan()
    make_store(tmp_path / "a", plan, 40)
    objects = LocalObjects(tmp_path / "b")
    create_store(objects, plan, {})
    for shard in range(5):
        made = make_shard(plan, shard, 40, noise=0.01)
        made.tokens[:] += 1
        commit_shard(objects, write_shard(objects, plan, made))
    seal(objects, plan, 5)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture
def sealed(tmp_path: Path, tiny_store: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "sealed"))


READS: dict[str, Callable[[ActivationStore], object]] = {
    f"activations/{SITE}/c.{{}}.0": lambda store: store.read(SITE, 0, store.n_rows),
    f"norms/{SITE}/c.{{}}": lambda store: store.norms(SITE, 0, store.n_rows),
    "tokens/c.{}.0": lambda store: store.tokens(0, store.n_contexts),
    "contexts/{:06d}.parquet": lambda store: store.row_documents(1),
    "documents/{:06d}.parquet": lambda store: store.documents(1),
}


@pytest.mark.parametrize("name", READS)
def test_shards_that_changed_places_are_refused_and_named(
    stores: tuple[Path, Path], name: str
) -> None:
    place, _ = stores
    first, second = place / name.format(1), place / name.format(3)
    contents = first.read_bytes(), second.read_bytes()
    for path, content in zip((second, first), contents, strict=True):
        path.write_bytes(content)
    with pytest.raises(DamagedError, match=name.format(1)):
        READS[name](ActivationStore.open(place))
    assert damaged(place) == {name.format(1), name.format(3)}


@pytest.mark.parametrize("name", list(READS)[:3])
def test_a_shard_of_another_store_of_the_same_plan_is_refused_and_named(
    stores: tuple[Path, Path], name: str
) -> None:
    place, other = stores
    shutil.copy(other / name.format(1), place / name.format(1))
    with pytest.raises(DamagedError, match=rf"{name.format(1)} is altered: it holds another chunk"):
        READS[name](ActivationStore.open(place))
    assert damaged(place) == {name.format(1)}


def test_a_loader_and_an_export_refuse_shards_that_changed_places(
    stores: tuple[Path, Path], tmp_path: Path
) -> None:
    place, _ = stores
    first, second = (place / f"activations/{SITE}/c.{shard}.0" for shard in (0, 1))
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)
    loader = ShuffledLoader(ActivationStore.open(place), SITE, 64, 0, ALL)
    with pytest.raises(DamagedError, match="holds another chunk than was committed"):
        deque(islice(loader, loader.batches_per_epoch), 0)
    loader.close()
    command = ("export", "--store", place, "--out", tmp_path / "out", "--format", "parquet")
    assert "holds another chunk than was committed" in refusal(invoke(*command))


def test_a_commit_record_of_another_store_is_refused(stores: tuple[Path, Path]) -> None:
    place, other = stores
    shutil.copy(other / COMMIT, place / COMMIT)
    with pytest.raises(DamagedError, match=r"commits/000002\.json is altered: it is not the"):
        ActivationStore.open(place).read(SITE, 300, 310)
    assert damaged(place) == {COMMIT}


ALTERED: dict[str, tuple[str, Change]] = {
    "rows of the seal": (SEAL, lambda seal: seal.update(rows=10**15)),
    "contexts and rows of the seal": (SEAL, lambda seal: seal.update(contexts=255, rows=255 * 32)),
    "bytes of the seal": (SEAL, lambda seal: seal.update(bytes=1)),
    "a mean of the seal": (
        SEAL,
        lambda seal: seal["statistics"][TINY]["ordinary"]["mean"].__setitem__(0, 0.5),
    ),
    "statistics of the seal": (SEAL, lambda seal: seal.pop("statistics")),
    "the seal's digest": (SEAL, lambda seal: seal.pop("digest")),
    "a commit's digest in the seal": (SEAL, lambda seal: seal["commits"].__setitem__(2, "0" * 32)),
    "contexts of a commit": (COMMIT, lambda commit: commit.update(contexts=-5)),
    "statistics of a commit": (COMMIT, lambda commit: commit.pop("statistics")),
    "a median of a commit": (
        COMMIT,
        lambda commit: commit["statistics"][TINY].update(norm_median=1e6),
    ),
    "a checksum of a chunk": (
        COMMIT,
        lambda commit: commit["objects"]["tokens/c.2.0"]["chunks"].__setitem__(0, 1),
    ),
    "where the text begins": (COMMIT, lambda commit: commit["cursor"].update(document=7)),
    "the objects": (COMMIT, lambda commit: commit.update(objects=[])),
    "a name with NUL": (
        COMMIT,
        lambda commit: commit["objects"].update({"a\0b": {"bytes": 1, "xxh3": "0" * 32}}),
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_a_record_says_wrongly_is_damage_and_never_read(
    sealed: Path, tiny_store: Path, what: str
) -> None:
    key, how = ALTERED[what]
    change(sealed / key, how)
    assert damaged(sealed) == {key}
    assert "1 damaged objects" in refusal(invoke("verify", "--store", sealed)).replace(key, "")
    with pytest.raises(DamagedError, match=key):
        ActivationStore.open(sealed).read(TINY, 2048, 3072)
    if key == SEAL:
        assert key in refusal(invoke("show", "--store", sealed))


def test_all_of_it_is_mended(sealed: Path, tiny_store: Path) -> None:
    """The records of several shards, one of whose objects was altered with its record."""
    digest = ActivationStore.open(tiny_store).digest
    commits = [how for key, how in ALTERED.values() if key == COMMIT]
    for shard, how in enumerate(commits[:7]):
        path = sealed / layout.commit_key(shard)
        change(path, lambda c, how=how, shard=shard: how(_as_shard_2(c, shard)))
    change(sealed / layout.commit_key(7), alter_rows(sealed, 7))
    change(sealed / "plan.json", lambda record: record.pop("made_with"))
    result = invoke(*REPAIR, "--store", sealed)
    assert result.exit_code == 0, result.output
    assert f"Digest {digest}." in result.stdout
    assert_whole(sealed, digest)
    found, expected = ActivationStore.open(sealed), ActivationStore.open(tiny_store)
    assert np.array_equal(found.read(TINY, 0, 8192), expected.read(TINY, 0, 8192))


def _as_shard_2(commit: dict[str, Any], shard: int) -> dict[str, Any]:
    """The record with its tokens under the name that the changes above know."""
    commit["objects"]["tokens/c.2.0"] = commit["objects"][f"tokens/c.{shard}.0"]
    return commit


def alter_rows(place: Path, shard: int) -> Change:
    """Change a row of a shard and its checksum, and the commit record with them."""
    key = f"activations/{TINY}/c.{shard}.0"
    plan = read_plan(LocalObjects(place))
    step = codec.chunk_stride(plan, f"activations/{TINY}")
    data = bytearray((place / key).read_bytes())
    data[0:2] = b"\x00\x3c"
    checksum = google_crc32c.value(bytes(data[: step - 4]))
    data[step - 4 : step] = checksum.to_bytes(4, "little")
    (place / key).write_bytes(data)

    def fit(commit: dict[str, Any]) -> None:
        entry = commit["objects"][key]
        entry["xxh3"] = content_hash([data])
        entry["chunks"][0] = checksum

    return fit


def test_a_seal_forged_to_its_digest_is_found_by_its_commits(
    sealed: Path, tiny_store: Path
) -> None:
    change(sealed / SEAL, lambda seal: seal["statistics"][TINY].update(norm_max=1.0), True)
    assert damaged(sealed) == {SEAL}
    assert invoke(*REPAIR, "--store", sealed).exit_code == 0
    assert_whole(sealed, ActivationStore.open(tiny_store).digest)


@pytest.mark.parametrize("name", ["../victim", "{}/victim", "tokens/../../victim"])
def test_no_name_of_a_record_is_written_or_removed(
    sealed: Path, tiny_store: Path, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    name = name.format(tmp_path)
    entry = {"bytes": 4, "xxh3": "0" * 32}
    change(sealed / COMMIT, lambda commit: commit["objects"].update({name: entry}))
    change(sealed / SEAL, lambda seal: seal.update(zarr={name: {"node_type": "group"}}))
    assert damaged(sealed) == {COMMIT, SEAL}
    assert invoke(*REPAIR, "--store", sealed).exit_code == 0
    assert victim.read_text() == "mine"
    assert_whole(sealed, ActivationStore.open(tiny_store).digest)
    command = ("merge", "--into", tmp_path / "whole", sealed)
    change(sealed / COMMIT, lambda commit: commit["objects"].update({name: entry}))
    assert "which is not an object of its shard" in refusal(invoke(*command))
    assert victim.read_text() == "mine"


PLANS: dict[str, Change] = {
    "extra field": lambda record: _fit(record, more=1),
    "no made_with": lambda record: record.pop("made_with"),
    "no model": lambda record: _fit(record, model={}),
    "half a tokenizer": lambda record: _fit(record, tokenizer={"xxh3": "0"}),
    "a site that leads out": lambda record: _fit(record, sites=[{"name": "../x", "width": 8}]),
    "a site twice": lambda record: _fit(record, sites=[{"name": SITE, "width": 8}] * 2),
    "huge rows": lambda record: _fit(record, contexts_per_shard=10**15),
    "a number as text": lambda record: _fit(record, seed="0"),
    "half a character": lambda record: _fit(record, model={"name": "\ud800", "weights": ""}),
    "a list": lambda record: record.update(plan=[]),
}


def _fit(record: dict[str, Any], **changed: Any) -> None:
    record["plan"] |= changed
    record["hash"] = digest_of(record["plan"])


@pytest.mark.parametrize("what", PLANS)
def test_a_plan_that_cannot_be_is_told_in_one_sentence_by_every_command(
    tmp_path: Path, what: str
) -> None:
    place = tmp_path / "s"
    make_store(place, make_plan(), 8)
    change(place / "plan.json", PLANS[what])
    commands: tuple[tuple[object, ...], ...] = (
        ("show", "--store", place),
        ("show", "--store", place, "--row", 1),
        ("status", "--store", place),
        ("verify", "--store", place),
        ("merge", "--into", tmp_path / "t", place),
        ("export", "--store", place, "--out", tmp_path / "o", "--format", "parquet"),
    )
    for command in commands:
        assert "plan.json is damaged: " in refusal(invoke(*command))


def test_a_store_of_an_earlier_format_is_told_of(tmp_path: Path) -> None:
    make_store(tmp_path / "s", make_plan(), 8)
    change(tmp_path / "s" / "plan.json", lambda record: _fit(record, format=2))
    for command in (("show",), ("verify",), REPAIR):
        message = refusal(invoke(*command, "--store", tmp_path / "s"))
        assert message.endswith(
            "is a store of format 2, this version reads 3; use the version of sae-harvest that "
            "wrote it."
        )


@pytest.mark.parametrize(
    "changed",
    [
        {"written": "soon"},
        {"written": "2026-01-01T00:00:00"},
        {"host": "a\n\x1b[31mb"},
        {"shards": -1},
    ],
)
def test_a_status_that_cannot_be_is_told_of(tmp_path: Path, changed: dict[str, Any]) -> None:
    place = tmp_path / "s"
    make_store(place, make_plan(), 8)
    status = {
        "plan": make_plan().hash, "running": True, "shards": 1, "done": 1, "in_flight": [],
        "tokens_per_second": None, "seconds_left": None, "host": "h", "pid": 1,
        "started": "2026-01-01T00:00:00Z", "written": "2026-01-01T00:00:00Z", "interval": 2.0,
    }  # fmt: skip
    (place / "status.json").write_bytes(encode_record(status))
    assert "status.json is damaged" not in invoke("status", "--store", place).stdout
    for content in (status | changed, {"pid": 1}):
        (place / "status.json").write_bytes(encode_record(content))
        assert "status.json is damaged" in invoke("status", "--store", place).stdout
        assert "status.json is damaged" in refusal(invoke("merge", "--into", place, tmp_path / "t"))


@pytest.mark.parametrize("record", ["[]", "1", "{", '{"a": ' * 100_000, "9" * 5000, "\ud800"])
def test_an_export_record_that_is_none_is_told_of(tmp_path: Path, record: str) -> None:
    make_store(tmp_path / "s", make_plan(), 8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_bytes(record.encode("utf-8", "surrogatepass"))
    command = (
        "export",
        "--store",
        tmp_path / "s",
        "--out",
        tmp_path / "out",
        "--format",
        "parquet",
    )
    assert "holds another export" in refusal(invoke(*command))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export.json"]


def test_rows_that_are_not_finite_are_named_by_verify(tmp_path: Path) -> None:
    plan, objects = make_plan(), LocalObjects(tmp_path / "s")
    make_store(objects, plan, 16)
    x = make_shard(plan, 0, 16).activations[SITE]
    x[3, 2] = np.nan
    replace_array(objects, plan, f"activations/{SITE}", 0, x)
    (item,) = verify(objects, lambda done, total: None).damage
    key = f"activations/{SITE}/c.0.0"
    assert item.sentence == f"{objects.place}/{key} holds numbers that are not finite."
    remove_damaged(objects, [item])
    mend_commit(objects, plan, write_shard(objects, plan, make_shard(plan, 0, 16)))
    reseal(objects, plan)
    make_store(tmp_path / "whole", plan, 16)
    assert_whole(tmp_path / "s", ActivationStore.open(tmp_path / "whole").digest)


def test_an_object_that_is_not_finite_is_not_adopted(tmp_path: Path) -> None:
    plan, objects = make_plan(), LocalObjects(tmp_path / "s")
    create_store(objects, plan, {})
    x = make_shard(plan, 0, 16).activations[SITE]
    x[3, 2] = np.inf
    path = f"activations/{SITE}"
    objects.publish(layout.chunk_key(path, 0), codec.encode(plan, path, x))
    make_store(objects, plan, 16)
    assert np.isfinite(ActivationStore.open(objects.place).read(SITE, 0, 256)).all()


def test_a_name_of_a_record_that_is_none_counts_for_nothing(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "s")
    make_store(objects, make_plan(), 16)
    for name in ("commits/7.json", "commits/x.json", "seals/2.json", "seals/٣.json"):
        (tmp_path / "s" / name).write_bytes(b"{}")
    assert damaged(tmp_path / "s") == set()
    (tmp_path / "s" / "seals/99999999999.json").write_bytes(b"{}")
    assert damaged(tmp_path / "s") == {"seals/99999999999.json"}
