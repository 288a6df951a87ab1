"""SQL from the page: what gets through the fence."""

from __future__ import annotations

import shutil

import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.viewer import sqlworker
from sae_harvest.pipelines.viewer.models import BusyError
from sae_harvest.pipelines.viewer.sql import SQL_ROWS, FencedSQL
from tests.made_tables import write_tables

N = 48


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("sql") / "features", N)


@pytest.fixture(scope="module")
def fenced(features):
    return FencedSQL(features)


@pytest.fixture(scope="module")
def tight(features):
    return FencedSQL(features, seconds=0.5, memory=3 * 10**8)


def inside(features, sql):
    """The answer that the process of a query gives, without the process: quick."""
    request = {"features": str(features), "sql": sql, "rows": SQL_ROWS, "memory": 10**9}
    return sqlworker.answered(request)


def test_a_select_over_every_table_is_answered(features, fenced):
    answer = fenced.select("SELECT latent, max FROM latents ORDER BY latent")
    assert answer["columns"] == ["latent", "max"]
    assert [row[0] for row in answer["rows"]] == list(range(N))
    assert not answer["more"]
    for table in ("contexts", "histograms", "neighbours", "tokens", "documents", "firings"):
        assert inside(features, f"SELECT count(*) FROM {table}")["rows"][0][0] > 0
    many = inside(features, "SELECT * FROM range(1000)")
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
def test_nothing_but_one_select_over_the_tables_is_answered(features, tmp_path, sql):
    sql = sql.replace("{features}", str(features)).replace("{stolen}", str(tmp_path))
    answer = inside(features, sql)
    assert answer.keys() == {"fault", "text"}
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_is_said_and_the_next_query_is_answered(features, fenced):
    with pytest.raises(InputError, match="A query must be one SELECT"):
        fenced.select("DROP VIEW latents")
    assert fenced.select("SELECT count(*) FROM latents")["rows"] == [[N]]
    assert inside(features, "")["text"].startswith("The query is empty")
    assert inside(features, "SELECT * FROM read_text('/etc/passwd')")["fault"] == sqlworker.DUCKDB


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT range(500000000)",
        "SELECT list(repeat('x', 100000)) FROM range(100000)",
    ],
)
def test_a_query_has_so_much_memory(tight, sql):
    with pytest.raises(InputError, match=r"needs more than 0\.3 GB of memory"):
        tight.select(sql)


@pytest.mark.parametrize(
    "sql",
    [
        # neither looks whether it was interrupted
        "SELECT levenshtein(repeat('ab', 100000), repeat('ba', 100000))",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
    ],
)
def test_a_query_has_so_many_seconds(tight, sql):
    with pytest.raises(InputError, match=r"took longer than 0\.5 s and was stopped"):
        tight.select(sql)


def test_a_result_has_so_many_bytes(features, fenced):
    columns = ", ".join(f"repeat('x', 2000) AS c{n}" for n in range(40))
    with pytest.raises(InputError, match=r"The result has [0-9,]+ bytes, more than 4,000,000"):
        fenced.select(f"SELECT {columns} FROM range(200)")
    long = inside(features, "SELECT repeat('x', 1000000) AS x, list(range) AS y FROM range(10000)")
    assert [len(value) for value in long["rows"][0]] == [2002, 2002]


def test_one_query_runs_at_a_time(features):
    fence = FencedSQL(features)
    assert fence._turn.acquire(blocking=False)
    with pytest.raises(BusyError, match="Another query is running"):
        fence.select("SELECT 1")
    fence._turn.release()


def test_numbers_that_json_lacks_are_shown_as_text(features):
    answer = inside(features, "SELECT 170141183460469231731687303715884105727, 'nan'::DOUBLE, 1.5")
    assert answer["rows"] == [["170141183460469231731687303715884105727", None, "1.5"]]


def test_a_folder_whose_name_is_a_pattern_is_read_by_its_name(tmp_path):
    made = write_tables(tmp_path / "g[1]" / "it's *", 8)
    write_tables(tmp_path / "g1" / "it's *", 5)
    fence = FencedSQL(made)
    assert fence.select("SELECT count(*) FROM latents")["rows"] == [[8]]
    shutil.rmtree(made)
    with pytest.raises(InputError, match="holds no feature tables"):
        fence.select("SELECT 1")
