"""Recovery of known features: matching, firings, absorption, against values worked out by hand."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.evaluate.figures import Figure
from sae_harvest.pipelines.evaluate.reconstruction import HeldoutRows
from sae_harvest.pipelines.evaluate.synthetic.ideal import best_thresholds, ideal_sae
from sae_harvest.pipelines.evaluate.synthetic.matching import match
from sae_harvest.pipelines.evaluate.synthetic.recovery import (
    Recovery,
    recoveries,
    recovery_figures,
)
from sae_harvest.store.rules import RowRule
from sae_harvest.train import evaluate
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.evaluate import Fvu
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.synthetic.config import SyntheticConfig
from sae_harvest.train.synthetic.store import Synthetic, make
from sae_harvest.train.synthetic.truth import Features

RULE = RowRule(heldout_fraction=0.3, max_norm_medians=None)
N, D = 24, 24  # as many features as dimensions: a linear encoder can tell them apart


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """4,096 rows without noise."""
    config = SyntheticConfig(
        features=N, width=D, l0=2, parents=3, children=2, noise=0, rows=4096, correlation=0.1
    )
    return make(config, tmp_path_factory.mktemp("recovery"))


@pytest.fixture(scope="module")
def held_out(made: Synthetic) -> HeldoutRows:
    return HeldoutRows.of(made.store, config(N), RULE, 10_000)


@pytest.fixture(scope="module")
def ideal(made: Synthetic) -> SAE:
    return ideal_sae(made, RULE)


def config(n_latents: int, **fields) -> SAEConfig:
    known = {"d_in": D, "n_latents": n_latents, "activation": "relu", "site": "synthetic"}
    return SAEConfig.model_validate(known | {"rule": RULE} | fields)


def random_sae(n_latents: int = 40, seed: int = 0, **fields) -> SAE:
    known = config(n_latents, **fields)
    generator = torch.Generator().manual_seed(seed)
    shapes = SAE.shapes(known).items()
    return SAE(known, **{name: torch.randn(s, generator=generator) for name, s in shapes})


def chosen(sae: SAE, latents: np.ndarray) -> SAE:
    """The SAE with some of its latents, in the given order."""
    tensors = {
        name: tensor if name == "b_dec" else tensor[torch.from_numpy(latents)].contiguous()
        for name, tensor in sae.tensors().items()
    }
    fields = sae.config.model_copy(update={"n_latents": len(latents)})
    return SAE(fields, **tensors)


def values(recovery: Recovery) -> dict[str, float | None]:
    return {figure.metric: figure.value for figure in recovery.figures("SAE")}


def found_by(sae: SAE, made: Synthetic, held_out: HeldoutRows) -> dict[str, float | None]:
    return values(recoveries({"SAE": sae}, made, held_out)["SAE"])


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 6), (6, 4), (5, 5), (2, 7)])
def test_a_matching_is_the_best_of_all(shape):
    n, m = shape
    for seed in range(6):
        score = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        if seed == 0:
            score = np.round(score)  # many ties
        found = match(score)
        assert len({*found[found >= 0].tolist()}) == min(n, m) == (found >= 0).sum()
        total = score[found >= 0, found[found >= 0]].sum()
        wide = score if n <= m else score.T
        best = max(
            wide[np.arange(min(n, m)), list(columns)].sum()
            for columns in permutations(range(max(n, m)), min(n, m))
        )
        assert total == pytest.approx(best, abs=1e-5)


def test_a_large_matching_finds_what_was_shuffled():
    rng = np.random.default_rng(0)
    order = rng.permutation(300)[:200]
    score = rng.uniform(0, 0.9, (200, 300)).astype(np.float32)
    score[np.arange(200), order] += 1
    assert match(score).tolist() == order.tolist()
    assert match(np.ascontiguousarray(score.T))[order].tolist() == list(range(200))


def test_the_greedy_choice_is_not_taken_where_it_costs_more():
    score = np.array([[0.9, 0.8, 0.0], [0.85, 0.1, 0.0]], np.float32)
    assert match(score).tolist() == [1, 0]


def test_thresholds_are_the_best_of_all():
    rng = np.random.default_rng(1)
    pi = np.round(rng.standard_normal((60, 8)), 1)  # with ties
    fires = pi + rng.standard_normal(pi.shape) > 0.8
    fires[:, 7] = False
    found = best_thresholds(pi, fires)

    def f1(threshold: float, column: int) -> float:
        said, true = pi[:, column] > threshold, fires[:, column]
        return 2 * (said & true).sum() / max(1, said.sum() + true.sum())

    for column in range(7):
        best = max(f1(t, column) for t in [*pi[:, column], 0.0] if t >= 0)
        assert f1(found[column], column) >= best - 1e-12
    assert not (pi[:, 7] > found[7]).any()


def by_hand() -> Recovery:
    """Features 0, its child 1, and 2 along three axes; latents 0 to 3: 1, 0, nothing, 2 (60°)."""
    features = Features(
        np.eye(3, dtype=np.float32), np.array([-1, 0, -1]), np.array([0, -1, 0]), np.ones(3) / 4
    )
    sae = random_sae(4, d_in=3)
    sae.W_dec = torch.tensor([[0, 2.0, 0], [5, 0, 0], [0, 0, 0], [0, 0.75**0.5, 0.5]])
    return Recovery(sae, features)


def test_figures_worked_out_by_hand():
    recovery = by_hand()
    assert recovery.match.latent.tolist() == [1, 0, 3]
    assert np.allclose(recovery.match.cosine, [1, 1, 0.5])
    assert np.allclose(recovery.match.latent_max, [1, 1, 0, 0.75**0.5])
    true = np.array(
        [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]]
    )
    fires = [[0], [0, 1], [3], [1], [], [1, 3], [3], [3, 2]]  # latents
    indices, activations = np.zeros((8, 2), np.int32), np.zeros((8, 2), np.float32)
    for row, latents in enumerate(fires):
        indices[row, : len(latents)], activations[row, : len(latents)] = latents, 1
    cluster = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    for rows in (slice(0, 3), slice(3, 3), slice(3, 8)):
        recovery.update(indices[rows], activations[rows], true[rows] > 0, cluster[rows])
    # feature 0, latent 1: true in 5 rows, fired in 3, both in 2; feature 1, latent 0: 3, 2, 2;
    # feature 2, latent 3: 3, 4, 3
    assert recovery.firings.tolist() == [[2, 3, 5], [2, 2, 3], [3, 4, 3]]
    assert recovery.n_fire.tolist() == [2, 3, 1, 4]
    found = values(recovery)
    assert found == pytest.approx(
        {
            "matched_cosine": 2.5 / 3,
            "found_share": 2 / 3,
            "children_found": 1.0,
            "rare_found": 1.0,  # one of three, the first of equal frequency
            "feature_max_cosine": (2 + 0.75**0.5) / 3 - (0.75**0.5 - 0.5) / 3,
            "latent_max_cosine": (2 + 0.75**0.5) / 4,
            "precision": (2 / 3 + 1 + 3 / 4) / 3,
            "recall": (2 / 5 + 2 / 3 + 1) / 3,
            "f1": (4 / 8 + 4 / 5 + 6 / 7) / 3,
            "dead_share": 0.0,
            "absorption": 1
            / 2,  # rows 0 and 1 have both child and its latent; 0 lacks the parent's
            "parent_missed": 1 / 2,  # rows 3 and 4
        }
    )
    assert recovery.rows == 8


def test_what_is_not_defined_is_none():
    recovery = by_hand()
    found = values(recovery)
    assert found["matched_cosine"] == pytest.approx(2.5 / 3)
    for name in ("precision", "recall", "f1", "dead_share", "absorption", "parent_missed"):
        assert found[name] is None


def test_the_ideal_sae_finds_everything_where_it_can(made, held_out, ideal):
    found = found_by(ideal, made, held_out)
    for name in ("matched_cosine", "found_share", "precision", "recall", "f1"):
        assert found[name] == pytest.approx(1, abs=2e-3), name
    assert found["absorption"] == found["dead_share"] == 0
    fvu = Fvu(D)
    x = made.store.read("synthetic", 0, 2000).astype(np.float32)
    fvu.update(x, ideal(torch.from_numpy(x)).numpy())
    assert fvu.value == pytest.approx(0, abs=1e-4)


def test_the_order_of_latents_does_not_matter(made, held_out, ideal):
    order = np.random.default_rng(0).permutation(N)
    assert found_by(chosen(ideal, order), made, held_out) == pytest.approx(
        found_by(ideal, made, held_out)
    )


def test_a_removed_latent_is_missed(made, held_out, ideal):
    whole = found_by(ideal, made, held_out)
    kept = np.delete(np.arange(N), 4)
    recovery = recoveries({"SAE": chosen(ideal, kept)}, made, held_out)["SAE"]
    found = values(recovery)
    assert recovery.match.latent[4] == -1
    for name in ("matched_cosine", "found_share", "recall", "f1"):
        assert found[name] == pytest.approx(whole[name] - 1 / N, abs=2e-3), name
    assert found["precision"] == pytest.approx(1, abs=2e-3)  # of the latents that there are


def test_a_latent_silent_beside_its_children_is_absorbed(made, held_out, ideal):
    """The parent's latent is held down by its children's encoders, whose decoders write both."""
    changed = chosen(ideal, np.arange(N))
    parent = made.features.parent
    for child in np.flatnonzero(parent >= 0).tolist():
        changed.W_enc[parent[child]] -= 20 * ideal.W_enc[child]
        changed.b_enc[parent[child]] -= 20 * ideal.b_enc[child]
        changed.W_dec[child] += ideal.W_dec[parent[child]]
    found = found_by(changed, made, held_out)
    assert found["absorption"] == pytest.approx(1, abs=2e-3)
    assert found["parent_missed"] == pytest.approx(0, abs=2e-3)
    assert found["dead_share"] == 0
    assert found["matched_cosine"] < 0.95


def slowly(sae: SAE, made: Synthetic, held_out: HeldoutRows) -> dict[str, float]:
    """The figures from dense matrices, row by row and feature by feature."""
    features, rows = made.features, held_out.rows.tolist()
    decoder = sae.W_dec.double().numpy()
    cosine = features.directions @ (decoder / np.linalg.norm(decoder, axis=1, keepdims=True)).T
    latent = match(cosine.astype(np.float32)).tolist()
    true = {(row, feature) for shard in range(made.store.n_shards)
            for row, feature in zip(*(getattr(made.firings(shard), n).tolist()
                                      for n in ("row", "feature")), strict=True)}  # fmt: skip
    x = torch.from_numpy(made.store.read("synthetic", 0, made.store.n_rows)[rows]).float()
    dense = dict(zip(rows, (sae.encode_dense(x) > 0).tolist(), strict=True))
    f1, counts = [], {"absorbed": 0, "known": 0, "missed": 0, "alone": 0}
    for feature in range(N):
        said = [row for row in rows if dense[row][latent[feature]]]
        is_true = [row for row in rows if (row, feature) in true]
        both = len({*said} & {*is_true})
        f1.append(2 * both / (len(said) + len(is_true)))
    for row in rows:
        with_child = set()
        for child in np.flatnonzero(features.parent >= 0).tolist():
            if (row, child) in true:
                parent = features.parent[child]
                with_child.add(parent)
                counts["known"] += dense[row][latent[child]]
                counts["absorbed"] += dense[row][latent[child]] and not dense[row][latent[parent]]
        for parent in {*features.parent[features.parent >= 0].tolist()} - with_child:
            if (row, parent) in true:
                counts["alone"] += 1
                counts["missed"] += not dense[row][latent[parent]]
    return {
        "matched_cosine": float(np.mean([cosine[f, latent[f]] for f in range(N)])),
        "latent_max_cosine": float(cosine.max(0).mean()),
        "f1": float(np.mean(f1)),
        "absorption": counts["absorbed"] / counts["known"],
        "parent_missed": counts["missed"] / counts["alone"],
    }


def test_figures_are_those_of_a_slow_count(made, held_out):
    sae = random_sae()
    expected = slowly(sae, made, held_out)
    found = found_by(sae, made, held_out)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["absorption"] < 1


def test_batches_change_nothing(made, held_out, monkeypatch: pytest.MonkeyPatch):
    sae = random_sae()
    whole = list(recoveries({"SAE": sae}, made, held_out)["SAE"].figures("SAE"))
    monkeypatch.setattr(evaluate, "ENCODED_ROWS", 37)
    seen: list[tuple[int, int]] = []
    parts = recoveries({"SAE": sae}, made, held_out, lambda *done: seen.append(done))["SAE"]
    assert list(parts.figures("SAE")) == whole
    assert seen[0] == (37, len(held_out.rows))
    assert seen[-1] == (len(held_out.rows), len(held_out.rows))


def test_every_figure_stands_beside_its_baselines(made):
    found = recovery_figures(random_sae(), made)
    subjects = {figure.subject for figure in found}
    assert subjects == {"SAE", "random", "shuffled decoder", "PCA", "channels", "ideal"}
    by_metric: dict[str, list[Figure]] = {}
    for figure in found:
        by_metric.setdefault(figure.metric, []).append(figure)
    assert all({f.subject for f in figures} == subjects for figures in by_metric.values())
    for figure in found:
        assert figure.count > 0
        assert figure.value is not None
        if figure.metric != "dead_share":
            assert figure.low - 1e-9 <= figure.value <= figure.high + 1e-9, figure
    f1 = {figure.subject: figure.value for figure in by_metric["f1"]}
    assert f1["ideal"] > 0.99 > 0.5 > f1["random"]


def test_an_sae_of_other_rows_is_refused_in_a_sentence(made, tmp_path: Path):
    with pytest.raises(InputError, match=r"it has no site 'resid_post\.1'"):
        recovery_figures(random_sae(site="resid_post.1"), made)
    with pytest.raises(InputError, match="The SAE reads 7 dimensions and the rows of"):
        recovery_figures(random_sae(d_in=7), made)
    with pytest.raises(InputError, match="holds no row of a held-out document"):
        recovery_figures(random_sae(rule=RowRule(heldout_fraction=0)), made)
    with pytest.raises(InputError, match="holds no row of a training document"):
        ideal_sae(made, RowRule(heldout_fraction=1 - 1e-9))
