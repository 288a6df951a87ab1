"""`sae-features diff` over real tables: two SAEs on one store, and stores of the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.evaluate.matching import spans as spans_module
from sae_harvest.pipelines.evaluate.matching.common import Side, common_rows
from sae_harvest.pipelines.evaluate.matching.diff import diff, summary
from sae_harvest.pipelines.evaluate.matching.spans import Spans
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.sae import SAE
from tests.dictionaries import SITE
from tests.feature_cases import refusal
from tests.match_cases import slow

FEW = FeatureConfig(
    n_top=1, n_decile=0, n_random=0, n_inactive=0, n_hard=0, window_tokens=4, n_neighbours=1,
    n_tokens=1, n_logits=1,
)  # fmt: skip
OTHER_RULE = RowRule(max_norm_medians=1.1, heldout_fraction=0.3)


@pytest.fixture(scope="module")
def other(folders, tmp_path_factory):
    """Tables of the same SAE with its latents in another order, fewer of them, and other rows."""
    store, sae, _ = folders
    folder = tmp_path_factory.mktemp("other")
    whole = SAE.load(sae)
    order = torch.from_numpy(np.random.default_rng(0).permutation(whole.config.n_latents)[:40])
    config = whole.config.model_copy(update={"n_latents": 40, "k": 5, "rule": OTHER_RULE})
    rows = [x[order].contiguous() for x in (whole.W_enc, whole.W_dec, whole.b_enc)]
    SAE(config, *rows, whole.b_dec).save(folder / "sae")
    build(store, folder / "sae", folder / "features", FEW, device="cpu")
    return folder / "features"


def dense(features: Path, n_rows: int) -> np.ndarray:
    """Activations [rows, latents] from the files, for readers of Parquet."""
    table = pq.read_table(features / "firings")
    run = json.loads((features / "run.json").read_text())
    found = np.zeros((n_rows, run["n_latents"]), np.float32)
    found[table["row"].to_numpy(), table["latent"].to_numpy()] = table["value"].to_numpy()
    return found


@pytest.fixture(scope="module")
def compared(folders, other, tmp_path_factory):
    out = tmp_path_factory.mktemp("diff") / "out"
    return out, diff(folders[2], other, out)


def test_all_rows_that_both_rules_read_are_counted(folders, other, compared):
    store, _, features = folders
    out, found = compared
    opened = ActivationStore.open(store)
    rules = [RowRule(max_norm_medians=limit, split="all") for limit in (1.2, 1.1)]
    read = np.logical_and.reduce([opened.selected(SITE, rule) for rule in rules])
    assert found.record["rows"] == read.sum() < opened.n_rows
    a, b = (dense(f, opened.n_rows)[read] for f in (features, other))
    expected = slow(a, b)
    got = set()
    for row in pq.read_table(out / "matches.parquet").to_pylist():
        one = -1 if row["class"] == "born" else row["latent_a"]
        two = -1 if row["class"] == "died" else row["latent_b"]
        got.add((one, two, row["class"], row["child"]))
        x, y = a[:, row["latent_a"]] > 0, b[:, row["latent_b"]] > 0
        assert (row["both"], row["a_only"], row["b_only"]) == (
            (x & y).sum(), (x & ~y).sum(), (y & ~x).sum()
        )  # fmt: skip
        assert row["jaccard"] == pytest.approx((x & y).sum() / (x | y).sum())
        assert row["coverage"] == pytest.approx((x & y).sum() / x.sum())
        assert row["precision"] == pytest.approx((x & y).sum() / y.sum())
    assert got == expected
    assert {name for *_, name, _ in got} >= {"same", "died"}


def test_cosines_are_those_of_decoder_rows(folders, other, compared):
    out, _ = compared
    mine, theirs = SAE.load(folders[1]).W_dec, SAE.load(other.parent / "sae").W_dec
    for row in pq.read_table(out / "matches.parquet").to_pylist():
        one, two = mine[row["latent_a"]], theirs[row["latent_b"]]
        expected = torch.nn.functional.cosine_similarity(one, two, dim=0).item()
        assert row["decoder_cosine"] == pytest.approx(expected, abs=1e-5)


def test_contexts_show_both_latents_on_the_rows_where_they_disagree(folders, other, compared):
    store, _, features = folders
    out, _ = compared
    opened = ActivationStore.open(store)
    a, b = (dense(f, opened.n_rows) for f in (features, other))
    for side, rules in ((a, 1.1), (b, 1.2)):
        side[~opened.selected(SITE, RowRule(max_norm_medians=rules, split="all"))] = 0
    rows = pq.read_table(out / "disagreements.parquet").to_pylist()
    assert rows
    for row in rows:
        begin = row["context"] * opened.context_length + row["window_start"]
        here = slice(begin, begin + len(row["token_ids"]))
        assert row["activations_a"] == a[here, row["latent_a"]].tolist()
        assert row["activations_b"] == b[here, row["latent_b"]].tolist()
        assert row["row"] % opened.context_length == row["position"]
        fires, silent = ("b", "a") if row["kind"] == "B only" else ("a", "b")
        at = row["row"] - begin
        assert row[f"activations_{fires}"][at] > 0 or row["kind"] == "parent silent"
        assert row[f"activations_{silent}"][at] == 0 or row["kind"] == "parent silent"
        tokens = opened.tokens(row["context"], row["context"] + 1)[0]
        start = row["window_start"]
        assert row["token_ids"] == tokens[start : start + len(row["token_ids"])].tolist()
        assert row["token_ends"][-1] == len(row["text"])
        shard, inside = divmod(row["row"], opened.shard_rows)
        assert row["document"] == opened.row_documents(shard)[0][inside]


def test_spans_of_other_files_change_nothing(folders, other, compared, tmp_path, monkeypatch):
    out, _ = compared
    rows = common_rows(Side.open(folders[2]), Side.open(other))
    assert len(Spans(rows)) == 1
    monkeypatch.setattr(spans_module, "SPAN_FIRINGS", 1)
    assert len(Spans(rows)) > 1
    diff(folders[2], other, tmp_path / "out")
    for name in ("matches", "disagreements"):
        one, two = (pq.read_table(f / f"{name}.parquet") for f in (out, tmp_path / "out"))
        assert one.equals(two)


def test_the_command_says_what_became_of_the_latents(folders, other, compared, tmp_path):
    out, found = compared
    result = CliRunner().invoke(
        main, ["diff", str(folders[2]), str(other), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    for line in summary(found):
        assert line in result.stdout
    counts = found.record["latents"]
    assert sum(counts["a"].values()) == 48
    assert sum(counts["b"].values()) == 40
    [[by_sql]] = duckdb.sql(
        f"SELECT count(DISTINCT latent_a) FROM '{out}/matches.parquet' WHERE class = 'same'"
    ).fetchall()
    assert by_sql == counts["a"]["same"]
    record = json.loads((out / "matches.json").read_text())
    assert record["a"]["sae_digest"] == SAE.load(folders[1]).digest
    message = refusal("diff", folders[2], other, "--out", tmp_path / "out")
    assert "holds something already" in message


def test_other_rows_are_refused_in_a_sentence(folders, other, tmp_path, monkeypatch):
    a, b = Side.open(folders[2]), Side.open(other)
    tokens, digest = ActivationStore.tokens, ActivationStore.digest
    theirs = ActivationStore.open(folders[0])
    object.__setattr__(b, "store", theirs)
    monkeypatch.setattr(
        ActivationStore,
        "digest",
        property(lambda self: "other" if self is theirs else digest.fget(self)),
    )
    assert common_rows(a, b).n_rows == a.store.n_rows  # other activations of the same tokens

    def changed(self, first, last):
        return tokens(self, first, last) + (self is theirs)

    monkeypatch.setattr(ActivationStore, "tokens", changed)
    with pytest.raises(InputError, match="hold other texts, first in context 0"):
        common_rows(a, b)
    monkeypatch.setattr(
        ActivationStore,
        "context_length",
        property(lambda self: 16 if self is theirs else 32),
    )
    with pytest.raises(InputError, match="contexts of 32 and 16 tokens"):
        common_rows(a, b)
    with pytest.raises(RunError, match="no feature tables"):
        diff(folders[2], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
