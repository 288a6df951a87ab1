"""Latents with known rules: a perfect explainer and simulator reach the top of every score."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.explain.config import ExplainConfig
from sae_harvest.pipelines.explain.excerpts import PARTS, EvidenceSource
from sae_harvest.pipelines.explain.prompts import load_prompts
from sae_harvest.pipelines.explain.receipts import receipt
from sae_harvest.pipelines.explain.run import explain
from sae_harvest.pipelines.exports.tables import Tables as Exported
from sae_harvest.pipelines.viewer.latent import latent_page
from sae_harvest.pipelines.viewer.search import search
from sae_harvest.pipelines.viewer.tables import Tables
from tests.conftest import made_once
from tests.planted import LEVEL, PLANTED, PlantedReader, Scripted, make_planted

CONFIG = ExplainConfig(candidates=2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return made_once(tmp_path_factory, "planted", make_planted)


@pytest.fixture
def features(planted, tmp_path):
    """The tables, in a folder of their own."""
    (tmp_path / "store").symlink_to(planted / "store")
    folder = tmp_path / "features"
    folder.mkdir()
    for path in (planted / "features").iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def explained(features, client):
    latents = range(len(PLANTED))
    summary = explain(features, client, latents, CONFIG, load_prompts())
    rows = duckdb.execute(
        f"SELECT latent, subject, task, part, metric, value FROM '{features / 'scores.parquet'}'"
    ).fetchall()
    return summary, {row[:5]: row[5] for row in rows}


def test_a_perfect_explainer_and_simulator_score_one(features):
    summary, scores = explained(features, Scripted())
    assert summary.explained == len(PLANTED)
    found = duckdb.execute(
        f"SELECT explanation FROM '{features / 'explanations.parquet'}' WHERE chosen "
        "ORDER BY latent"
    ).fetchall()
    assert [text for (text,) in found] == list(PLANTED)
    for latent in range(len(PLANTED)):
        for part in ("top firings", "all firings"):
            assert scores[latent, "explanation", "simulation", part, "pearson"] > 0.99
            assert scores[latent, "explanation", "simulation", part, "auprc"] > 0.98
            assert scores[latent, "constant", "simulation", part, "pearson"] == 0
            assert abs(scores[latent, "shuffled labels", "simulation", part, "pearson"]) < 0.2
        assert scores[latent, "explanation", "detection", "random", "auprc"] == 1
        assert scores[latent, "explanation", "detection", "random", "balanced_accuracy"] == 1
        assert scores[latent, "explanation", "fuzzing", "wrong tokens", "balanced_accuracy"] == 1
        assert scores[latent, "constant", "detection", "random", "balanced_accuracy"] == 0.5


def test_a_wrong_explanation_scores_nothing(features):
    _, scores = explained(features, Scripted(say=lambda right: "bananas"))
    for latent in range(len(PLANTED)):
        assert scores[latent, "explanation", "simulation", "all firings", "pearson"] == 0
        assert scores[latent, "explanation", "detection", "random", "balanced_accuracy"] == 0.5
        constant = scores[latent, "constant", "detection", "random", "auprc"]
        assert scores[latent, "explanation", "detection", "random", "auprc"] == constant


def revised(features, revise):
    client = Scripted(say=lambda right: "numbers", revise=revise)
    config = ExplainConfig(candidates=1, revisions=1)
    latents = [PLANTED.index("numbers, but not years")]
    explain(features, client, latents, config, load_prompts(), reader=PlantedReader())
    texts = duckdb.execute(
        f"SELECT explanation, chosen, parent FROM '{features / 'explanations.parquet'}'"
    ).fetchall()
    scores = duckdb.execute(
        f"SELECT subject, value FROM '{features / 'scores.parquet'}' WHERE task = 'simulation' "
        "AND part = 'all firings' AND metric = 'pearson'"
    ).fetchall()
    return texts, dict(scores)


def test_a_revision_that_fits_what_happened_is_kept_and_scores_more(features):
    texts, scores = revised(features, lambda right: right)
    (chosen, other) = texts
    assert chosen[:2] == ("numbers, but not years", True)
    assert other[:2] == ("numbers", False)
    assert chosen[2] is not None
    assert scores["explanation"] > 0.99
    assert scores["before revision"] < scores["explanation"] - 0.02


def test_a_revision_into_nonsense_is_not_kept(features):
    texts, scores = revised(features, lambda right: "bananas")
    assert [text[:2] for text in texts] == [("numbers", True), ("bananas", False)]
    assert "before revision" not in scores


def test_the_label_is_what_correlates_most(features):
    explained(features, Scripted())
    labels = duckdb.execute(
        f"SELECT label, kind, score FROM '{features / 'labels.parquet'}' ORDER BY latent"
    ).fetchall()
    assert [row[0] for row in labels[: len(PLANTED)]] == list(PLANTED)
    assert {row[1] for row in labels[: len(PLANTED)]} == {"explanation"}
    assert all(row[2] > 0.99 for row in labels[: len(PLANTED)])
    assert labels[-1] == ("dead", "top tokens", None)


def test_rows_of_other_latents_stay_when_some_are_explained_again(features):
    explained(features, Scripted())
    path = features / "scores.parquet"
    before = duckdb.execute(f"SELECT * FROM '{path}' WHERE latent > 1 ORDER BY ALL").fetchall()
    explain(features, Scripted(say=lambda right: "bananas"), [0, 1], CONFIG, load_prompts())
    after = duckdb.execute(f"SELECT * FROM '{path}' WHERE latent > 1 ORDER BY ALL").fetchall()
    assert after == before
    found = duckdb.execute(
        f"SELECT explanation FROM '{features / 'explanations.parquet'}' WHERE chosen "
        "ORDER BY latent"
    ).fetchall()
    assert [text for (text,) in found] == ["bananas", "bananas", *PLANTED[2:]]


def ids(features):
    return dict(
        duckdb.execute(
            f"SELECT latent, id FROM '{features / 'explanations.parquet'}' WHERE chosen"
        ).fetchall()
    )


def test_a_receipt_derives_every_score_again(features):
    explained(features, Scripted())
    for latent, number in ids(features).items():
        found = receipt(features, number)
        assert found.holds
        assert found.explanation["explanation"] == PLANTED[latent]
        assert {score.task for score in found.scores} == {"simulation", "detection", "fuzzing"}
        assert len(found.scores) >= 12
        assert all(score.recorded is not None for score in found.scores)


def test_a_receipt_says_what_no_longer_holds(features):
    explained(features, Scripted())
    path = features / "simulations.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["activations"][0] += 1.0
    rows[1]["simulated"] = [0.0] * len(rows[1]["tokens"])
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    found = receipt(features, ids(features)[0])
    assert not found.holds
    assert len(found.differences) == 1
    assert str(rows[0]["first_row"]) in found.differences[0]
    wrong = {(score.part, score.metric) for score in found.scores if not score.holds}
    assert ("top firings", "pearson") in wrong
    assert all(score.holds for score in found.scores if score.task == "detection")
    with pytest.raises(InputError, match="no explanation with the id"):
        receipt(features, "xyz")


def test_pages_show_the_chosen_explanation_with_scores_and_simulations(features):
    explained(features, Scripted())
    tables = Tables(features)
    for latent, name in enumerate(PLANTED):
        page = latent_page(tables, latent)
        assert page["explanation"] == page["label"] == name
        scores = {(s["task"], s["part"], s["metric"]): s for s in page["explained"]["scores"]}
        subjects = scores["simulation", "all firings", "pearson"]["subjects"]
        assert subjects["explanation"][0] > 0.99
        assert subjects["constant"][0] == 0
        simulations = page["explained"]["simulations"]
        assert 0 < len(simulations) <= 12
        assert all(len(s["tokens"]) == len(s["simulated"]) for s in simulations)
    assert latent_page(tables, len(PLANTED))["explained"] is None
    found = search(tables, "numbers years")
    assert [row["label"] for row in found["explanations"]] == ["numbers, but not years"]
    assert Exported(features).explanations()[0] == ["numbers"]


def test_the_three_sets_share_no_document_and_excerpts_no_other_text(planted):
    source = EvidenceSource(planted / "features", 32)
    documents = {part: set() for part in PARTS}
    for evidence in source.of(range(len(PLANTED))):
        for part in PARTS:
            for excerpt in evidence.excerpts[part]:
                shard = excerpt.first_row // source.store.shard_rows
                first, _ = source.store.shard_span(shard)
                here = slice(
                    excerpt.first_row - first, excerpt.first_row - first + len(excerpt.ids)
                )
                (document,) = set(source.store.row_documents(shard)[0][here].tolist())
                assert document == excerpt.document
                documents[part].add(document)
                values = source.store.read("mlp_act.0", excerpt.first_row, excerpt.first_row + 1)
                assert values[0, evidence.latent] == excerpt.activations[0]
    assert all(len(found) > 20 for found in documents.values())
    assert documents["train"].isdisjoint(documents["validation"])
    assert documents["test"].isdisjoint(documents["train"] | documents["validation"])


def test_the_largest_activation_is_that_of_the_rules(planted):
    (evidence,) = EvidenceSource(planted / "features", 32).of([0])
    assert evidence.largest == LEVEL
    assert np.unique(evidence.excerpts["test"][0].activations).tolist() == [0, LEVEL]
