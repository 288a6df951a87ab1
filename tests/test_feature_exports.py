"""Exports of feature tables for other packages' pages: every value against the tables."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.exports.export import export
from sae_harvest.pipelines.exports.selection import parse_latents, pieces
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
    refusal,
    run,
)
from tests.feature_cases import DEAD, SAE_LATENTS, read_table, sentence, tokens_of
from tests.made_tables import HOSTILE, HOSTILE_LATENT, write_tables

FORMATS = ("neuronpedia", "delphi", "openai", "circuit-tracer")
LATENTS = range(SAE_LATENTS)


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


# ---- which latents


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [range(600)]),
        ("0-99,512", [range(100), range(512, 513)]),
        ("7", [range(7, 8)]),
        (" 5 - 9 , 0-4", [range(10)]),
        ("3,1,2,2,10-12,11-20", [range(1, 4), range(10, 21)]),
        ("0-599", [range(600)]),
    ],
)
def test_latents_are_named_by_ranges(text: str | None, expected: list[range]) -> None:
    assert parse_latents(text, 600) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "5-3", "1;2", "1,,2", "1.5"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a list such as 0-99,512"):
        parse_latents(text, 600)


def test_pieces_hold_every_latent_once() -> None:
    some = [range(3), range(10, 21)]
    found = list(pieces(some, 4))
    assert [i for piece in found for i in piece] == [*range(3), *range(10, 21)]
    assert max(map(len, found)) == 4


# ---- circuit-tracer


def circuit_features(out: Path, layer: int) -> dict[int, dict[str, Any]]:
    """As its page reads them: a byte range, of which the length is told first."""
    index = json.loads(gzip.decompress((out / "index.json.gz").read_bytes()))[str(layer)]
    data = (out / index["filename"]).read_bytes()
    assert index["offsets"][0] == 0
    assert index["offsets"][-1] == len(data)
    found = {}
    for latent, start in enumerate(index["offsets"][:-1]):
        piece = data[start : index["offsets"][latent + 1] + 1]  # the range includes its end
        if index["offsets"][latent + 1] > start:
            (length,) = struct.unpack("<I", piece[:4])
            found[latent] = json.loads(gzip.decompress(piece[4 : 4 + length]))
    return found


def test_circuit_tracer_is_told_what_the_tables_say(
    features: Path,
    latents: list[dict[str, Any]],
    values: dict[int, np.ndarray],
    tmp_path: Path,
) -> None:
    found = circuit_features(exported(features, "circuit-tracer", tmp_path / "out"), 1)
    assert list(found) == list(LATENTS)
    for latent, facts in zip(LATENTS, latents, strict=True):
        said = found[latent]
        assert said["transcoder_id"] == "resid_post.1"
        assert said["index"] == latent
        assert said["top_logits"] == facts["top_logit_tokens"]
        assert said["bottom_logits"] == facts["bottom_logit_tokens"]
        assert said["activation_frequency"] == facts["density"]
        assert said["act_min"] == 0
        assert as_float32([said["act_max"]]) == [facts["max"]]
        if latent == DEAD:
            assert said["examples_quantiles"] == said["quantile_values"] == []
            assert said["histogram"] == [0] * BARS
            continue
        assert said["histogram"] == equal_bars(values[latent])
        quantiles = said["quantile_values"]
        assert len(quantiles) == 100
        for percent in (10, 25, 50, 75, 90, 99):
            assert quantiles[percent - 1] == facts[f"q{percent}"]
        assert quantiles == sorted(quantiles)
        assert quantiles[-1] == facts["max"]


def test_circuit_tracer_gets_contexts_by_stratum_and_knows_repeated_ones(
    features: Path, tmp_path: Path
) -> None:
    found = circuit_features(exported(features, "circuit-tracer", tmp_path / "out"), 1)
    repeated = 0
    for latent in set(LATENTS) - {DEAD}:
        contexts, seen = contexts_of(features, latent), set()
        strata = [s for s in (*SHOWN, "random") if s in contexts]
        groups = found[latent]["examples_quantiles"]
        titles = [s.replace("_", " ").capitalize() for s in strata]
        assert [group["quantile_name"] for group in groups] == titles
        for stratum, group in zip(strata, groups, strict=True):
            assert len(group["examples"]) == len(contexts[stratum])
            for example, context in zip(group["examples"], contexts[stratum], strict=True):
                assert example["tokens"] == tokens_of(context)
                assert as_float32(example["tokens_acts_list"]) == context["activations"]
                peak = example["tokens_acts_list"][example["train_token_ind"]]
                assert as_float32([peak]) == [context["activation"]]
                assert example["is_repeated_datapoint"] == (context["row"] in seen)
                repeated += example["is_repeated_datapoint"]
                seen.add(context["row"])
    assert repeated


def test_circuit_tracer_gets_several_layers_in_one_folder(tmp_path: Path) -> None:
    one = write_tables(tmp_path / "one", 20, site="resid_post.1")
    two = write_tables(tmp_path / "two", 30, seed=1, site="resid_post.2")
    out = exported([one, two], "circuit-tracer", tmp_path / "out", "--name", "mine")
    assert list(circuit_features(out, 1)) == list(range(20))
    assert list(circuit_features(out, 2)) == list(range(30))
    assert circuit_features(out, 2)[5]["transcoder_id"] == "mine"
    some = exported(one, "circuit-tracer", tmp_path / "some", "--latents", "3-5,9")
    assert list(circuit_features(some, 1)) == [3, 4, 5, 9]


# ---- OpenAI


def test_atoms_are_what_sae_viewer_asks_for(
    features: Path,
    latents: list[dict[str, Any]],
    values: dict[int, np.ndarray],
    tmp_path: Path,
) -> None:
    out = exported(features, "openai", tmp_path / "out") / "resid_post.1" / "atoms"
    n_rows = json.loads((features / "run.json").read_text())["n_rows"]
    assert {path.name for path in out.iterdir()} == {f"{i}.json" for i in LATENTS}
    for latent, facts in zip(LATENTS, latents, strict=True):
        atom = json.loads((out / f"{latent}.json").read_text())
        assert atom["density"] == facts["density"]
        a = values.get(latent, np.zeros(0))
        sums = [(a**power).sum() / n_rows for power in (1, 2, 3, 4)]
        assert atom["mean_act"] == pytest.approx(sums[0])
        assert atom["mean_act_squared"] == pytest.approx(sums[1])
        if latent == DEAD:
            assert (atom["skew"], atom["kurtosis"], atom["hist"], atom["top"]) == (0, 0, {}, [])
            continue
        assert atom["skew"] == pytest.approx(sums[2] / sums[1] ** 1.5)
        assert atom["kurtosis"] == pytest.approx(sums[3] / sums[1] ** 2)
        bars, counts = np.unique(np.ceil(a / 0.2).astype(int), return_counts=True)
        assert atom["hist"] == dict(zip(map(str, bars), counts, strict=True))


def test_sequences_are_contexts(features: Path, tmp_path: Path) -> None:
    out = exported(features, "openai", tmp_path / "out", "--latents", "5") / "resid_post.1"
    assert [path.name for path in (out / "atoms").iterdir()] == ["5.json"]
    atom, contexts = json.loads((out / "atoms" / "5.json").read_text()), contexts_of(features, 5)
    for stratum in ("top", "random"):
        assert len(atom[stratum]) == len(contexts[stratum]) > 0
        for said, context in zip(atom[stratum], contexts[stratum], strict=True):
            assert said["doc_id"] == context["document"]
            assert said["tokens"] == tokens_of(context)
            assert said["token_ints"] == context["token_ids"]
            assert as_float32(said["acts"]) == context["activations"]
            assert said["act"] == said["acts"][said["idx"]]
            assert as_float32([said["act"]]) == [context["activation"]]
            assert said["density"] == np.mean(np.array(context["activations"]) > 0)


def test_neuron_records_have_moments_over_all_rows(
    features: Path, values: dict[int, np.ndarray], tmp_path: Path
) -> None:
    out = exported(features, "openai", tmp_path / "out", "--name", "x") / "x" / "neurons" / "1"
    n_rows = json.loads((features / "run.json").read_text())["n_rows"]
    for latent in LATENTS:
        record = json.loads((out / f"{latent}.json").read_text())
        assert record["neuron_id"]["layer_index"] == 1
        assert record["neuron_id"]["neuron_index"] == latent
        if latent == DEAD:
            assert record["mean"] == record["variance"] == 0
            assert record["skewness"] is record["kurtosis"] is None
            continue
        rows = np.zeros(n_rows)
        rows[: len(values[latent])] = values[latent]
        off = rows - rows.mean()
        assert record["mean"] == pytest.approx(rows.mean())
        assert record["variance"] == pytest.approx(rows.var())
        assert record["skewness"] == pytest.approx((off**3).mean() / rows.std() ** 3)
        assert record["kurtosis"] == pytest.approx((off**4).mean() / rows.var() ** 2)


def test_neuron_records_hold_contexts_by_quantile(features: Path, tmp_path: Path) -> None:
    out = exported(features, "openai", tmp_path / "out") / "resid_post.1" / "neurons" / "1"
    record, contexts = json.loads((out / "5.json").read_text()), contexts_of(features, 5)
    parts = [
        ("most_positive_activation_records", record["most_positive_activation_records"], "top"),
        ("random_sample", record["random_sample"], "inactive"),
        *(
            ("random_sample_by_quantile", part, f"decile_{tenth}")
            for tenth, part in enumerate(record["random_sample_by_quantile"], start=1)
        ),
    ]
    assert len(parts) == 12
    assert record["quantile_boundaries"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    for _, records, stratum in parts:
        expected = contexts.get(stratum, [])
        assert [r["tokens"] for r in records] == [tokens_of(c) for c in expected]
        activations = [as_float32(r["activations"]) for r in records]
        assert activations == [c["activations"] for c in expected]


# ---- all of them


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_tables_give_the_same_bytes(features: Path, tmp_path: Path, form: str) -> None:
    one, two = (exported(features, form, tmp_path / name) for name in ("one", "two"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files
    for path in files:
        assert (one / path).read_bytes() == (two / path).read_bytes()


@pytest.mark.parametrize("form", ["neuronpedia", "openai", "circuit-tracer"])
def test_hostile_texts_come_through_whole(tmp_path: Path, form: str) -> None:
    features = write_tables(tmp_path / "tables", 20, hostile=True, context_length=128)
    out = exported(features, form, tmp_path / "out", "--latents", str(HOSTILE_LATENT))
    if form == "circuit-tracer":
        groups = circuit_features(out, 1)[HOSTILE_LATENT]["examples_quantiles"]
        windows = [e["tokens"] for group in groups for e in group["examples"]]
    elif form == "openai":
        atom = json.loads((out / "resid_post.1/atoms" / f"{HOSTILE_LATENT}.json").read_text())
        windows = [sequence["tokens"] for sequence in atom["top"]]
    else:
        windows = [r["tokens"] for r in batches(out / "made-up/1-sae/activations")]
    assert {token for tokens in windows for token in tokens} >= set(HOSTILE)


def test_what_was_there_stays_and_nothing_else_is_left(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    exported(features, "circuit-tracer", out)  # an empty folder is as good as none
    assert "holds something already" in refusal(features, "openai", out)
    assert sorted(p.name for p in out.iterdir()) == ["index.json.gz", "layer_1.bin"]
    (tmp_path / "file").write_text("")
    assert "holds something already" in refusal(features, "openai", tmp_path / "file")
    within = run(features, "openai", tmp_path / "file" / "out")
    assert within.exit_code == 1
    assert "Cannot write into" in sentence(within.stderr)


def test_a_mistake_is_told_in_a_sentence(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "holds no feature tables" in refusal(tmp_path, "openai", out)
    assert "There is no latent 48" in refusal(features, "openai", out, "--latents", "0-48")
    assert "leave slashes out" in refusal(features, "openai", out, "--name", "../x")
    both = [features, features]
    assert "Two of the tables are for layer 1" in refusal(both, "circuit-tracer", out)
    assert "would have the name resid_post.1" in refusal(both, "openai", out)
    assert "would have the name tiny-gpt2/1-sae" in refusal(both, "neuronpedia", out)
    assert run(features, "excel", out).exit_code == 2


@pytest.mark.parametrize("form", ["neuronpedia", "openai", "circuit-tracer"])
def test_damaged_tables_are_named(features: Path, tmp_path: Path, form: str) -> None:
    damaged = shutil.copytree(features, tmp_path / "tables")
    path = damaged / "contexts.parquet"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path} is damaged" in refusal(damaged, form, tmp_path / "out")
    path.unlink()
    assert f"{path} is missing" in refusal(damaged, form, tmp_path / "out")
    shutil.copyfile(features / "contexts.parquet", path)
    shutil.rmtree(damaged / "firings")
    assert f"{damaged / 'firings'} is missing" in refusal(damaged, form, tmp_path / "out")


def test_progress_counts_latents(features: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export(
        [features],
        tmp_path / "counted",
        "openai",
        latents="3,5-9",
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(done, 6) for done in range(7)]
    result = run(features, "openai", tmp_path / "out", "--latents", "3,5-9")
    assert result.stdout == f"{tmp_path / 'out'}: 6 latents for openai.\n"
