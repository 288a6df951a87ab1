"""One-feature logistic regression: closed forms, infima, and a slow independent optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sae_harvest.pipelines.evaluate.probing.losses import cross_entropy, log_odds
from sae_harvest.pipelines.evaluate.probing.newton import (
    ABSENT,
    BIAS,
    LOSS,
    MAX_STEPS,
    STEPS,
    THRESHOLD,
    WEIGHT,
    fit_all,
)


def fits_of(z, y, class_weights=(1.0, 1.0), limit=np.inf) -> np.ndarray:
    """The fits [latents, 5] of dense columns z [examples, latents] to labels y, which may be 2."""
    z, y = np.asarray(z, np.float32), np.asarray(y, np.uint8)
    z = z.reshape(len(y), -1)
    columns = [np.flatnonzero(column) for column in z.T]
    starts = np.cumsum([0, *map(len, columns)])
    example = np.concatenate(columns).astype(np.int32)
    value = np.concatenate([z[rows, i] for i, rows in enumerate(columns)])
    counts = np.array([[(y == 0).sum(), (y == 1).sum()]])
    weights = np.array([class_weights])
    limits = np.array([limit])
    return fit_all(starts, example, value, y[:, None], counts, weights, limits)[:, 0]


def entropy(*counts: float) -> float:
    """Nats per example of a split of examples by class."""
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts if c)


def slow_optimum(z, y, class_weights=(1.0, 1.0)) -> float:
    """The loss by another method: L-BFGS on all examples, zeros too."""
    x = torch.tensor(np.asarray(z, np.float64))
    labels = torch.tensor(np.asarray(y, np.float64))
    weight = torch.tensor(class_weights, dtype=torch.float64)[labels.long()]
    x = x / x.abs().max()
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        odds = parameters[0] * x + parameters[1]
        each = torch.nn.functional.binary_cross_entropy_with_logits(odds, labels, reduction="none")
        mean = (weight * each).sum() / weight.sum()
        mean.backward()
        return mean

    optimizer.step(loss)
    return loss().item()


def test_a_binary_feature_has_the_optimum_of_its_2x2_table():
    # feature 0: 3 negative, 5 positive; feature 1: 8 negative, 4 positive
    z = [0] * 8 + [1] * 12
    y = [0] * 3 + [1] * 5 + [0] * 8 + [1] * 4
    [fit] = fits_of(z, y)
    assert fit[LOSS] == pytest.approx((8 * entropy(3, 5) + 12 * entropy(8, 4)) / 20, abs=1e-12)
    assert fit[BIAS] == pytest.approx(math.log(5 / 3), abs=1e-6)
    assert fit[WEIGHT] == pytest.approx(math.log(4 / 8) - math.log(5 / 3), abs=1e-6)
    [tripled] = fits_of(np.multiply(z, 3), y)
    assert tripled[LOSS] == pytest.approx(fit[LOSS], abs=1e-12)
    assert tripled[WEIGHT] == pytest.approx(fit[WEIGHT] / 3, abs=1e-6)


def test_a_feature_that_separates_has_loss_0_and_the_threshold_between():
    [fit] = fits_of([0, 0, 1, 3, 4], [0, 0, 0, 1, 1])
    assert fit[[LOSS, BIAS, THRESHOLD]].tolist() == [0, 0, 2]
    assert fit[WEIGHT] == np.inf
    [fit] = fits_of([0, 0, 1, 3, 4], [1, 1, 1, 0, 0])
    assert (fit[LOSS], fit[WEIGHT], fit[THRESHOLD]) == (0, -np.inf, 2)


def test_a_latent_that_fires_on_one_class_only_has_the_infimum_of_its_zeros():
    # it fires on 2 of 6 positive examples and on no negative one
    z, y = [0.5, 2] + [0] * 8, [1, 1] + [1] * 4 + [0] * 4
    [fit] = fits_of(z, y)
    assert fit[LOSS] == pytest.approx(8 / 10 * entropy(4, 4), abs=1e-12)
    assert (fit[WEIGHT], fit[THRESHOLD], fit[BIAS]) == (np.inf, 0, 0)
    [fit] = fits_of(z, 1 - np.array(y))
    assert fit[LOSS] == pytest.approx(8 / 10 * entropy(4, 4), abs=1e-12)
    assert fit[WEIGHT] == -np.inf
    assert slow_optimum(z, y) == pytest.approx(8 / 10 * entropy(4, 4), abs=1e-4)


def test_classes_that_meet_at_a_value_have_its_entropy():
    [fit] = fits_of([1, 2, 3, 3, 3, 4], [0, 0, 0, 1, 1, 1])
    assert fit[LOSS] == pytest.approx(3 / 6 * entropy(1, 2), abs=1e-12)
    assert (fit[WEIGHT], fit[THRESHOLD]) == (np.inf, 3)
    assert fit[BIAS] == pytest.approx(math.log(2))


@pytest.mark.parametrize("value", [0, 2.5, -1])
def test_a_constant_feature_is_the_constant_predictor(value):
    [fit] = fits_of([value] * 10, [0] * 7 + [1] * 3)
    assert fit[LOSS] == pytest.approx(entropy(7, 3), abs=1e-12)
    assert fit[WEIGHT] == 0
    assert fit[BIAS] == pytest.approx(math.log(3 / 7))


def test_one_example_that_overlaps_gives_a_finite_optimum_that_is_reached():
    z = np.concatenate([np.zeros(500), np.linspace(1, 2, 500)])
    y = np.concatenate([np.zeros(500), np.ones(500)]).astype(int)
    y[[3, -4]] = 1, 0
    [fit] = fits_of(z, y)
    assert np.isfinite(fit[WEIGHT])
    assert fit[STEPS] < MAX_STEPS
    assert fit[LOSS] == pytest.approx(slow_optimum(np.float32(z), y), abs=1e-8)


def test_random_features_reach_the_optimum_of_a_slow_method():
    rng = np.random.default_rng(0)
    n, latents = 120, 40
    z = rng.gamma(1, 2, (n, latents)) * (rng.random((n, latents)) < rng.random(latents))
    z[:, ::5] -= 1.5  # as channels: both signs
    z[:, 1::5] *= 1e-4
    z[:, 2::5] *= 1e5
    y = (rng.random(n) < 1 / (1 + np.exp(1 - z[:, 3]))).astype(int)
    for class_weights in ((1.0, 1.0), (0.3, 2.5)):
        fits = fits_of(z, y, class_weights)
        assert fits[:, STEPS].max() < 30
        for column, fit in zip(np.float32(z).T, fits, strict=True):
            if column.any() and np.isfinite(fit[WEIGHT]):
                assert fit[LOSS] == pytest.approx(slow_optimum(column, y, class_weights), abs=1e-8)


def test_a_limit_leaves_out_only_latents_whose_loss_exceeds_it():
    rng = np.random.default_rng(3)
    z = rng.gamma(1, 1, (200, 30)) * (rng.random((200, 30)) < np.linspace(0, 1, 30))
    y = (z[:, -3] > 1).astype(int)
    fits = fits_of(z, y)
    limit = np.median(fits[:, LOSS]) / 2
    limited = fits_of(z, y, limit=limit)
    left_out = np.isinf(limited[:, LOSS])
    assert left_out.sum() > 5
    assert (fits[left_out, LOSS] > limit).all()
    np.testing.assert_array_equal(limited[~left_out], fits[~left_out])


def test_examples_outside_the_task_do_not_count():
    rng = np.random.default_rng(1)
    z, y = rng.gamma(1, 1, 60), rng.integers(0, 3, 60)
    assert (y == ABSENT).any()
    inside = y != ABSENT
    np.testing.assert_array_equal(fits_of(z, y), fits_of(z[inside], y[inside]))


def test_a_scored_fit_repeats_the_loss_of_the_kernel():
    rng = np.random.default_rng(2)
    z = np.float32(rng.gamma(1, 1, (50, 8)) * (rng.random((50, 8)) < 0.3))
    y = rng.integers(0, 2, 50).astype(np.uint8)
    z[:, 6], z[:, 7] = y * z[:, 6], y + 1.0  # one-sided, separated
    for column, fit in zip(z.T, fits_of(z, y), strict=True):
        losses = cross_entropy(log_odds(column.astype(float), fit), y, 0.0)
        assert losses.mean() == pytest.approx(fit[LOSS], abs=1e-9)


def test_other_examples_have_a_bounded_loss():
    fit = np.array([0.0, np.inf, 0.0, 1.0, 0])
    odds = log_odds(np.array([0.0, 2.0, 1.0]), fit)
    assert odds.tolist() == [-np.inf, np.inf, 0]
    losses = cross_entropy(odds, np.array([1, 1, 1], np.uint8), 0.01)
    np.testing.assert_allclose(losses, [-math.log(0.01), -math.log(0.99), math.log(2)])
