"""Exports: what other tools open is what the store holds, and an interrupted export goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import InputError, StoreError, UnfinishedError
from sae_harvest.harvest.inspect.export import ExportConfig, Exported, export
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.layout import Plan, SitePlan
from sae_harvest.store.objects import LocalObjects, open_objects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.store.seals import seal
from sae_harvest.store.writer import Shard, create_store, write_shard
from tests.commands import invoke, refusal
from tests.s3_server import s3_server
from tests.synthetic import SITE, make_plan, make_shard, make_store, rows_of

pytestmark = pytest.mark.usefixtures("unflushed")

OTHER = "mlp_out.1"


def make_two_sites(folder: Path, dtype: str = "float16") -> ActivationStore:
    """Three shards of the synthetic rows, with a second site that has them doubled."""
    sites = (SitePlan(name=SITE, width=8), SitePlan(name=OTHER, width=8))
    plan = make_plan(dtype=dtype).model_copy(update={"sites": sites})
    objects = LocalObjects(folder)
    create_store(objects, plan, {})
    for number in range(3):
        made = make_shard(plan, number, n_contexts=20)
        commit_shard(objects, write_shard(objects, plan, doubled(made)))
    seal(objects, plan, 3)
    return ActivationStore.open(folder)


def doubled(made: Shard) -> Shard:
    activations = {SITE: made.activations[SITE], OTHER: made.activations[SITE] * 2}
    norms = {SITE: made.norms[SITE], OTHER: made.norms[SITE] * 2}
    return replace(made, activations=activations, norms=norms)


def parquet(**given: Any) -> ExportConfig:
    return ExportConfig.model_validate({"format": "parquet"} | given)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_duckdb_pandas_and_pyarrow_read_the_rows_of_the_store(tmp_path: Path, dtype: str) -> None:
    store = make_two_sites(tmp_path / "s", dtype)
    done = export(tmp_path / "s", tmp_path / "out", parquet())
    assert (done.files, done.rows) == (6, 2 * 320)
    for site in store.sites:
        expected = store.read(site, 0, store.n_rows)
        files = str(tmp_path / "out" / site / "*.parquet")
        found = duckdb.sql(f"SELECT * FROM '{files}' ORDER BY row").fetchall()
        rows, contexts, positions, tokens, documents, norms, activations = zip(*found, strict=True)
        assert rows == tuple(range(320))
        assert contexts == documents == tuple(row // 16 for row in rows)
        assert positions == tuple(row % 16 for row in rows)
        assert tokens == tuple(store.tokens(0, 20).reshape(-1).tolist())
        assert np.array_equal(np.array(norms, np.float32), store.norms(site, 0, 320))
        assert np.array_equal(np.array(activations, expected.dtype), expected)
        frame = pd.concat(
            pd.read_parquet(tmp_path / "out" / site / f"{shard:06d}.parquet") for shard in range(3)
        )
        assert np.array_equal(np.stack(frame["activation"].to_list()), expected)
        assert frame["activation"].iloc[0].dtype == expected.dtype
        table = pq.read_table(tmp_path / "out" / site)
        flat = table["activation"].combine_chunks().flatten().to_numpy()
        assert np.array_equal(flat.reshape(-1, 8), expected)
        said = json.loads(table.schema.metadata[b"sae_harvest"])
        assert (said["site"], said["store_digest"]) == (site, store.digest)
        assert ("dequantised from int8" in said["dtype"]) == (dtype == "int8")
    sums = duckdb.sql(
        "SELECT sum(list_dot_product(activation::FLOAT[8], activation::FLOAT[8])) "
        f"FROM '{tmp_path}/out/{SITE}/*.parquet' JOIN '{tmp_path}/out/documents/*.parquet' "
        "USING (document) WHERE id = 'd3'"
    ).fetchall()
    x = store.read(SITE, 48, 64).astype(np.float64)
    assert np.isclose(sums[0][0], (x**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_safetensors_are_read_by_numpy_and_torch(tmp_path: Path, dtype: str) -> None:
    store = make_two_sites(tmp_path / "s", dtype)
    config = ExportConfig(format="safetensors", sites=(SITE,), without_outliers=True)
    done = export(tmp_path / "s", tmp_path / "out", config)
    keep = store.selected(SITE, RowRule(split="all"))
    assert 0 < keep.sum() < len(keep)
    assert done.rows == keep.sum()
    path = tmp_path / "out" / SITE / "000001.safetensors"
    rows = np.flatnonzero(keep[128:256]) + 128
    found = safetensors.numpy.load_file(path)
    assert np.array_equal(found["rows"], rows)
    assert np.array_equal(found["activations"], store.read(SITE, 0, 320)[rows])
    assert np.array_equal(found["tokens"], store.tokens(0, 20).reshape(-1)[rows])
    assert np.array_equal(found["norms"], store.norms(SITE, 0, 320)[rows])
    tensors = safetensors.torch.load_file(path)
    assert tensors["activations"].dtype == (torch.float16 if dtype == "float16" else torch.float32)
    assert np.array_equal(tensors["activations"].numpy(), found["activations"])
    with safetensors.safe_open(path, "np") as file:
        said = file.metadata()
    assert (said["site"], said["shard"], said["store_digest"]) == (SITE, "1", store.digest)
    assert said["model"] == "none"
    assert not (tmp_path / "out" / OTHER).exists()


def test_a_bos_belongs_to_no_document(tmp_path: Path) -> None:
    plan = make_plan()
    objects = LocalObjects(tmp_path / "s")
    create_store(objects, plan, {})
    made = make_shard(plan, 0)
    pieces = made.pieces.set_column(1, "start", [[1] * len(made.pieces)])
    pieces = pieces.cast(made.pieces.schema)
    commit_shard(objects, write_shard(objects, plan, replace(made, pieces=pieces)))
    seal(objects, plan, 1)
    export(tmp_path / "s", tmp_path / "out", parquet())
    documents = pq.read_table(tmp_path / "out" / SITE)["document"].to_pylist()
    assert documents == [None if row % 16 == 0 else row // 16 for row in range(128)]


def test_some_shards_come_with_all_the_documents_they_refer_to(tmp_path: Path) -> None:
    make_two_sites(tmp_path / "s")
    export(tmp_path / "s", tmp_path / "out", parquet(shards=(1, 2), sites=(SITE, SITE)))
    found = sorted(
        p.relative_to(tmp_path / "out").as_posix()
        for p in tmp_path.rglob("*.parquet")
        if "out" in p.parts
    )
    assert found == [
        "documents/000000.parquet",
        "documents/000001.parquet",
        f"{SITE}/000001.parquet",
    ]
    summary = json.loads((tmp_path / "out" / "export.json").read_text())
    assert summary["finished"]
    size = (tmp_path / "out" / SITE / "000001.parquet").stat().st_size
    assert summary["files"] == {f"{SITE}/000001.parquet": {"rows": 128, "bytes": size}}
    assert summary["digest"] == ActivationStore.open(tmp_path / "s").digest


def test_a_row_group_is_a_chunk_of_the_store_and_activations_are_not_compressed(
    tmp_path: Path,
) -> None:
    plan = Plan.model_validate(make_plan(width=64).model_dump() | {"contexts_per_shard": 1024})
    objects = LocalObjects(tmp_path / "s")
    create_store(objects, plan, {})
    made = make_shard(plan, 0, n_contexts=1024)
    commit_shard(objects, write_shard(objects, plan, made))
    seal(objects, plan, 1)
    export(tmp_path / "s", tmp_path / "out", parquet())
    metadata = pq.ParquetFile(tmp_path / "out" / SITE / "000000.parquet").metadata
    assert metadata.num_row_groups == 4
    group = metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert columns["activation.list.element"].compression == "UNCOMPRESSED"
    assert columns["token"].compression == "ZSTD"
    assert group.num_rows == 4096


@pytest.mark.slow
def test_rows_are_exported_into_a_bucket_and_go_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_two_sites(tmp_path / "s")
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        place = f"s3://{server.bucket}/out"
        expected = export(tmp_path / "s", place, parquet())
        objects = open_objects(place)
        objects.remove(f"{SITE}/000001.parquet")
        assert export(tmp_path / "s", place, parquet()) == expected
        found = pq.read_table(io.BytesIO(objects.read(f"{SITE}/000001.parquet")))
        assert found["row"].to_pylist() == list(range(128, 256))
        with pytest.raises(InputError, match="holds another export"):
            export(tmp_path / "s", place, parquet(shards=(0, 1)))


class DiskGoneError(StoreError):
    pass


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_an_interrupted_export_goes_on_to_the_same_files(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_two_sites(tmp_path / "s")
    config = ExportConfig.model_validate({"format": kind})
    expected = export(tmp_path / "s", tmp_path / "whole", config)
    writes: list[str] = []

    def replace(objects: LocalObjects, key: str, pieces: Sequence[Buffer]) -> None:
        if key != "export.json":
            if len(writes) % 3 == 2:
                writes.append("fault")
                raise DiskGoneError
            writes.append(key)
        original(objects, key, pieces)

    original = LocalObjects.replace
    monkeypatch.setattr(LocalObjects, "replace", replace)
    done: Exported | None = None
    while done is None:
        try:
            done = export(tmp_path / "s", tmp_path / "out", config)
        except DiskGoneError:
            assert not json.loads((tmp_path / "out" / "export.json").read_text())["finished"]
    assert done == expected
    assert writes.count("fault") >= 3
    keys = [key for key in writes if key != "fault"]
    assert len(keys) == len(set(keys)), "what was there was written again"
    for path in (tmp_path / "whole").rglob("*.*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == (
                path.read_bytes()
            )


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    make_two_sites(tmp_path / "s")
    export(tmp_path / "s", tmp_path / "out", parquet())
    (tmp_path / "out" / SITE / ".000000.parquet.1-a.tmp").write_bytes(b"half")
    export(tmp_path / "s", tmp_path / "out", parquet())
    assert LocalObjects(tmp_path / "out").leftovers() == []


def test_another_export_or_anything_else_there_is_refused(tmp_path: Path) -> None:
    store, out = tmp_path / "s", tmp_path / "out"
    make_two_sites(store)
    export(store, out, parquet())
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for other, field in (
        (ExportConfig(format="safetensors"), "format"),
        (parquet(sites=(SITE,)), "sites"),
        (parquet(shards=(0, 2)), "shards"),
        (parquet(without_outliers=True), "without_outliers"),
    ):
        with pytest.raises(InputError, match=rf"holds another export; differing: {field}\."):
            export(store, out, other)
    make_store(tmp_path / "t", make_plan(seed=1), n_contexts=20)
    with pytest.raises(InputError, match="differing: digest, sites, plan_hash, plan"):
        export(tmp_path / "t", out, parquet())
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds no export \(found 'notes\.txt'\)"):
        export(store, tmp_path / "mine", parquet())
    with pytest.raises(InputError, match="is not empty and holds no export"):
        export(store, store, parquet())


def test_what_is_not_in_the_store_is_refused(tmp_path: Path) -> None:
    make_two_sites(tmp_path / "s")
    for shards in ((0, 4), (3, 4), (2, 2)):
        with pytest.raises(InputError, match=r"has the shards 0:3, got --shards"):
            export(tmp_path / "s", tmp_path / "out", parquet(shards=shards))
    with pytest.raises(InputError, match=r"holds the sites .* no site 'resid_pre\.0'"):
        export(tmp_path / "s", tmp_path / "out", parquet(sites=("resid_pre.0",)))
    create_store(LocalObjects(tmp_path / "new"), make_plan(), {})
    with pytest.raises(UnfinishedError):
        export(tmp_path / "new", tmp_path / "out", parquet())
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_is_refused_before_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_two_sites(tmp_path / "s")
    monkeypatch.setattr(LocalObjects, "free_bytes", lambda objects: 1000)
    with pytest.raises(StoreError, match="export fewer --shards"):
        export(tmp_path / "s", tmp_path / "out", parquet())
    assert not (tmp_path / "out").exists()


def test_the_command_exports_and_refuses_in_one_sentence(tmp_path: Path) -> None:
    plan = make_store(tmp_path / "s", n_contexts=20)
    out = tmp_path / "out"
    common = ("export", "--store", tmp_path / "s", "--out", out)
    done = invoke(*common, "--format", "parquet", "--shards", "1:3", "--site", SITE)
    assert done.exit_code == 0, done.stderr
    assert "192 rows in 2 files" in done.stdout
    table = pq.read_table(out / SITE)
    found = np.stack([np.array(x, np.float16) for x in table["activation"].to_pylist()])
    assert np.array_equal(found, rows_of(plan, 20)[128:].astype(np.float16))
    assert "holds another export" in refusal(invoke(*common, "--format", "safetensors"))
    refusal(invoke(*common, "--format", "csv"), code=2)
    refusal(invoke(*common, "--format", "parquet", "--shards", "3"), code=2)
    assert "no activation store" in refusal(
        invoke("export", "--store", tmp_path / "x", "--out", tmp_path / "y", "--format", "parquet")
    )
