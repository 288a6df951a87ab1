"""Which latents are called alike, against plain loops over a dense float64 matrix."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_harvest.pipelines.features.counting.neighbours import (
    MAX_PAIRS,
    counted_rows,
    counted_share,
    decoder_neighbours,
    neighbours,
)
from sae_harvest.pipelines.features.encoding.firings import Blocks, Firings, publish
from sae_harvest.store.objects import LocalObjects
from tests.feature_cases import (
    CONFIG,
    LENGTH,
    N_LATENTS,
    made_case,
    sparse_case,
    weights_of,
    whole_pass,
)


@pytest.mark.parametrize(("n", "share"), [(1, 1.0), (3, 1.0), (20, 1.0), (3, 0.3)])
def test_neighbours_are_the_nearest_over_all_pairs(tmp_path: Path, n: int, share: float) -> None:
    case = made_case()
    config = CONFIG.model_copy(update={"n_neighbours": n})
    table = whole_pass(case, tmp_path, config, 4, 3, share).tables["neighbours"].to_pylist()
    fires = (case.dense > 0)[counted_rows(0, case.n_rows, LENGTH, share)]
    unit = weights_of(N_LATENTS)["W_dec"].astype(float)
    unit /= np.sqrt((unit**2).sum(axis=1, keepdims=True))
    expected = {}
    for i in range(N_LATENTS):
        other = [j for j in range(N_LATENTS) if j != i]
        both = {j: int((fires[:, i] & fires[:, j]).sum()) for j in other}
        either = {j: int((fires[:, i] | fires[:, j]).sum()) for j in other}
        alike = sorted(other, key=lambda j: -unit[i] @ unit[j])[:n]
        along = [j for j in other if both[j]]
        along = sorted(along, key=lambda j: (-both[j] / either[j], j))[:n]
        for j in {*alike, *along}:
            expected[i, j] = (
                both[j],
                both[j] / max(either[j], 1),
                alike.index(j) if j in alike else None,
                along.index(j) if j in along else None,
            )
    assert [(r["latent"], r["other"]) for r in table] == sorted(expected)  # each pair once
    for row in table:
        cofire, jaccard, cosine_rank, cofire_rank = expected[row["latent"], row["other"]]
        assert row["cofire"] == cofire
        assert row["jaccard"] == pytest.approx(jaccard, rel=1e-12)
        assert (row["cosine_rank"], row["cofire_rank"]) == (cosine_rank, cofire_rank)
        cosine = unit[row["latent"]] @ unit[row["other"]]
        assert row["decoder_cosine"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n_latents", [300, 70_000])
def test_latents_of_uneven_density_are_counted_exactly(tmp_path: Path, n_latents: int) -> None:
    rng, n_rows = np.random.default_rng(0), 100 * LENGTH
    weight = 1 / np.arange(1, n_latents + 1)
    fires = [
        np.unique(rng.choice(n_latents, rng.integers(1, 40), p=weight / weight.sum()))
        for _ in range(n_rows)
    ]
    row = np.repeat(np.arange(n_rows), [len(latents) for latents in fires]).astype(np.int32)
    order = np.argsort(latent := np.concatenate(fires), kind="stable")
    starts = np.searchsorted(latent[order], np.arange(n_latents + 1))
    firings = Firings(0, 0, starts, row[order], np.ones(len(row), np.float32))
    publish(LocalObjects(tmp_path), 0, firings)
    blocks = Blocks(tmp_path, n_rows, n_rows, n_latents)
    found = neighbours(blocks, LENGTH, None, 5, 1.0, 20, 220)
    fired = Counter(latent.tolist())
    for own in range(20, 220):
        both = Counter(j for latents in fires if own in latents for j in latents.tolist())
        index = {j: n / (fired[own] + fired[j] - n) for j, n in both.items() if j != own}
        along = sorted(index, key=lambda j: (-index[j], j))[:5]
        assert found.along[own - 20, : len(along)].tolist() == along
        assert (found.along[own - 20, len(along) :] == -1).all()
        together = [both[j] for j in along]
        assert found.along_together[own - 20, : len(along)].tolist() == together


def test_of_latents_that_fire_together_alike_the_lower_are_nearest(tmp_path: Path) -> None:
    alike = sparse_case(9, np.arange(8), np.ones(8, np.float32))
    (near,) = whole_pass(alike, tmp_path).near
    assert near.along.tolist() == [[j for j in range(9) if j != i][:3] for i in range(9)]


def test_counted_contexts_are_evenly_spaced_and_the_same_block_by_block() -> None:
    assert counted_rows(0, 320, 16, 1.0).all()
    for share in (0.3, 0.5, 0.01, 1e-6):
        rows = counted_rows(0, 16_000, 16, share)
        contexts = rows.reshape(-1, 16)
        assert (contexts.all(axis=1) == contexts.any(axis=1)).all()
        chosen = np.flatnonzero(contexts[:, 0])
        assert len(chosen) == int(1000 * share + 1e-9)
        assert len(chosen) < 2 or set(np.diff(chosen)) <= {int(1 / share), int(1 / share) + 1}
        parts = [counted_rows(low, low + 1600, 16, share) for low in range(0, 16_000, 1600)]
        assert (np.concatenate(parts) == rows).all()
    assert counted_share(0, 0) == counted_share(10**6, 10**6) == 1
    assert counted_share(32 * 10**9, 10**9) == pytest.approx(MAX_PAIRS / (32**2 * 10**9))


@pytest.mark.parametrize("n_latents", [1, 2, 5, 1500])
def test_decoder_neighbours_are_the_nearest_by_cosine(n_latents: int) -> None:
    W_dec = torch.randn(n_latents, 12, generator=torch.Generator().manual_seed(0)) * 3
    latents = decoder_neighbours(W_dec, 0, n_latents, 4)
    n = min(4, n_latents - 1)
    assert latents.shape == (n_latents, n)
    unit = W_dec.double().numpy()
    unit /= np.sqrt((unit**2).sum(axis=1, keepdims=True))
    for i in range(0, n_latents, max(1, n_latents // 50)):
        order = [j for j in np.argsort(-(unit @ unit[i])) if j != i][:n]
        assert latents[i].tolist() == order
        assert decoder_neighbours(W_dec, i, i + 1, 4)[0].tolist() == order


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-3])
def test_decoder_neighbours_are_the_nearest_among_many_that_are_close(apart: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(200, 64, generator=generator)
    W_dec[:100] = W_dec[0] + apart * W_dec[:100]
    unit = W_dec.double().numpy()
    unit /= np.sqrt((unit**2).sum(axis=1, keepdims=True))
    found = decoder_neighbours(W_dec, 0, 200, 10)
    for i in range(200):
        similarity = unit @ unit[i]
        assert i not in found[i]
        assert len(set(found[i].tolist())) == 10
        similarity[i] = -1
        # as near as the nearest, to the last bits of float32
        np.testing.assert_allclose(similarity[found[i]], np.sort(similarity)[:-11:-1], atol=1e-6)
    same = decoder_neighbours(torch.ones(30, 4), 0, 30, 5)  # not even itself is nearest
    assert all(len({i, *line}) == 6 for i, line in enumerate(same.tolist()))
