"""`sae-features query`: these tables and no other file, and results that can be read again."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.paths import exact_file
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.pipelines.features.reading.query import asked, connect, connect_fenced
from sae_harvest.pipelines.features.reading.results import json_value
from tests.feature_cases import refusal
from tests.made_tables import write_tables

ODD = (
    "g[1]", "g*", "q?", "b{a,b}", "it's", 'say "x"', "100%41", "#1", " a ", "-v", "s3:", "file:",
    "~", "ü", "layer=12", "back\\slash", "\\[a]", "[!g]", "two\nlines", os.fsdecode(b"\xff["),
)  # fmt: skip
N = 8


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("query") / "features", N)


def query(features: Path, *arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["query", *arguments, "--features", str(features)], input=text)


def test_a_folder_of_any_name_is_read_and_no_other(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lie side by side, so that each name read as a pattern or an address finds another."""
    monkeypatch.chdir(tmp_path)
    names = [*ODD, "g1", "qa", "ba", "bb", "100A"]
    for name in names:
        shutil.copytree(features, name)
        columns = {c: pa.array([name.encode(errors="replace")] * 3, pa.binary()).cast(pa.string())
                   for c in ("source", "title", "url")}  # fmt: skip
        table = pa.table({"document": pa.array(range(3), pa.int64()), **columns})
        with exact_file(Path(name) / "documents.parquet", "wb") as file:
            pq.write_table(table, file)
    for name in names:
        for connection in (connect(Path(name)), connect_fenced(tmp_path / name)):
            found = connection.execute("SELECT DISTINCT * FROM documents WHERE document = 2")
            columns = [column[0] for column in found.description]
            assert columns == ["document", "source", "title", "url"]
            assert found.fetchall()[0][1].encode() == name.encode(errors="replace")
            assert connection.execute("SELECT count(*) FROM firings").fetchall() == [(N - 1,)]
            connection.close()


def test_a_folder_that_was_opened_is_closed_with_its_connection(
    features: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "g[1]"
    shutil.copytree(features, folder)
    connection = connect(folder)
    assert str(folder) in map(os.readlink, open_descriptors())
    del connection
    assert str(folder) not in map(os.readlink, open_descriptors())


def open_descriptors() -> list[Path]:
    return [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]


def test_a_damaged_table_is_named_wherever_it_lies(features: Path, tmp_path: Path) -> None:
    folder = tmp_path / "g[1]"
    shutil.copytree(features, folder)
    (folder / "tokens.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(RunError, match=r"g\[1\]/tokens\.parquet is damaged") as error:
        connect(folder)
    assert "/proc/" not in str(error.value)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY latents TO '{out}'",
        "COPY (SELECT 1) TO '{features}/latents.parquet' (USE_TMP_FILE false)",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{features}/latents.parquet' (USE_TMP_FILE false)",
        "SELECT * FROM query('COPY (SELECT 1) TO ''{out}''')",
        "EXPORT DATABASE '{out}'",
        "ATTACH '{out}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET allowed_paths = ['/']",
        "PRAGMA enable_profiling; PRAGMA profiling_output = '{out}'",
        "SELECT 1; COPY latents TO '{out}'",
        "SELECT * FROM read_text('{features}/run.json')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM glob('{features}/*')",
        "SELECT * FROM '{features}/run.json'",
        "SELECT * FROM features",  # a variable of this process
    ],
)
def test_a_query_writes_nothing_and_reads_nothing_else(
    features: Path, tmp_path: Path, sql: str
) -> None:
    before = {path: path.read_bytes() for path in features.rglob("*") if path.is_file()}
    sql = sql.replace("{features}", str(features)).replace("{out}", str(tmp_path / "out"))
    assert refusal("query", sql, "--features", features)
    assert list(tmp_path.iterdir()) == []
    assert {path: path.read_bytes() for path in features.rglob("*") if path.is_file()} == before


def test_a_large_sort_spills_nowhere_in_the_current_folder(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    setting = "SELECT value FROM duckdb_settings() WHERE name = 'temp_directory'"
    with asked(features, setting) as question:
        ((folder,),) = list(question.rows(None)[1])
        assert Path(folder).is_dir()
        assert tmp_path not in Path(folder).resolve().parents
    assert not Path(folder).exists()


VALUES = (
    "SELECT latent, top_tokens AS tokens, NULL AS nothing, '' AS empty, 'a,\"b\"\r\n' AS text, "
    "sum(n_fire) OVER () AS total, {'a': [1.5, 'nan'::DOUBLE]} AS record, DATE '2026-11-27' AS day "
    "FROM latents ORDER BY latent"
)


def test_a_pipe_gets_all_rows_as_csv_in_which_lists_are_json(features: Path) -> None:
    result = query(features, VALUES)
    assert result.exit_code == 0, result.output
    text = result.stdout_bytes.decode()
    assert ',,"","a,""b""\r\n",' in text  # NULL and an empty text differ
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert header == ["latent", "tokens", "nothing", "empty", "text", "total", "record", "day"]
    assert len(rows) == N
    total = connect(features).execute("SELECT sum(n_fire) FROM latents").fetchall()[0][0]
    for number, row in enumerate(rows):
        assert row[0] == str(number)
        assert json.loads(row[1]) == ([] if number == N - 1 else tokens_of(features, number))
        assert row[4:6] == ['a,"b"\r\n', str(total)]
        assert json.loads(row[6]) == {"a": [1.5, None]}
        assert row[7] == "2026-11-27"
    many = query(features, "SELECT * FROM range(5000)")
    assert len(many.stdout.splitlines()) == 5001


def tokens_of(features: Path, latent: int) -> Any:
    sql = "SELECT top_tokens FROM latents WHERE latent = ?"
    return connect(features).execute(sql, [latent]).fetchall()[0][0]


def test_json_is_an_array_with_a_row_a_line(features: Path) -> None:
    result = query(features, VALUES, "--format", "json", "--limit", "3")
    rows = json.loads(result.stdout)
    assert len(result.stdout.splitlines()) == 3 + 2
    assert [row["latent"] for row in rows] == [0, 1, 2]
    assert rows[0]["tokens"] == tokens_of(features, 0)
    assert rows[0]["nothing"] is None
    assert rows[0]["record"] == {"a": [1.5, None]}
    assert isinstance(rows[0]["total"], int)
    assert result.stdout.isascii()
    none = query(features, "SELECT 1 WHERE false", "--format", "json")
    assert json.loads(none.stdout) == []
    assert [json_value(v) for v in (math.inf, b"\x00\xff", (1,))] == [None, "00ff", [1]]


def test_parquet_and_the_others_are_written_whole_into_a_new_file(
    features: Path, tmp_path: Path
) -> None:
    out = tmp_path / "some [1].parquet"
    sql = "SELECT * FROM contexts ORDER BY latent, stratum, rank"
    assert query(features, sql, "--output", str(out), "--limit", "5000").exit_code == 0
    expected = duckdb.connect().execute(f"FROM '{features}/contexts.parquet'").fetchall()
    written = duckdb.connect().from_arrow(pq.read_table(out)).fetchall()
    assert sorted(map(repr, written)) == sorted(map(repr, expected))
    before = out.read_bytes()
    assert "exists already" in refusal("query", sql, "--features", features, "--output", out)
    assert out.read_bytes() == before
    comma = tmp_path / "some.csv"
    assert query(features, "SELECT 1 AS n", "--output", str(comma)).exit_code == 0
    assert comma.read_bytes() == b"n\n1\n"
    piped = query(features, "SELECT 1 AS n", "--format", "parquet")
    assert pq.read_table(pa.BufferReader(piped.stdout_bytes)).to_pylist() == [{"n": 1}]
    for name in ("a.csv", "a.parquet", "a.json"):
        failing = "SELECT CASE WHEN range = 9999 THEN error('late') ELSE 1 END FROM range(10000)"
        given = ("--features", features, "--output", tmp_path / name)
        assert "late" in refusal("query", failing, *given)
        assert not (tmp_path / name).exists()
    assert "Cannot write" in refusal(
        "query", "SELECT 1", "--features", features, "--output", tmp_path / "no" / "a.csv"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some [1].parquet", "some.csv"]


def test_sql_may_come_from_standard_input(features: Path) -> None:
    for arguments in ((), ("-",)):
        result = query(features, *arguments, text="SELECT count(*) AS n FROM latents;\n")
        assert result.stdout == f"n\n{N}\n"
    for text, said in (
        (b"SELECT '\xff'", "not UTF-8"),
        (b"x" * 2**21, "more than"),
        (b"", "empty"),
    ):
        result = query(features, text=text)
        assert result.exit_code == 1
        assert said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("SELECT 1 AS a, 2 AS a", "--format", "json"), "Two columns have the name 'a'"),
        (("SELECT 1 AS a, 2 AS a", "--format", "parquet"), "Two columns have the name 'a'"),
        (("SELECT INTERVAL 1 DAY", "--format", "parquet"), "Parquet cannot hold"),
        (("(" * 100_000, "--format", "json"), "DuckDB cannot run"),
        (("SELECT 1", "--output", "a.txt"), "end it in .csv"),
        (("SELECT 1", "--output", "a.csv", "--format", "table"), "leave out --format table"),
    ],
)
def test_what_cannot_be_written_is_said(
    features: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = query(features, *arguments)
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "command",
    ["query X --features A", "query X --output A", "show 1 --features A", "site --out A",
     "build --store x --sae x --out A", "export --format openai --features x --out A"],
)  # fmt: skip
def test_an_address_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("A", "s3://bucket/x.csv") for word in command.split()]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "'s3://bucket/x.csv' is an address" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_added_explanations_are_a_table_too(features: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="explanations"), asked(features, "FROM explanations") as q:
        q.rows(None)
    shutil.copytree(features, tmp_path / "told")
    told = pa.table({"latent": [2], "explanation": ["courts"]})
    pq.write_table(told, tmp_path / "told" / "explanations.parquet")
    result = query(tmp_path / "told", "SELECT * FROM explanations")
    assert result.stdout == "latent,explanation\n2,courts\n"
