"""Exports of feature tables for Neuronpedia: columns, types, and every value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_harvest.pipelines.exports import neuronpedia
from sae_harvest.pipelines.exports.tables import BARS
from tests.export_cases import (
    SHOWN,
    as_float32,
    batches,
    built,
    contexts_of,
    equal_bars,
    exported,
    firings_of,
    lines,
)
from tests.feature_cases import DEAD, SAE_LATENTS, read_table, tokens_of
from tests.made_tables import write_tables

LATENTS = range(SAE_LATENTS)

# columns and types of its database, and those that it has no default for

TEXT, INTEGER, FLOAT, BOOLEAN = "text", "integer", "float", "boolean"
COLUMNS: dict[str, dict[str, str]] = {
    "release": {
        "name": TEXT, "visibility": TEXT, "isNewUi": BOOLEAN, "featured": BOOLEAN,
        "description": TEXT, "descriptionShort": TEXT, "urls": "text[]", "creatorEmail": TEXT,
        "creatorName": TEXT, "creatorNameShort": TEXT, "creatorId": TEXT,
        "defaultSourceSetName": TEXT, "defaultSourceId": TEXT, "defaultUmapSourceIds": "text[]",
        "createdAt": TEXT,
    },
    "model": {
        "id": TEXT, "displayNameShort": TEXT, "displayName": TEXT, "creatorId": TEXT,
        "tlensId": TEXT, "openRouterId": TEXT, "dimension": INTEGER, "thinking": BOOLEAN,
        "visibility": TEXT, "defaultSourceSetName": TEXT, "defaultSourceId": TEXT,
        "defaultGraphSourceSetName": TEXT, "inferenceEnabled": BOOLEAN, "instruct": BOOLEAN,
        "layers": INTEGER, "neuronsPerLayer": INTEGER, "createdAt": TEXT, "owner": TEXT,
        "updatedAt": TEXT, "website": TEXT,
    },
    "sourceset": {
        "modelId": TEXT, "name": TEXT, "hasDashboards": BOOLEAN, "allowInferenceSearch": BOOLEAN,
        "visibility": TEXT, "description": TEXT, "type": TEXT, "creatorName": TEXT,
        "urls": "text[]", "creatorEmail": TEXT, "creatorId": TEXT, "releaseName": TEXT,
        "hasGraphs": BOOLEAN, "graphEnabled": BOOLEAN, "similarityMatrixEnabled": BOOLEAN,
        "defaultOfModelId": TEXT, "defaultGraphModelId": TEXT, "defaultRange": INTEGER,
        "defaultShowBreaks": BOOLEAN, "showDfa": BOOLEAN, "showCorrelated": BOOLEAN,
        "showHeadAttribution": BOOLEAN, "showUmap": BOOLEAN, "createdAt": TEXT,
    },
    "source": {
        "id": TEXT, "modelId": TEXT, "hasDashboards": BOOLEAN, "inferenceEnabled": BOOLEAN,
        "saelensConfig": "json", "saelensRelease": TEXT, "saelensSaeId": TEXT, "hfRepoId": TEXT,
        "hfFolderId": TEXT, "visibility": TEXT, "defaultOfModelId": TEXT, "setName": TEXT,
        "creatorId": TEXT, "hasUmap": BOOLEAN, "hasUmapLogSparsity": BOOLEAN,
        "hasUmapClusters": BOOLEAN, "num_prompts": INTEGER, "num_tokens_in_prompt": INTEGER,
        "dataset": TEXT, "notes": TEXT, "cosSimMatchModelId": TEXT, "cosSimMatchSourceId": TEXT,
        "createdAt": TEXT,
    },
    "features": {
        "modelId": TEXT, "layer": TEXT, "index": TEXT, "sourceSetName": TEXT, "creatorId": TEXT,
        "createdAt": TEXT, "maxActApprox": FLOAT, "hasVector": BOOLEAN, "vector": "float[]",
        "vectorLabel": TEXT, "vectorDefaultSteerStrength": FLOAT, "hookName": TEXT,
        "topkCosSimIndices": "integer[]", "topkCosSimValues": "float[]",
        "neuron_alignment_indices": "integer[]", "neuron_alignment_values": "float[]",
        "neuron_alignment_l1": "float[]", "correlated_neurons_indices": "integer[]",
        "correlated_neurons_pearson": "float[]", "correlated_neurons_l1": "float[]",
        "correlated_features_indices": "integer[]", "correlated_features_pearson": "float[]",
        "correlated_features_l1": "float[]", "neg_str": "text[]", "neg_values": "float[]",
        "pos_str": "text[]", "pos_values": "float[]", "frac_nonzero": FLOAT,
        "freq_hist_data_bar_heights": "float[]", "freq_hist_data_bar_values": "float[]",
        "logits_hist_data_bar_heights": "float[]", "logits_hist_data_bar_values": "float[]",
        "decoder_weights_dist": "float[]", "umap_cluster": INTEGER,
        "umap_log_feature_sparsity": FLOAT, "umap_x": FLOAT, "umap_y": FLOAT,
    },
    "activations": {
        "id": TEXT, "tokens": "text[]", "dataIndex": TEXT, "index": TEXT, "layer": TEXT,
        "modelId": TEXT, "dataSource": TEXT, "maxValue": FLOAT, "maxValueTokenIndex": INTEGER,
        "minValue": FLOAT, "values": "float[]", "dfaValues": "float[]", "dfaTargetIndex": INTEGER,
        "dfaMaxValue": FLOAT, "zQIndices": "integer[]", "zKIndices": "integer[]",
        "zValues": "float[]", "creatorId": TEXT, "createdAt": TEXT, "lossValues": "float[]",
        "logitContributions": TEXT, "binMin": FLOAT, "binMax": FLOAT, "binContains": FLOAT,
        "qualifyingTokenIndex": INTEGER,
    },
    "explanations": {
        "id": TEXT, "modelId": TEXT, "layer": TEXT, "index": TEXT, "embedding": "float[]",
        "description": TEXT, "authorId": TEXT, "triggeredByUserId": TEXT, "notes": TEXT,
        "scoreV1": FLOAT, "scoreV2": FLOAT, "umap_x": FLOAT, "umap_y": FLOAT,
        "umap_cluster": INTEGER, "umap_log_feature_sparsity": FLOAT, "typeName": TEXT,
        "explanationModelName": TEXT, "createdAt": TEXT, "updatedAt": TEXT,
    },
}  # fmt: skip
NEEDED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
    "features": {"modelId", "layer", "index"},
    "activations": {
        "id", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue",
        "creatorId",
    },
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
}  # fmt: skip


@pytest.fixture(scope="module")
def features(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of a real store."""
    return built(tiny_store, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def latents(features: Path) -> list[dict[str, Any]]:
    return read_table(features, "latents")


@pytest.fixture(scope="module")
def values(features: Path) -> dict[int, np.ndarray]:
    return firings_of(features)


def fits(value: Any, kind: str) -> bool:
    if kind.endswith("[]"):
        return isinstance(value, list) and all(fits(v, kind[:-2]) for v in value)
    if kind == FLOAT:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is {TEXT: str, INTEGER: int, BOOLEAN: bool}[kind]


def check_records(table: str, records: list[dict[str, Any]]) -> None:
    """Known columns with values of their types, all that are needed, and the same in every line."""
    for record in records:
        assert record.keys() == records[0].keys()
        assert record.keys() >= NEEDED[table]
        for column, value in record.items():
            assert fits(value, COLUMNS[table][column]), (table, column, value)


def test_neuronpedia_gets_records_that_its_database_takes(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia, "BATCH", 20)
    out = exported(features, "neuronpedia", tmp_path / "out", "--name", "Res 48")
    folder = out / "tiny-gpt2" / "1-res-48"
    small = {table: lines(folder / f"{table}.jsonl") for table in list(COLUMNS)[:4]}
    large = {table: batches(folder / table) for table in ("features", "activations")}
    for table in large:
        names = {path.name for path in (folder / table).iterdir()}
        assert names == {f"batch-{i}.jsonl.gz" for i in range(3)}
    for table, records in (small | large).items():
        check_records(table, records)
    assert [len(records) for records in small.values()] == [1, 1, 1, 1]
    source, source_set = small["source"][0], small["sourceset"][0]
    assert source_set["releaseName"] == small["release"][0]["name"]
    assert source["setName"] == source_set["name"] == "res-48"
    assert source["modelId"] == source_set["modelId"] == small["model"][0]["id"] == "tiny-gpt2"
    assert (source["id"], source["num_tokens_in_prompt"]) == ("1-res-48", 32)
    assert source["num_prompts"] == 8 * 1024 // 32
    for record in large["features"] + large["activations"]:
        assert (record["modelId"], record["layer"]) == ("tiny-gpt2", "1-res-48")
    assert [f["index"] for f in large["features"]] == [str(i) for i in LATENTS]
    ids = [record["id"] for record in large["activations"]]
    assert len(set(ids)) == len(ids)
    assert {len(i) for i in ids} == {25}


def test_neuronpedia_is_told_what_the_tables_say(
    features: Path,
    latents: list[dict[str, Any]],
    values: dict[int, np.ndarray],
    tmp_path: Path,
) -> None:
    out = exported(features, "neuronpedia", tmp_path / "out")
    found = batches(out / "tiny-gpt2" / "1-sae" / "features")
    alike: dict[int, list[tuple[int, int, float]]] = {i: [] for i in LATENTS}
    for row in read_table(features, "neighbours"):
        if row["cosine_rank"] is not None:
            pair = row["cosine_rank"], row["other"], row["decoder_cosine"]
            alike[row["latent"]].append(pair)
    for said, facts in zip(found, latents, strict=True):
        latent = facts["latent"]
        assert as_float32([said["maxActApprox"]]) == [facts["max"]]
        assert said["frac_nonzero"] == facts["density"]
        assert said["pos_str"] == facts["top_logit_tokens"]
        assert said["neg_str"] == facts["bottom_logit_tokens"]
        assert as_float32(said["pos_values"]) == facts["top_logits"]
        assert as_float32(said["neg_values"]) == facts["bottom_logits"]
        assert said["topkCosSimIndices"] == [other for _, other, _ in sorted(alike[latent])]
        cosines = [cosine for _, _, cosine in sorted(alike[latent])]
        assert as_float32(said["topkCosSimValues"]) == cosines
        heights, middles = said["freq_hist_data_bar_heights"], said["freq_hist_data_bar_values"]
        if latent == DEAD:
            assert heights == middles == []
            continue
        assert heights == equal_bars(values[latent])
        expected = (np.arange(BARS) + 0.5) * facts["max"] / BARS
        np.testing.assert_allclose(middles, expected, atol=1e-6)


def test_neuronpedia_gets_top_activations_and_intervals(
    features: Path, values: dict[int, np.ndarray], tmp_path: Path
) -> None:
    out = exported(features, "neuronpedia", tmp_path / "out", "--latents", "5,7,11")
    found = batches(out / "tiny-gpt2" / "1-sae" / "activations")
    n_rows = json.loads((features / "run.json").read_text())["n_rows"]
    assert {record["index"] for record in found} == {"5", "11"}  # 7 never fires
    for latent in (5, 11):
        contexts, a = contexts_of(features, latent), values[latent]
        expected = [(s, context) for s in SHOWN for context in contexts.get(s, [])]
        said = [record for record in found if record["index"] == str(latent)]
        assert len(said) == len(expected)
        for record, (stratum, context) in zip(said, expected, strict=True):
            assert record["tokens"] == tokens_of(context)
            assert as_float32(record["values"]) == context["activations"]
            assert as_float32([record["maxValue"]]) == [max(context["activations"])]
            assert as_float32([record["minValue"]]) == [min(context["activations"])]
            assert record["values"][record["maxValueTokenIndex"]] == record["maxValue"]
            qualifying = context["position"] - context["window_start"]
            assert record["qualifyingTokenIndex"] == qualifying
            low, high = record["binMin"], record["binMax"]
            if stratum == "top":
                assert (low, record["binContains"]) == (-1, -1)
                assert as_float32([high]) == [a.max()]
                continue
            assert low <= context["activation"] <= high
            inside = ((a >= low) & (a < high)).sum() if high < a.max() else (a >= low).sum()
            assert record["binContains"] == pytest.approx(inside / n_rows)
            assert abs(inside / len(a) - 0.1) < 0.1


def test_neuronpedia_gets_explanations_where_there_are_some(tmp_path: Path) -> None:
    features = write_tables(tmp_path / "tables", 20, context_length=128)
    table = pa.table({"latent": pa.array([3, 8], pa.int32()), "explanation": ["a\nb\u2028", "c"]})
    pq.write_table(table, features / "explanations.parquet")
    out = exported(features, "neuronpedia", tmp_path / "out") / "made-up" / "1-sae"
    records = batches(out / "explanations")
    check_records("explanations", records)
    assert [(r["index"], r["description"]) for r in records] == [("3", "a\nb\u2028"), ("8", "c")]
    assert len({r["id"] for r in records}) == 2
