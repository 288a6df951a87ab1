"""Two SAEs side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.viewer.compare import Comparison, nearest_rows
from sae_harvest.pipelines.viewer.tables import Tables
from tests.made_tables import word_of, write_sae, write_tables


def test_nearest_rows_are_those_of_every_pair():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2500, 8, generator=generator)  # more than a block
    others = torch.randn(300, 8, generator=generator)
    index, cosine = nearest_rows(rows, others)
    a, b = rows.double().numpy(), others.double().numpy()
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    assert np.array_equal(index, (a @ b.T).argmax(axis=1))
    assert np.allclose(cosine, (a @ b.T).max(axis=1), atol=1e-6)


def compared(tmp_path, width=16):
    ours, theirs = write_sae(tmp_path / "x", 40, 16), write_sae(tmp_path / "y", 24, width, seed=1)
    a = write_tables(tmp_path / "a", 40, sae=str(tmp_path / "x"), sae_digest=ours.digest)
    b = write_tables(tmp_path / "b", 24, seed=1, sae=str(tmp_path / "y"), sae_digest=theirs.digest)
    return Tables(a), Tables(b)


def test_a_comparison_lists_pairs_by_their_cosine(tmp_path):
    ours, theirs = compared(tmp_path)
    comparison = Comparison(ours, theirs)
    best = comparison.rows(True, None, None, 0, 100)
    cosines = [r["cosine"] for r in best["rows"]]
    assert best["total"] == 40
    assert cosines == sorted(cosines, reverse=True)
    first = best["rows"][0]
    assert first["ours"]["tokens"][0] == word_of(first["latent"])
    middle = comparison.rows(False, cosines[30], cosines[20], 0, 100)
    assert middle["total"] == 11
    assert comparison.of(first["latent"])["other"] == first["other"]
    assert sum(comparison.overview()["cosines"]["counts"]) == 40


def test_what_two_tables_do_not_share_is_said(tmp_path):
    ours, theirs = compared(tmp_path)
    (texts,) = Comparison(ours, theirs).overview()["differences"]  # stores of other digests
    assert (
        "only be compared if both stores hold the same texts; cosines can be compared anyway"
        in texts
    )
    theirs.run |= {"store_digest": ours.run["store_digest"]}
    assert Comparison(ours, theirs).overview()["differences"] == []
    theirs.run |= {"site": "resid_post.9", "model": "another"}
    model, site = Comparison(ours, theirs).overview()["differences"]
    assert "made-up and another" in model
    assert "resid_post.1 and resid_post.9" in site


def test_saes_of_different_width_or_another_than_the_tables_are_not_compared(tmp_path):
    ours, theirs = compared(tmp_path, width=8)
    with pytest.raises(InputError, match=r"16 dimensions .* 8; compare SAEs of one site"):
        Comparison(ours, theirs)
    write_sae(tmp_path / "y", 24, 16, seed=5)
    with pytest.raises(RunError, match="holds another SAE"):
        Comparison(ours, theirs)
