"""Scores and fits of probes with several features, against definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_harvest.pipelines.evaluate.probing.examples import ROWS, Examples
from sae_harvest.pipelines.evaluate.probing.logistic import PENALTIES, Probe, fit_probe
from sae_harvest.pipelines.evaluate.probing.scores import drawn_clusters, scores_of
from sae_harvest.pipelines.evaluate.probing.sparse import (
    ALL,
    CHANNELS,
    MEAN_DIFFERENCE,
    PER_CLASS,
    dense_probes,
    drawn_only,
    principal_components,
    samples,
    sparse_probes,
)


def slow_scores(odds: np.ndarray, y: np.ndarray, weight: np.ndarray) -> list[float]:
    """AUC, F1 and accuracy of weighted examples, pair by pair."""
    won = total = 0.0
    for i in np.flatnonzero(y == 1):
        for j in np.flatnonzero(y == 0):
            pair = weight[i] * weight[j]
            total += pair
            won += pair * ((odds[i] > odds[j]) + 0.5 * (odds[i] == odds[j]))
    called = odds > 0
    tpr = weight[(y == 1) & called].sum() / weight[y == 1].sum()
    fpr = weight[(y == 0) & called].sum() / weight[y == 0].sum()
    precision = tpr / (tpr + fpr)
    return [won / total, 2 * precision * tpr / (precision + tpr), (tpr + 1 - fpr) / 2]


def test_scores_by_hand():
    odds = np.array([3.0, 1, 1, -2, -2, 0])
    y = np.array([1, 1, 0, 0, 1, 0], np.uint8)
    found = scores_of(odds, y, np.arange(6), np.ones((1, 256)))
    # pairs won: 3 over all three, 1 over two and a tie, -2 a tie
    assert found.values[0] == pytest.approx((3 + 2.5 + 0.5) / 9)
    # two of three positives and one of three negatives are called positive
    assert found.values[1] == pytest.approx(2 * 2 / 3 / (1 + 2 / 3 + 1 / 3))
    assert found.values[2] == pytest.approx((2 / 3 + 2 / 3) / 2)
    np.testing.assert_allclose(found.resampled[0], found.values)


def test_scores_and_their_resamples_are_those_of_weighted_examples():
    rng = np.random.default_rng(0)
    n = 60
    odds = np.round(rng.standard_normal(n), 1)  # with ties
    y, cluster = rng.integers(0, 2, n).astype(np.uint8), rng.integers(0, 20, n)
    drawn = drawn_clusters(np.arange(256) < 20)
    assert (drawn.sum(1) == 20).all()
    found = scores_of(odds, y, cluster, drawn)
    np.testing.assert_allclose(found.values, slow_scores(odds, y, np.ones(n)), atol=1e-12)
    for number in (0, 5):
        expected = slow_scores(odds, y, drawn[number][cluster])
        np.testing.assert_allclose(found.resampled[number], expected, atol=1e-12)
    low, high = found.limits
    assert (low < found.values).all()
    assert (found.values < high).all()


def test_a_probe_minimises_the_penalised_loss():
    rng = np.random.default_rng(1)
    n, d = 80, 5
    x = rng.standard_normal((n, d)) * [1, 10, 0.1, 1, 1] + [0, 5, 0, 0, 0]
    x[:, 4] = 2.5  # constant
    y = (rng.random(n) < 1 / (1 + np.exp(-x[:, 0] - x[:, 2] * 10))).astype(np.uint8)
    weight, cluster = rng.random(n) + 0.5, rng.integers(0, 256, n)
    probe = fit_probe(x, y, weight, cluster)
    assert probe.penalty in PENALTIES
    assert probe.weights[4] == 0
    w = torch.zeros(d + 1, dtype=torch.float64, requires_grad=True)
    share = weight / weight.sum()
    spread = np.sqrt(share @ np.square(x - share @ x))
    spread[4] = 1
    given, labels = torch.tensor((x - share @ x) / spread), torch.tensor(y.astype(float))
    optimizer = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        odds = given @ w[:-1] + w[-1]
        each = torch.nn.functional.binary_cross_entropy_with_logits(odds, labels, reduction="none")
        total = (torch.tensor(share) * each).sum() + probe.penalty / 2 * w[:-1].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    expected = (given @ w[:-1] + w[-1]).detach().numpy()
    np.testing.assert_allclose(probe.log_odds(x), expected, atol=1e-4)


def test_more_features_than_examples_give_the_same_probe_as_rotated_ones():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((30, 40))
    y, cluster = (np.arange(30) % 2).astype(np.uint8), np.arange(30)
    many = fit_probe(x, y, np.ones(30), cluster)
    assert np.isfinite(many.weights).all()
    again = fit_probe(x[:, ::-1], y, np.ones(30), cluster)
    np.testing.assert_allclose(many.weights, again.weights[::-1], atol=1e-8)


def made_examples(n: int = 4000) -> tuple[Examples, np.ndarray]:
    """Rows of 200 documents; channel 3 tells the classes of the first task, none the second's."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, 6)).astype(np.float32)
    codes = np.stack([x[:, 3] + rng.standard_normal(n) > 1, rng.random(n) < 0.5], 1).astype(
        np.uint8
    )
    cluster = rng.integers(0, 200, n)
    every = np.arange(n)
    found = Examples(
        ROWS, ("told", "random"), codes, cluster % 2 == 0, cluster, every.astype(np.int32),
        np.ones(n, np.int64), every,
    )  # fmt: skip
    return found, x


def test_samples_are_balanced_where_there_are_enough_examples():
    examples, _ = made_examples()
    drawn = samples(examples, seed=0)
    for t, sample in enumerate(drawn):
        assert (np.diff(sample.examples) > 0).all()
        assert (sample.y == examples.codes[sample.examples, t]).all()
        for test in (False, True):
            for c in (0, 1):
                there = ((examples.codes[:, t] == c) & (examples.test == test)).sum()
                taken = ((sample.y == c) & (sample.test == test)).sum()
                assert taken == min(PER_CLASS, there)
    again = samples(examples, seed=0)
    assert all((a.examples == b.examples).all() for a, b in zip(drawn, again, strict=True))
    numbers, few, placed = drawn_only(examples, drawn)
    for t, (sample, at) in enumerate(zip(drawn, placed, strict=True)):
        assert (numbers[at.examples] == sample.examples).all()
        assert (few.codes[at.examples, t] == sample.y).all()
        assert (few.codes[:, t] != 2).sum() == len(sample.y)


def test_probes_find_what_tells_the_classes_and_nothing_in_noise():
    examples, x = made_examples()
    drawn = samples(examples, seed=0)
    numbers, few, drawn = drawn_only(examples, drawn)
    x = x[numbers]
    order = np.array([[3, 0, 1, 2, 4], [0, 1, 2, 3, 4]])
    columns = {CHANNELS: dict(enumerate(x.T))}
    found = list(sparse_probes(few, drawn, {CHANNELS: order}, columns))
    kinds = [(p.task, len(p.features)) for p in found]
    assert kinds == [(0, 1), (0, 2), (0, 5), (1, 1), (1, 2), (1, 5)]
    assert found[0].scores.values[0] == pytest.approx(0.86, abs=0.04)
    assert found[0].probe.weights[0] > 0
    for probe in found[3:]:
        low, high = probe.scores.limits
        assert low[0] < 0.55
        assert high[0] > 0.5
    dense = {(p.task, p.method): p for p in dense_probes(few, drawn, x)}
    assert dense[0, ALL].scores.values[0] == pytest.approx(found[0].scores.values[0], abs=0.02)
    direction = dense[0, MEAN_DIFFERENCE].probe
    assert isinstance(direction, Probe)
    assert np.argmax(np.abs(direction.weights)) == 3


def test_principal_components_are_those_of_training_examples():
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((300, 4)) * [1, 9, 3, 0.1] + 5).astype(np.float32)
    train = np.arange(300) < 200
    found = principal_components(x, train)
    centred = found[train]
    np.testing.assert_allclose(centred.mean(0), 0, atol=1e-4)
    spread = centred.std(0)
    assert (np.diff(spread) < 0).all()
    assert np.corrcoef(found[:, 0], x[:, 1])[0, 1] ** 2 > 0.99
    np.testing.assert_allclose(np.cov(centred.T, bias=True), np.diag(spread**2), atol=1e-3)
