"""The numbers of one effect, from logits made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_harvest.pipelines.evaluate.ablation.effects import centred, effect_of


def sparsity(plain, changed):
    effect = effect_of(plain, changed, torch.zeros(len(plain), dtype=torch.int64))
    return (effect.l1 / effect.l2) ** 2 / plain.numel()


@pytest.mark.parametrize("vocabulary", [6, 7])
def test_one_moved_logit_gives_one_over_all_and_equal_moves_give_one(vocabulary):
    plain = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0)).double()
    one = torch.zeros_like(plain)
    one[2, 3] = 0.7
    assert sparsity(plain, plain + one) == pytest.approx(1 / (4 * vocabulary), rel=1e-9)
    if vocabulary % 2 == 0:
        equal = torch.tensor([1.0, -1.0] * (vocabulary // 2)).double().expand(4, -1)
        assert sparsity(plain, plain + equal) == pytest.approx(1, rel=1e-9)
        # a constant at each token changes no probability
        shift = torch.arange(4.0)[:, None]
        assert sparsity(plain, plain + equal + shift) == pytest.approx(1, rel=1e-9)


def test_the_median_of_an_even_number_is_between_the_middle_two():
    change = torch.tensor([[3.0, 0.0, 1.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    assert centred(change).tolist() == [[1.0, -2.0, -1.0, 7.0], [-1.5, -0.5, 0.5, 1.5]]
    assert centred(torch.tensor([[5.0, 1.0, 2.0]])).tolist() == [[3.0, -1.0, 0.0]]


def test_an_effect_is_that_of_the_formulas():
    plain = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).double())
    changed = torch.log(torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.2, 0.6]]).double())
    effect = effect_of(plain, changed, torch.tensor([0, 2]))
    assert effect.kl == pytest.approx((0.5 * np.log(2) + 0.25 * np.log(0.5)) / 2)
    assert effect.delta_ce == pytest.approx(np.log(2) / 2)
    assert effect.l1 == pytest.approx(2 * np.log(2))
    assert effect.l2 == pytest.approx(np.sqrt(2) * np.log(2))
    assert (effect.up_ids[0], effect.down_ids[0]) == (2, 0)
    assert effect.up_logits[0] == pytest.approx(np.log(2) / 2)
    assert effect.down_logits[0] == pytest.approx(-np.log(2) / 2)
