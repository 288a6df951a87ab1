"""Search over the tables, against the tables themselves."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.viewer import site
from sae_harvest.pipelines.viewer.latent import latent_page
from sae_harvest.pipelines.viewer.search import search
from sae_harvest.pipelines.viewer.site import BY_TOKEN, write_site
from sae_harvest.pipelines.viewer.tables import Tables
from tests.feature_cases import tokens_of
from tests.made_tables import HOSTILE, write_tables

N = 48


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("search") / "features", N, hostile=True)


@pytest.fixture(scope="module")
def tables(features):
    return Tables(features)


def rows_of(features, name):
    return pq.read_table(features / f"{name}.parquet").to_pylist()


def test_a_number_finds_its_latent(tables):
    assert search(tables, "12")["latent"] == 12
    assert search(tables, " #12 ")["latent"] == 12
    assert search(tables, str(N))["latent"] is None
    assert search(tables, "²")["latent"] is None


def test_a_token_is_found_whatever_its_case_and_blanks(features, tables):
    found = search(tables, "COURT")["tokens"]
    rows = {r["latent"]: r for r in rows_of(features, "tokens") if r["text"] == " court"}
    assert found["exact"]
    assert {r["latent"]: r["count"] for r in found["rows"]} == {
        latent: row["count"] for latent, row in rows.items()
    }
    assert all(r["texts"] == [" court"] for r in found["rows"])
    latents = {r["latent"]: r for r in rows_of(features, "latents")}
    most = max(row["count"] for row in rows.values())
    for row in found["rows"]:  # how much oftener than on any row
        on_token = rows[row["latent"]]["count"] / most
        assert row["lift"] == pytest.approx(on_token / latents[row["latent"]]["density"], rel=0.01)
    begun = search(tables, "cour")["tokens"]
    assert not begun["exact"]
    assert {text for row in begun["rows"] for text in row["texts"]} == {" court", " court's"}


def test_the_latents_that_are_specific_to_a_token_come_first(tmp_path):
    features = write_tables(tmp_path / "features", 8)
    means = [r["mean"] for r in rows_of(features, "latents")]
    made = {  # latent: rows, share of its firings, activation there in units of its mean
        1: (24, 0.003, 1.0),  # it fires on everything
        2: (24, 0.09, 1.0),
        3: (1, 1.0, 1.0),  # it fired once, by chance here
        4: (24, 0.09, 3.0),  # and strongly
        5: (4, 0.09, 1.0),
    }
    table = pq.read_table(features / "tokens.parquet").to_pylist()
    for latent, (count, share, strength) in made.items():
        table.append(
            {"token": 900, "text": " football", "latent": latent, "count": count, "share": share,
             "mean": strength * means[latent]}
        )  # fmt: skip
    schema = pq.read_schema(features / "tokens.parquet")
    pq.write_table(pa.Table.from_pylist(table, schema), features / "tokens.parquet")
    tables = Tables(features)
    found = search(tables, "football")["tokens"]["rows"]
    assert [r["latent"] for r in found] == [4, 2, 5, 1, 3]
    exported = [r for r in tables.ask(BY_TOKEN) if r.pop("key") == "football"]
    assert exported == [{k: r[k] for k in exported[0]} for r in found]


def test_a_text_is_found_in_contexts_and_at_their_peak(features, tables):
    expected: dict[int, list[bool]] = {}
    strength: dict[int, list[float]] = {}
    for c in rows_of(features, "contexts"):
        text, question = c["text"].lower(), "the guitar"
        if c["activation"] > 0 and question in text:
            at = c["position"] - c["window_start"]
            start = len("".join(tokens_of(c)[:at]))
            stop = start + len(tokens_of(c)[at])
            places = [i for i in range(len(text)) if text.startswith(question, i)]
            hit = any(i < stop and i + len(question) > start for i in places)
            expected.setdefault(c["latent"], []).append(hit)
            strength.setdefault(c["latent"], []).append(hit * c["activation"])
    assert expected
    listed = search(tables, "The Guitar")["texts"]
    peaks = {r["latent"]: r["max"] for r in rows_of(features, "latents")}
    on_peak = [sum(strength[r["latent"]]) / peaks[r["latent"]] for r in listed]
    assert on_peak == pytest.approx(sorted(on_peak, reverse=True), rel=1e-5)
    found = {r["latent"]: r for r in listed}
    assert set(found) == set(expected)
    for latent, hits in expected.items():
        assert (found[latent]["n"], found[latent]["n_peak"]) == (len(hits), sum(hits))
        assert "the guitar" in found[latent]["context"]["text"].lower()


@pytest.mark.parametrize("question", ["%", "_", "' OR 1=1 --", "$q", "?", "\x00", "\\", "a\x00b"])
def test_a_question_is_only_ever_text(tables, question):
    found = search(tables, question)
    hits = [r["context"]["text"] for r in found["texts"]]
    assert all(question.lower() in text.lower() for text in hits)
    assert bool(hits) == any(question in text for text in HOSTILE)


def test_questions_that_cannot_be_searched_for_get_a_sentence(tables):
    with pytest.raises(InputError, match="Type a token"):
        search(tables, "   ")
    with pytest.raises(InputError, match="at most 200 characters, not 201"):
        search(tables, "a" * 201)


def test_explanations_are_searched_where_there_are_any(tmp_path):
    features = write_tables(tmp_path / "features", 8)
    assert search(Tables(features), "court")["explanations"] is None
    texts = pa.table(
        {"latent": pa.array([2, 5], pa.int32()), "explanation": ["courts and judges", "fruit"]}
    )
    pq.write_table(texts, features / "explanations.parquet")
    found = search(Tables(features), "judges COURT")["explanations"]
    assert [(r["latent"], r["explanation"]) for r in found] == [(2, "courts and judges")]


def test_a_page_shows_the_explanations_that_search_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "SHARES", 2)  # fewer files
    features = write_tables(tmp_path / "features", 8)
    assert latent_page(Tables(features), 2)["explanation"] is None
    told = {"latent": [5, 2, 2, 3], "explanation": ["fruit", "judges", "courts", None]}
    pq.write_table(pa.table(told), features / "explanations.parquet")
    tables = Tables(features)
    shown = [latent_page(tables, latent)["explanation"] for latent in range(8)]
    assert shown == [None, None, "courts\njudges", None, None, "fruit", None, None]
    write_site(features, None, tmp_path / "site")
    pages = (tmp_path / "site" / "data" / "a" / "latents" / "0.js").read_text()
    page = json.loads(pages[pages.index("{") : pages.rindex(")")])
    assert [page[str(latent)]["explanation"] for latent in range(4)] == shown[:4]
