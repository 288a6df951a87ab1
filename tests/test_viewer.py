"""What the viewer's pages are told, against the tables themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.viewer import latent as latent_queries
from sae_harvest.pipelines.viewer.latent import compact, latent_page, merged
from sae_harvest.pipelines.viewer.listing import Listing, list_latents
from sae_harvest.pipelines.viewer.notes import Notes
from sae_harvest.pipelines.viewer.overview import overview
from sae_harvest.pipelines.viewer.search import search
from sae_harvest.pipelines.viewer.sql import FencedSQL
from sae_harvest.pipelines.viewer.tables import Tables
from tests.feature_cases import tokens_of
from tests.made_tables import (
    HOSTILE,
    HOSTILE_LATENT,
    HOSTILE_URL,
    STRATA,
    word_of,
    write_tables,
)

N = 48


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("viewer") / "features", N, hostile=True)


@pytest.fixture(scope="module")
def tables(features):
    return Tables(features)


def rows_of(features, name, latent=None):
    table = pq.read_table(features / f"{name}.parquet")
    if latent is not None:
        table = table.filter(pc.equal(table["latent"], latent))
    return table.to_pylist()


# ---- a latent's page


def test_a_page_shows_every_context_of_its_latent_strongest_stratum_first(features, tables):
    page = latent_page(tables, 5)
    expected = rows_of(features, "contexts", 5)
    assert len(page["contexts"]) == len(expected) == sum(n for _, n in STRATA)
    assert [c["stratum"] for c in page["contexts"]][:11] == ["top"] * 10 + ["decile_10"]
    by_place = {(c["stratum"], c["rank"]): c for c in expected}
    for context in page["contexts"]:
        truth = by_place[context["stratum"], context["rank"]]
        assert context["text"] == truth["text"]
        assert context["activation"] == pytest.approx(truth["activation"], rel=1e-4)
        assert context["place"] == truth["position"] - truth["window_start"]
        dense = [0.0] * len(context["lengths"])
        for at, value in context["heat"]:
            dense[at] = value
        assert dense == pytest.approx(truth["activations"], rel=1e-4)
        ends = np.cumsum(context["lengths"])
        pieces = [context["text"][e - n : e] for e, n in zip(ends, context["lengths"], strict=True)]
        assert pieces == tokens_of(truth)


def test_a_page_names_its_documents_neighbours_and_histogram(features, tables):
    page = latent_page(tables, 7)
    documents = {d["document"]: d for d in rows_of(features, "documents")}
    for context in page["contexts"]:
        shown = page["documents"][str(context["document"])]
        assert shown["title"] == documents[context["document"]]["title"]
        assert shown["url"] == documents[context["document"]]["url"]
    near = page["neighbours"]
    assert [n["other"] for n in near["cosine"]] == [(7 + step) % N for step in range(1, 11)]
    assert [n["decoder_cosine"] for n in near["cosine"]] == pytest.approx(
        [0.9 - 0.05 * i for i in range(10)]
    )
    assert len(near["cofire"]) == 10
    assert near["cosine"][0]["tokens"][0] == word_of(8)
    assert sum(count for _, _, count in page["histogram"]) == page["statistics"]["n_fire"]
    assert json.dumps(page, allow_nan=False)


def test_bins_are_merged_four_by_four_and_keep_their_counts():
    rows = [
        {"bin": b, "low": 2.0**b, "high": 2.0 ** (b + 1), "count": b + 1} for b in (3, 4, 5, 11)
    ]
    assert merged(rows) == [[8, 16, 4], [16, 64, 11], [2048, 4096, 12]]


def test_lengths_of_tokens_count_characters_not_bytes():
    context = {"text": "é👩‍👩‍👧a\x00", "token_ends": [1, 6, 6, 8]}
    assert compact(context | {"activations": [0.0, 1.5, 0.0, 2.0]}) == {
        "text": "é👩‍👩‍👧a\x00",
        "lengths": [1, 5, 0, 2],
        "heat": [[1, 1.5], [3, 2.0]],
    }


def test_a_dead_latent_has_a_page_and_a_latent_that_does_not_exist_a_sentence(tables):
    page = latent_page(tables, N - 1)
    assert page["statistics"]["dead"]
    assert page["contexts"] == []
    for number in (N, -1):
        with pytest.raises(InputError, match=f"no latent {number}; these tables hold 0 to 47"):
            latent_page(tables, number)


@pytest.mark.slow
def test_a_page_of_a_big_build_reads_at_most_two_row_groups_per_table(tmp_path):
    """24,576 latents of 40 contexts; what was read is what DuckDB's own profile says."""
    features = write_tables(tmp_path / "big", 24_576, window=16, n_documents=5000)
    tables = Tables(features)
    groups = {
        name: pq.ParquetFile(features / f"{name}.parquet").metadata.num_row_groups
        for name in ("latents", "contexts", "histograms", "neighbours", "documents")
    }
    assert groups["contexts"] == 480
    asked = []

    def profiled(sql, *values):
        cursor = tables._connection.cursor()
        ((_, text),) = cursor.execute(
            f"EXPLAIN (ANALYZE, FORMAT json) {sql}", list(values)
        ).fetchall()
        asked.append(json.loads(text))
        return Tables.ask(tables, sql, *values)

    for latent in (0, 1, 51, 12_345, 24_574):
        asked.clear()
        tables.ask = profiled
        page = latent_page(tables, latent)
        del tables.ask
        assert len(page["contexts"]) == 40
        read: dict[str, int] = {}
        for profile in asked:
            for scan in scans(profile["operator"]):
                for file in files_of(scan):
                    read[file] = read.get(file, 0) + scan["row_groups_scanned"]
        assert {"latents", "contexts", "histograms", "neighbours"} <= set(read)
        assert all(count <= 2 for count in read.values()), read


def scans(operators):
    """Every scan of a file in a profile."""
    for operator in operators:
        if "Filename(s)" in operator.get("extra_info", {}):
            yield operator
        yield from scans(operator.get("children", []))


def files_of(scan):
    return [Path(name).stem for name in scan["extra_info"]["Filename(s)"].split(",")]


def test_the_page_asks_each_table_once(tables, monkeypatch):
    asked = []
    monkeypatch.setattr(
        tables, "ask", lambda sql, *values: asked.append(sql) or Tables.ask(tables, sql, *values)
    )
    latent_page(tables, 3)
    for query in ("STATISTICS", "HISTOGRAM", "NEIGHBOURS", "CONTEXTS"):
        assert asked.count(getattr(latent_queries, query)) == 1
    files = ("latents", "contexts", "histograms", "neighbours", "tokens", "documents")
    assert sum(f"FROM {name} " in f"{sql} " for sql in asked for name in files) == 4


# ---- the start page


def test_the_start_page_counts_what_the_table_holds(features, tables):
    latents = rows_of(features, "latents")
    about = overview(tables)
    assert (about["n_latents"], about["n_dead"]) == (N, 1)
    assert about["mean_firing"] == pytest.approx(sum(r["density"] for r in latents), rel=1e-4)
    for name, plot in about["plots"].items():
        assert sum(plot["counts"]) == N - 1, name
        assert plot["edges"] == sorted(plot["edges"])
        values = [r[name] for r in latents if not r["dead"]]
        assert plot["edges"][0] == pytest.approx(min(values), rel=1e-4)
        assert plot["edges"][-1] == pytest.approx(max(values), rel=1e-4)
    assert about["scatter"]["latent"] == list(range(N - 1))
    assert json.dumps(about, allow_nan=False)


def test_a_list_is_sorted_filtered_and_paged(features, tables):
    latents = [r for r in rows_of(features, "latents") if not r["dead"]]
    by_max = sorted(latents, key=lambda r: (-r["max"], r["latent"]))
    page = list_latents(tables, Listing(sort="max", descending=True, offset=10, limit=5))
    assert page["total"] == N - 1
    assert [r["latent"] for r in page["rows"]] == [r["latent"] for r in by_max[10:15]]
    low, high = by_max[30]["max"], by_max[20]["max"]
    between = list_latents(tables, Listing(between={"max": (low, high)}))
    assert {r["latent"] for r in between["rows"]} == {r["latent"] for r in by_max[20:31]}
    token = list_latents(tables, Listing(fires_on="SENAT"))
    assert [r["latent"] for r in token["rows"]] == [4, 20, 36]
    chosen = list_latents(tables, Listing(latents=[9, 2, N - 1]))
    assert [r["latent"] for r in chosen["rows"]] == [2, 9]


def test_dead_latents_come_last_and_only_when_asked_for(tables):
    page = list_latents(tables, Listing(sort="max", dead=True, limit=100))
    assert page["total"] == N
    assert page["rows"][-1]["latent"] == N - 1
    assert page["rows"][-1]["max"] is None


@pytest.mark.parametrize("name", ["latent; DROP TABLE summary", "tokens", ""])
def test_only_columns_of_the_list_can_be_sorted_by(tables, name):
    with pytest.raises(InputError, match="There is no column"):
        list_latents(tables, Listing(sort=name))
    with pytest.raises(InputError, match="There is no column"):
        list_latents(tables, Listing(between={name: (0, None)}))


# ---- limits and damage


def test_tables_that_do_not_fit_together_are_refused_by_name(tmp_path):
    features = write_tables(tmp_path / "features", 8)
    path = features / "contexts.parquet"
    whole = pq.read_table(path)
    stratum = pa.array(["decile_11", *whole["stratum"].to_pylist()[1:]])
    place = whole.column_names.index("stratum")
    pq.write_table(whole.set_column(place, "stratum", stratum), path)
    tables = Tables(features)
    with pytest.raises(RunError, match=r"contexts\.parquet is damaged \(latent 0: the stratum"):
        latent_page(tables, 0)
    assert latent_page(tables, 1)["contexts"]
    pq.write_table(whole.drop_columns(["text"]), path)
    with pytest.raises(RunError, match=r"contexts\.parquet is no table of contexts: its column te"):
        Tables(features)


def test_a_question_that_takes_too_long_is_stopped(features):
    hasty = Tables(features, seconds=0.2)
    with pytest.raises(InputError, match=r"took longer than 0\.2 s and was stopped"):
        hasty.ask("SELECT count(*) FROM range(100000000000) a, range(1000000) b")
    assert hasty.ask("SELECT 1 AS one") == [{"one": 1}]


def test_a_damaged_table_is_named(tmp_path):
    features = write_tables(tmp_path / "features", 8)
    (features / "latents.parquet").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"latents\.parquet"):
        Tables(features)
    with pytest.raises(RunError, match="no feature tables"):
        Tables(tmp_path)


def test_reading_leaves_the_folder_as_it_was(tmp_path):
    features = write_tables(tmp_path / "features", 8)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in features.rglob("*")}
    tables = Tables(features)
    latent_page(tables, 1)
    search(tables, "court")
    FencedSQL(features).select("SELECT * FROM firings")
    Notes.beside(features, "sae").get(3)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in features.rglob("*")} == before


# ---- hostile text


def test_hostile_text_comes_through_the_data_unchanged(tables):
    page = latent_page(tables, HOSTILE_LATENT)
    shown = "".join(c["text"] for c in page["contexts"])
    assert all(text in shown for text in HOSTILE)
    assert page["documents"]["0"] == {
        "source": "made-up",
        "title": HOSTILE[0],
        "url": HOSTILE_URL,
    }
    assert json.loads(json.dumps(page)) == page
