"""SQL from the page: what gets through the fence."""

from __future__ import annotations

import pytest

from pipelines.viewer.sql import SQL_ROWS, FencedSQL
from store.errors import InputError
from tests.made_tables import write_tables

N = 48


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("sql") / "features", N)


@pytest.fixture(scope="module")
def fenced(features):
    return FencedSQL(features, seconds=1.0)


def test_a_select_over_every_table_is_answered(fenced):
    answer = fenced.select("SELECT latent, max FROM latents ORDER BY latent")
    assert answer["columns"] == ["latent", "max"]
    assert [row[0] for row in answer["rows"]] == list(range(N))
    assert not answer["more"]
    for table in ("contexts", "histograms", "neighbours", "tokens", "documents", "firings"):
        assert fenced.select(f"SELECT count(*) FROM {table}")["rows"][0][0] > 0
    many = fenced.select("SELECT * FROM range(1000)")
    assert len(many["rows"]) == SQL_ROWS
    assert many["more"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_csv('{features}/run.json')",
        "SELECT * FROM '{features}/run.json'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM read_parquet('{features}/../other.parquet')",
        "SELECT * FROM read_parquet('http://127.0.0.1/x.parquet')",
        "SELECT * FROM query('COPY latents TO ''{stolen}/x.csv''')",
        "SELECT * FROM sqlite_scan('{features}/notes.sqlite', 'notes')",
        "COPY latents TO '{stolen}/x.csv'",
        "CREATE TABLE x AS SELECT 1",
        "ATTACH '{stolen}/x.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "PRAGMA database_list",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY latents TO '{stolen}/x.csv'",
        "EXPLAIN ANALYZE SELECT 1",
        "DROP VIEW latents",
        "",
        "-- nothing",
        "SELEC 1",
        "SELECT * FROM N",
        "SELECT * FROM features",
    ],
)
def test_nothing_but_one_select_over_the_tables_is_answered(fenced, features, tmp_path, sql):
    with pytest.raises(InputError):
        fenced.select(sql.replace("{features}", str(features)).replace("{stolen}", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    assert fenced.select("SELECT count(*) FROM latents")["rows"] == [[N]]


def test_a_query_has_so_many_seconds_and_so_much_memory(fenced):
    with pytest.raises(InputError, match="took longer than 1 s"):
        fenced.select(
            "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range < b.range"
        )
    with pytest.raises(InputError):
        fenced.select("SELECT list(range) FROM range(1000000000)")
