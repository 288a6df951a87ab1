"""Scores of explanations against values worked out by hand, and against other code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_harvest.pipelines.explain.programs import LatentProgram
from sae_harvest.pipelines.explain.scores import Items, score_of
from tests.excerpts import excerpt


def items(truth, document=None):
    given = range(len(truth)) if document is None else document
    return Items(np.array(truth, float), np.array(list(given), np.int64))


def first(values):
    return pytest.approx(values[0])


def test_correlation_by_hand():
    # y = 0 1 2, s = 0 2 1: covariance 1/3, both variances 2/3
    assert first(items([0, 1, 2]).pearson(np.array([0.0, 2, 1]))) == 0.5
    assert items([0, 1, 2]).pearson(np.full(3, 7.0))[0] == 0
    assert np.isnan(items([3, 3, 3]).pearson(np.array([0.0, 2, 1]))[0])


def test_explained_variance_by_hand():
    # mean 1, variance 2/3; errors 1 0 1
    assert first(items([0, 1, 2]).explained_variance(np.array([1.0, 1, 1]))) == 0
    assert first(items([0, 1, 2]).explained_variance(np.array([0.0, 1, 2]))) == 1
    assert first(items([0, 1, 2]).explained_variance(np.array([2.0, 1, 0]))) == -3


def test_average_precision_by_hand():
    # in falling order: true, false, true → (1/1 + 2/3) / 2
    assert first(items([1, 0, 1]).auprc(np.array([0.9, 0.5, 0.1]))) == 5 / 6
    # ties are one threshold: precision 2/3 for both
    assert first(items([1, 0, 1]).auprc(np.zeros(3))) == 2 / 3
    assert np.isnan(items([0, 0]).auprc(np.zeros(2))[0])


def test_f1_and_balanced_accuracy_by_hand():
    told = np.array([True, True, False, False])
    some = items([1, 0, 1, 0])
    assert first(some.f1(told)) == 0.5
    assert first(some.balanced_accuracy(told)) == 0.5
    # one of one true item found, one of three false items told
    assert first(items([1, 0, 0, 0]).balanced_accuracy(told)) == (1 + 2 / 3) / 2
    assert np.isnan(items([1, 1]).balanced_accuracy(told[:2])[0])


def test_intervals_draw_documents_and_not_items():
    rng = np.random.default_rng(0)
    truth = rng.random(40)
    prediction = truth + rng.random(40)
    alone = score_of(items(truth).pearson(prediction))
    assert alone.low < alone.value < alone.high
    # each item ten times in one document is no more evidence
    many = items(np.repeat(truth, 10), np.repeat(np.arange(40), 10))
    again = score_of(many.pearson(np.repeat(prediction, 10)))
    assert again.value == pytest.approx(alone.value)
    assert (again.low, again.high) == pytest.approx((alone.low, alone.high))
    one = score_of(items(truth, [3] * 40).pearson(prediction))
    assert one.value == pytest.approx(alone.value)
    assert one.low is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=30))
def test_scores_agree_with_a_slow_computation(pairs):
    truth, prediction = np.array(pairs, float).T
    if (truth > 0).any():
        expected = 0.0
        for y, s in zip(truth, prediction, strict=True):
            if y > 0:
                above = prediction >= s
                expected += (truth[above] > 0).mean() / (truth > 0).sum()
        assert items(truth).auprc(prediction)[0] == pytest.approx(expected)
    if truth.std() > 0 and prediction.std() > 0:
        found = items(truth).pearson(prediction)[0]
        assert found == pytest.approx(np.corrcoef(truth, prediction)[0, 1], abs=1e-9)


def test_a_program_predicts_by_the_pattern_with_the_most_tokens():
    program = LatentProgram(
        "ngrams", "", 1.0, [(5,), (4, 5), (-1, 7), (3, -2, 5)], [1, 2, 3, 4], None
    )
    assert program.predict(excerpt([7, 5, 4, 5], starts_context=True)).tolist() == [3, 1, 0, 2]
    assert program.predict(excerpt([7, 5, 4, 5])).tolist() == [0, 1, 0, 2]
    # as many tokens as (4, 5), but longer
    assert program.predict(excerpt([3, 4, 5])).tolist() == [0, 0, 4]
