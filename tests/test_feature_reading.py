"""A question about one latent or token reads a small part of a large table, by DuckDB's account."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_harvest.pipelines.features.building.build import BLOOM
from sae_harvest.pipelines.features.reading.query import connect
from sae_harvest.pipelines.features.tables.contexts import lists
from sae_harvest.pipelines.features.tables.folder import TABLES
from sae_harvest.pipelines.features.tables.writers import ROW_GROUP, TableWriter
from tests.made_tables import run_json

LATENTS, CONTEXTS, BINS, NEIGHBOURS, TOKENS = 24_576, 40, 30, 15, 20
VOCABULARY, WINDOW, PART = 50_000, 4, 1000  # latents a part
SOME = (0, 1, 50, 51, 102, 12_345, LATENTS - 1)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables as large as those of a real SAE, in columns that a question needs."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    written = {"latents": 1, "contexts": CONTEXTS, "histograms": BINS, "neighbours": NEIGHBOURS}
    for name, rows in written.items():
        with TableWriter(folder / f"{name}.parquet") as writer:
            for first in range(0, LATENTS, PART):
                latent = np.arange(first, min(first + PART, LATENTS), dtype=np.int32)
                latent = latent.repeat(rows)
                columns = {"latent": latent, "value": rng.random(len(latent), np.float32)}
                if name == "contexts":
                    ids = rng.integers(0, VOCABULARY, (len(latent), WINDOW)).astype(np.int32)
                    columns["token_ids"] = lists(pa.array(ids.reshape(-1)), ids.shape)
                writer.add(pa.table(columns))
    token = np.sort(rng.integers(0, VOCABULARY, LATENTS * TOKENS)).astype(np.int32)
    with TableWriter(folder / "tokens.parquet", bloom_filter_options={"text": BLOOM}) as writer:
        writer.add(
            pa.table(
                {
                    "token": token,
                    "text": texts_of(token),
                    "latent": rng.integers(0, LATENTS, len(token)).astype(np.int32),
                }
            )
        )
    with TableWriter(folder / "documents.parquet") as writer:
        writer.add(pa.table({"document": np.arange(10)}))
    (folder / "firings").mkdir()
    pq.write_table(pa.table({"latent": [0]}), folder / "firings" / "000000.parquet")
    (folder / "run.json").write_text(run_json(LATENTS))
    return folder


def texts_of(token: np.ndarray) -> list[str]:
    """Not in the order of the ids, so that every row group spans nearly all of the alphabet."""
    order = np.random.default_rng(1).permutation(VOCABULARY)
    return [f" {number}" for number in order[token]]


def profiled(connection: duckdb.DuckDBPyConnection, sql: str, tmp_path: Path) -> dict[str, Any]:
    """DuckDB's account of its scan of a file: row groups and rows, and those it decoded."""
    out = tmp_path / "profile.json"
    connection.execute("PRAGMA enable_profiling = 'json'")
    connection.execute(f"PRAGMA profiling_output = '{out}'")
    connection.execute(sql).fetchall()
    connection.execute("PRAGMA disable_profiling")
    (scan,) = scans(json.loads(out.read_text())["operator"])
    return scan


def scans(operators: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scans among operators and those below them."""
    found = []
    for operator in operators:
        found += [operator] if operator["type"] == "TABLE_SCAN" else []
        found += scans(operator.get("children", []))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [("contexts", CONTEXTS), ("latents", 1), ("histograms", BINS), ("neighbours", NEIGHBOURS)],
)
def test_a_latent_is_read_from_two_row_groups_at_most(
    features: Path, tmp_path: Path, name: str, rows: int
) -> None:
    connection = connect(features)
    everything = profiled(connection, f"SELECT * FROM {name}", tmp_path)
    assert everything["rows_scanned"] == LATENTS * rows  # what the account is of
    assert everything["row_groups_scanned"] == LATENTS * rows / ROW_GROUP
    for latent in SOME:
        one = profiled(connection, f"SELECT * FROM {name} WHERE latent = {latent}", tmp_path)
        assert one["intermediate_rows"] == rows
        assert 1 <= one["row_groups_scanned"] <= 2
    few = f"SELECT * FROM {name} WHERE latent BETWEEN 700 AND 710"
    assert profiled(connection, few, tmp_path)["row_groups_scanned"] <= 2


def test_a_text_is_looked_up_by_its_bloom_filter(features: Path, tmp_path: Path) -> None:
    connection = connect(features)
    n_groups = LATENTS * TOKENS // ROW_GROUP
    read = []
    for token in (0, 7, 777, VOCABULARY - 1):
        (text,) = texts_of(np.array([token]))
        scan = profiled(connection, f"SELECT * FROM tokens WHERE text = '{text}'", tmp_path)
        (expected,) = connection.execute(
            f"SELECT count(*) FROM tokens WHERE token = {token}"
        ).fetchall()[0]
        assert scan["intermediate_rows"] == expected
        read.append(scan["row_groups_scanned"])
    nowhere = profiled(connection, "SELECT * FROM tokens WHERE text = ' 1x'", tmp_path)
    read.append(nowhere["row_groups_scanned"] + 1)
    # a filter says yes where it should not for one group in a hundred
    assert sum(read) <= len(read) * (2 + 0.03 * n_groups)
    bounds = [
        pq.read_metadata(features / "tokens.parquet").row_group(group).column(1).statistics
        for group in range(n_groups)
    ]
    inside = sum(b.min <= " 1x" <= b.max for b in bounds)
    assert inside > 0.9 * n_groups  # which bounds alone would have read


def test_a_token_is_read_by_its_number(features: Path, tmp_path: Path) -> None:
    scan = profiled(connect(features), "SELECT * FROM tokens WHERE token = 777", tmp_path)
    assert 1 <= scan["row_groups_scanned"] <= 2


def test_row_groups_are_whole_however_parts_come(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (3 * ROW_GROUP + 5, 64)).astype(np.int32)
    table = pa.table(
        {
            "latent": np.arange(len(ids), dtype=np.int32),
            "token_ids": lists(pa.array(ids.reshape(-1)), ids.shape),
            "text": pa.array([f" {i}" for i in ids[:, 0].tolist()]),
            "value": rng.random(len(ids)),
        }
    )
    made = []
    for number, part in enumerate((10**6, ROW_GROUP, 1000, 37)):
        path = tmp_path / f"{number}.parquet"
        with TableWriter(path) as writer:
            for first in range(0, len(table), part):
                writer.add(table.slice(first, part))
        sizes = [pq.read_metadata(path).row_group(g).num_rows for g in range(4)]
        assert sizes == [ROW_GROUP] * 3 + [5]
        assert pq.read_table(path).equals(table)
        made.append(path.read_bytes())
    assert len(set(made)) == 1  # to the byte


@pytest.mark.parametrize("n_groups", [1, 3])
def test_a_table_of_whole_row_groups_has_no_empty_one(tmp_path: Path, n_groups: int) -> None:
    table = pa.table({"latent": np.arange(n_groups * ROW_GROUP, dtype=np.int32)})
    with TableWriter(tmp_path / "whole.parquet") as writer:
        writer.add(table)
    assert pq.read_table(tmp_path / "whole.parquet").equals(table)
    assert pq.read_metadata(tmp_path / "whole.parquet").num_row_groups == n_groups


def test_a_table_that_failed_midway_is_not_there(tmp_path: Path) -> None:
    def fail() -> None:
        with TableWriter(tmp_path / "table.parquet") as writer:
            writer.add(pa.table({"latent": np.arange(5000)}))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_all_tables_are_read(features: Path) -> None:
    assert {path.stem for path in features.glob("*.parquet")} == set(TABLES)
