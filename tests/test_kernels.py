"""Kernels against the dense float64 formulas, for pairs of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
import xxhash

from sae_harvest.train.sae.kernels import AdamNumbers, Gradients, Pairs
from sae_harvest.train.sae.kernels.cpu import CpuKernels
from sae_harvest.train.sae.kernels.torch_ops import TorchKernels
from tests.kernel_oracle import pair_gradients


class WithoutShortProducts(CpuKernels):
    """As on a processor that multiplies 8-bit integers slowly."""

    def __init__(self):
        super().__init__()
        self._short = False


BACKENDS = [CpuKernels, WithoutShortProducts, TorchKernels]
SHAPES = [(37, 24, 777), (5, 1, 3), (130, 33, 1030), (64, 80, 64), (1, 700, 129)]
SHAPES_OF_PAIRS = [
    (90, 24, 24, 200, 7),
    (40, 33, 17, 65, 5),
    (3, 1, 2, 4, 4),
    (700, 16, 16, 12, 9),  # so many pairs a latent that rows are taken some at a time
]


@pytest.fixture(params=BACKENDS)
def kernels(request):
    return request.param()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(n_latents, width, seed=0):
    return torch.nn.functional.normalize(normal(n_latents, width, seed=seed))


def some_pairs(batch, n_latents, width, seed=0, share=0.7):
    """Distinct latents of each row, some places without a pair, the second row without any."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, n_latents, generator=generator).argsort(dim=1)[:, :width].int()
    order[torch.rand(batch, width, generator=generator) > share] = -1
    if batch > 1:
        order[1] = -1
    return order


def assert_close(got, expected, tolerance=1e-5):
    scale = max(float(expected.norm()), 1e-30)
    assert (got.double() - expected).norm() / scale < tolerance


# choosing


@pytest.mark.parametrize("shape", SHAPES)
def test_chosen_hold_the_largest(kernels, shape):
    batch, d_in, n_latents = shape
    x, weight, bias = normal(batch, d_in), normal(n_latents, d_in, seed=2), normal(n_latents)
    k = max(1, n_latents // 16)
    low = kernels.low_precision(weight)
    chosen = kernels.choose(x, low, bias, low.candidates(k))
    assert chosen.dtype == torch.int32
    best = (x.double() @ weight.double().T + bias).topk(k, dim=1).indices
    for row in range(batch):
        assert len(set(chosen[row].tolist())) == low.candidates(k)
        assert set(best[row].tolist()) <= set(chosen[row].tolist())


@pytest.mark.parametrize("count", [1, 31, 32, 33, 500, 2100, 3000])
def test_any_number_can_be_chosen(count):
    kernels = WithoutShortProducts()
    x, weight, bias = normal(70, 16), normal(3000, 16, seed=2), normal(3000)
    chosen = kernels.choose(x, kernels.low_precision(weight), bias, count)
    best = (x @ weight.T + bias).topk(count, dim=1).indices
    assert torch.equal(chosen.long(), best.sort(dim=1).values)


def test_equal_preactivations_choose_the_lower_index():
    kernels = CpuKernels()
    zeros = torch.zeros(5000, 8)
    for bias in (torch.zeros(5000), torch.full((5000,), -torch.inf)):
        chosen = kernels.choose(torch.zeros(3, 8), kernels.low_precision(zeros), bias, 5)
        assert chosen.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_large_dimensions_do_not_spoil_the_choice():
    kernels = CpuKernels()
    x, weight = normal(200, 256), unit(4000, 256, seed=2)
    x[:, [3, 77]] *= 50
    low = kernels.low_precision(weight)
    chosen = kernels.choose(x, low, torch.zeros(4000), low.candidates(32))
    best = (x.double() @ weight.double().T).topk(32, dim=1).indices
    found = [np.isin(best[row], chosen[row]).mean() for row in range(200)]
    assert np.mean(found) > 0.9995


@pytest.mark.parametrize("shape", SHAPES)
def test_above_are_all_that_reach_their_floor_and_few_more(kernels, shape):
    batch, d_in, n_latents = shape
    x, weight, bias = normal(batch, d_in), normal(n_latents, d_in, seed=2), normal(n_latents)
    floor = d_in**0.5 * (1 + torch.rand(n_latents, generator=torch.Generator().manual_seed(4)))
    chosen = kernels.choose_above(x, kernels.low_precision(weight), bias, floor)
    exact = x.double() @ weight.double().T + bias
    assert chosen.dtype == torch.int32
    assert chosen.shape[1] == max(1, int((chosen >= 0).sum(1).max()))
    for row in range(batch):
        listed = chosen[row][chosen[row] >= 0].tolist()
        assert listed == sorted(set(listed))
        assert (chosen[row][len(listed) :] == -1).all()
        assert set((exact[row] >= floor).nonzero().flatten().tolist()) <= set(listed)
        slack = 0.15 * x[row].norm() * weight[listed].norm(dim=1)
        assert (exact[row][listed] >= floor[listed] - slack).all()


def test_above_may_be_none_or_all(kernels):
    x, weight, bias = normal(9, 16), normal(300, 16, seed=2), torch.zeros(300)
    low = kernels.low_precision(weight)
    none = kernels.choose_above(x, low, bias, torch.full((300,), 1e4))
    assert none.tolist() == [[-1]] * 9
    every = kernels.choose_above(x, low, bias, torch.full((300,), -1e4))
    assert every.tolist() == [list(range(300))] * 9


def test_rows_of_low_are_those_latents(kernels):
    x, weight, bias = normal(20, 16), normal(500, 16, seed=2), normal(500)
    some = torch.arange(3, 500, 7)
    part = kernels.low_precision(weight).rows(some)
    again = kernels.low_precision(weight[some])
    expected = kernels.choose(x, again, bias[some], 9).sort(dim=1).values
    assert torch.equal(kernels.choose(x, part, bias[some], 9).sort(dim=1).values, expected)


def test_refreshed_low_is_that_of_the_new_weight(kernels):
    x, weight, bias = normal(20, 16), normal(500, 16, seed=2), normal(500)
    low = kernels.low_precision(weight)
    weight.copy_(normal(500, 16, seed=3))
    kernels.refresh(low, weight)
    chosen = kernels.choose(x, low, bias, 9)
    expected = kernels.choose(x, kernels.low_precision(weight), bias, 9)
    assert torch.equal(chosen.sort(dim=1).values, expected.sort(dim=1).values)
    floor = torch.full((500,), 6.0)
    above = kernels.choose_above(x, low, bias, floor)
    assert torch.equal(above, kernels.choose_above(x, kernels.low_precision(weight), bias, floor))


# what is not a number


@pytest.mark.parametrize("harm", ["row", "infinite row", "weight", "bias"])
def test_what_is_not_finite_is_chosen_and_seen(kernels, harm):
    x, weight, bias = normal(6, 16), normal(300, 16, seed=2), normal(300)
    wrong = torch.inf if harm == "infinite row" else torch.nan
    {"row": x[2], "infinite row": x[2], "weight": weight[70], "bias": bias[70:71]}[harm][0] = wrong
    rows = [2] if "row" in harm else range(6)
    low = kernels.low_precision(weight)
    chosen = kernels.choose(x, low, bias, 10)
    _, values = kernels.exact(x, weight, bias, chosen.sort(dim=1).values, 8, relu=True)
    above = kernels.choose_above(x, low, bias, torch.full((300,), 5.0))
    pi = kernels.preactivations(x, weight, bias, above)
    for row in range(6):
        assert (~values[row].isfinite()).any() == (row in rows)
        assert (~pi[row][above[row] >= 0].isfinite()).any() == (row in rows)
    assert above.shape[1] < 100  # a row of NaN doesn't fill the memory


def test_gradients_show_what_is_not_a_number(kernels):
    weight, indices = unit(50, 8), some_pairs(6, 50, 4)
    error, x = normal(6, 8), normal(6, 8, seed=1)
    error[0, 3] = torch.nan
    indices[0, 0] = 7
    into = Gradients.like(weight, weight)
    pairs = Pairs(indices, normal(6, 4, seed=2))
    kernels.gradients(pairs, error, x, weight, into, add=False)
    assert into.squares[7].isnan()
    touched = set(indices[0][indices[0] >= 0].tolist())
    others = [latent for latent in range(50) if latent not in touched]
    assert into.squares[others].isfinite().all()


# exact values


@pytest.mark.parametrize("relu", [False, True])
def test_exact_values_are_the_largest_in_order(kernels, relu):
    x, weight, bias = normal(30, 17), normal(200, 17, seed=2), normal(200) - 5
    candidates = some_pairs(30, 200, 45, share=1.0)
    candidates[1] = torch.arange(45)
    candidates = candidates.sort(dim=1).values
    indices, values = kernels.exact(x, weight, bias, candidates, 11, relu)
    exact = (x.double() @ weight.double().T + bias).gather(1, candidates.long())
    best = exact.topk(11, dim=1)
    assert torch.equal(indices.long(), candidates.long().gather(1, best.indices))
    expected = best.values.clamp(min=0) if relu else best.values
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 4, 9])
def test_preactivations_are_exact_and_none_is_minus_infinity(kernels, width):
    x, weight, bias = normal(30, 17), normal(200, 17, seed=2), normal(200)
    indices = some_pairs(30, 200, width)
    pi = kernels.preactivations(x, weight, bias, indices)
    exact = (x.double() @ weight.double().T + bias).gather(1, indices.clamp(min=0).long())
    assert (pi[indices < 0] == -torch.inf).all()
    torch.testing.assert_close(pi[indices >= 0].double(), exact[indices >= 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 4, 9])
def test_decode_adds_the_weighted_rows(kernels, width):
    weight, indices, values = normal(200, 17), some_pairs(30, 200, width), normal(30, width)
    values[3] = 0
    out = normal(30, 17, seed=5)
    dense = torch.zeros(30, 201, dtype=torch.float64)
    dense.scatter_(1, torch.where(indices < 0, 200, indices).long(), values.double())
    expected = out.double() + dense[:, :200] @ weight.double()
    kernels.decode(indices, values, weight, out)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


# gradients


@pytest.mark.parametrize("kind", ["plain", "gain", "gain and extra"])
@pytest.mark.parametrize("shape", SHAPES_OF_PAIRS)
def test_gradients_equal_autograd_through_dense_latents(kernels, kind, shape):
    batch, d_in, d_out, n_latents, width = shape
    error, x, weight = normal(batch, d_out), normal(batch, d_in, seed=1), unit(n_latents, d_out)
    indices, values = some_pairs(batch, n_latents, width), normal(batch, width, seed=2)
    gain = extra = None
    if kind != "plain":
        gain = normal(batch, width, seed=3) * (torch.arange(width) % 3 > 0)
        values[:, 0] = 0  # of the third, neither a value nor a gain
    if kind == "gain and extra":
        extra = normal(batch, width, seed=4)
    pairs = Pairs(indices, values, gain, extra)
    into = Gradients.like(normal(n_latents, d_in), weight)
    for buffer in (into.enc, into.dec, into.bias, into.squares):
        buffer.fill_(torch.nan)  # whatever was there before must not matter
    slopes = torch.full((batch, width), torch.nan)
    counts = kernels.gradients(pairs, error, x, weight, into, add=False, slopes=slopes)
    oracle = pair_gradients(pairs, error, x, weight)
    for name in ("enc", "dec", "bias"):
        assert_close(getattr(into, name), getattr(oracle, name))
    assert_close(slopes, oracle.slopes)
    assert (slopes[indices < 0] == 0).all()
    assert_close(into.squares, oracle.enc.square().sum(1) + oracle.dec.square().sum(1))
    live = indices >= 0
    if gain is not None:
        live &= (values != 0) | (gain != 0)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, torch.bincount(indices[live].long(), minlength=n_latents))


def test_added_gradients_are_the_sum_and_leave_other_latents_alone(kernels):
    weight, error, x = unit(80, 12), normal(50, 12), normal(50, 20, seed=1)
    first = Pairs(some_pairs(50, 80, 6), normal(50, 6, seed=2))
    few = some_pairs(50, 80, 6, seed=9)
    second = Pairs(few.masked_fill(few % 2 == 1, -1), normal(50, 6, seed=3))
    into = Gradients.like(normal(80, 20), weight)
    kernels.gradients(first, error, x, weight, into, add=False)
    before = into.enc.clone(), into.dec.clone()
    kernels.gradients(second, 2 * error, x, weight, into, add=True)
    one = pair_gradients(first, error, x, weight)
    two = pair_gradients(second, 2 * error, x, weight)
    for name in ("enc", "dec", "bias"):
        assert_close(getattr(into, name), getattr(one, name) + getattr(two, name))
    assert_close(into.squares, into.enc.double().square().sum(1) + into.dec.square().sum(1))
    assert torch.equal(into.enc[1::2], before[0][1::2])
    assert torch.equal(into.dec[1::2], before[1][1::2])


def test_decoder_can_be_left_out(kernels):
    weight, error, x = unit(80, 12), normal(50, 12), normal(50, 12, seed=1)
    pairs = Pairs(some_pairs(50, 80, 6), normal(50, 6, seed=2))
    into = Gradients.like(weight, weight)
    into.dec.fill_(torch.nan)
    kernels.gradients(pairs, error, x, weight, into, add=False, decoder=False)
    assert (into.dec == 0).all()
    assert_close(into.enc, pair_gradients(pairs, error, x, weight).enc)
    assert_close(into.squares, into.enc.double().square().sum(1))


def test_no_pair_gives_no_gradient(kernels):
    weight, error, x = unit(30, 12), normal(5, 12), normal(5, 12, seed=1)
    pairs = Pairs(torch.full((5, 3), -1, dtype=torch.int32), normal(5, 3))
    into = Gradients.like(weight, weight)
    into.enc.fill_(1.0)
    counts = kernels.gradients(pairs, error, x, weight, into, add=False)
    assert not counts.any()
    assert not into.enc.any()
    assert not into.squares.any()


def test_active_pairs_are_those_with_a_value():
    indices = torch.tensor([[4, 2, 0]], dtype=torch.int32)
    pairs = Pairs.active(indices, torch.tensor([[2.0, 0.5, 0.0]]))
    assert pairs.indices.tolist() == [[4, 2, -1]]


def test_sums_by_latent(kernels):
    indices, terms = some_pairs(60, 40, 9), normal(60, 9)
    expected = torch.zeros(41, dtype=torch.float64)
    expected.index_add_(
        0, torch.where(indices < 0, 40, indices).flatten(), terms.double().flatten()
    )
    sums = kernels.latent_sums(indices, terms, 40)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected[:40], rtol=0, atol=1e-5)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_adam_equals_torch_adam(kernels, unit_rows):
    weight = unit(30, 12)
    parameter = torch.nn.Parameter(weight.double().clone())
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.999), eps=6.25e-10)
    first, second, average = torch.zeros(30, 12), torch.zeros(30, 12), weight.clone()
    expected_average = weight.double().clone()
    for step in range(1, 6):
        gradient = normal(30, 12, seed=step)
        parameter.grad = 0.25 * gradient.double()
        adam.step()
        if unit_rows:
            parameter.data /= parameter.data.norm(dim=1, keepdim=True)
        expected_average = 0.8 * expected_average + 0.2 * parameter.data
        numbers = AdamNumbers(
            scale=0.25,
            rate=0.01 / (1 - 0.9**step),
            beta1=0.9,
            beta2=0.999,
            root=(1 - 0.999**step) ** -0.5,
            eps=6.25e-10,
            keep=0.8,
        )
        kernels.adam(weight, gradient, first, second, average, numbers, unit_rows)
    torch.testing.assert_close(weight.double(), parameter.data, rtol=0, atol=1e-6)
    torch.testing.assert_close(average.double(), expected_average, rtol=0, atol=1e-6)


# the same bits

BITS = "from tests.test_kernels import bits; print(bits())"


def bits():
    """Digest of what all CPU kernels compute for the same input."""
    kernels = CpuKernels()
    x, weight, bias = normal(700, 40), unit(3000, 40), 0.1 * normal(3000)
    low = kernels.low_precision(weight)
    chosen = kernels.choose(x, low, bias, 30)
    indices, values = kernels.exact(x, weight, bias, chosen, 20, True)
    out = torch.zeros(700, 40)
    kernels.decode(indices, values, weight, out)
    above = kernels.choose_above(x, low, bias, torch.full((3000,), 2.0))
    into = Gradients.like(weight, weight)
    kernels.gradients(Pairs(indices, values), out, x, weight, into, add=False)
    pi = kernels.preactivations(x, weight, bias, above)
    sums = kernels.latent_sums(above, pi.clamp(min=0), 3000)
    state = xxhash.xxh3_128()
    for tensor in (chosen, indices, values, out, above, pi, into.enc, into.dec, into.squares, sums):
        state.update(tensor.contiguous().numpy().data)
    return state.hexdigest()


def test_results_are_the_same_bits_for_any_number_of_threads():
    threads = "2" if numba.get_num_threads() == 1 else "1"
    limits = {"NUMBA_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", BITS],
        env=os.environ | limits,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == bits() == bits()
