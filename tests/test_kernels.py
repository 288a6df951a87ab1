"""Kernels and the step against the dense float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import SAEConfig
from train.kernels import AdamNumbers
from train.kernels.cpu import CpuKernels
from train.kernels.oracle import dense_step
from train.kernels.torch_ops import TorchKernels
from train.sae import SAE
from train.step import Workspace, train_step

BACKENDS = [CpuKernels, TorchKernels]


def make_sae(n_latents, d_in, k, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    config = SAEConfig(
        d_in=d_in,
        n_latents=n_latents,
        k=k,
        site="resid_post.1",
        normalization="scale",
        input_scale=scale,
    )
    dec = torch.nn.functional.normalize(torch.randn(n_latents, d_in, generator=generator))
    enc = dec + 0.3 * torch.randn(n_latents, d_in, generator=generator) / d_in**0.5
    return SAE(
        config,
        W_enc=enc,
        W_dec=dec,
        b_enc=0.1 * torch.randn(n_latents, generator=generator),
        b_dec=0.5 * torch.randn(d_in, generator=generator),
    )


def rows(count, d_in, seed=1):
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def step_and_oracle(sae, x, dead, k_aux, alpha=1 / 32, total_variance=7.0):
    workspace = Workspace(sae, len(x) + 3)
    into = workspace.gradients
    for buffer in (into.enc, into.dec, into.bias, into.squares, workspace.centred):
        buffer.fill_(torch.nan)  # whatever was there before must not matter
    result = train_step(sae, x, total_variance, dead, k_aux, alpha, workspace)
    oracle = dense_step(
        x,
        **sae.tensors(),
        k=sae.config.k,
        input_scale=sae.config.input_scale,
        total_variance=total_variance,
        dead=dead,
        k_aux=k_aux,
        auxk_alpha=alpha,
    )
    return result, into, oracle


def assert_close(got, expected):
    difference = (got.double() - expected).norm() / expected.norm()
    assert difference < 1e-5, difference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n_dead", "k_aux"),
    [(0, 16), (10, 16), (300, 16), (300, 64)],
    ids=["none dead", "all dead used", "some dead chosen", "many dead chosen"],
)
def test_step_equals_the_dense_float64_formula(backend, n_dead, k_aux):
    sae = make_sae(n_latents=1000, d_in=40, k=12, scale=1.7)
    sae.kernels = backend()
    x = rows(200, 40)
    dead = torch.zeros(1000, dtype=torch.bool)
    dead[torch.randperm(1000, generator=torch.Generator().manual_seed(3))[:n_dead]] = True
    result, into, oracle = step_and_oracle(sae, x, dead, k_aux)
    assert result.loss == pytest.approx(oracle.loss, rel=1e-6)
    assert result.auxk == pytest.approx(oracle.auxk, rel=1e-5)
    assert (result.auxk > 0) == (n_dead > 0)
    for name in ("enc", "dec", "bias", "b_dec"):
        assert_close(getattr(into, name), getattr(oracle, name))
    parts = (oracle.enc, oracle.dec, oracle.bias, oracle.b_dec)
    norm = sum(part.square().sum() for part in parts).sqrt()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_cut_by_relu_get_no_gradient(backend):
    sae = make_sae(n_latents=60, d_in=16, k=40)
    sae.kernels = backend()
    sae.b_enc -= 2.0  # fewer than k are positive
    result, into, oracle = step_and_oracle(sae, rows(50, 16), torch.zeros(60, dtype=torch.bool), 4)
    assert result.l0 < 20
    assert_close(into.enc, oracle.enc)
    assert_close(into.bias, oracle.bias)
    assert torch.equal(into.bias != 0, oracle.bias != 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_auxk_reaches_dead_encoder_rows_and_not_b_dec(backend):
    sae = make_sae(n_latents=80, d_in=16, k=4)
    sae.kernels = backend()
    dead = torch.zeros(80, dtype=torch.bool)
    dead[50:] = True
    sae.b_enc[50:] = -100.0  # far below zero: through ReLU nothing would reach them
    x = rows(64, 16)
    _, plain, _ = step_and_oracle(sae, x, dead, k_aux=30, alpha=0.0)
    _, with_aux, _ = step_and_oracle(sae, x, dead, k_aux=30)
    assert (plain.enc[50:] == 0).all()
    assert (with_aux.enc[50:].norm(dim=1) > 0).all()
    assert (with_aux.bias[50:] != 0).all()
    assert torch.equal(with_aux.b_dec, plain.b_dec)
    assert torch.equal(with_aux.enc[:50], plain.enc[:50])  # the residual is a constant


def test_auxk_is_zero_where_the_residual_does_not_vary():
    sae = make_sae(n_latents=20, d_in=8, k=2)
    x = rows(1, 8).repeat(16, 1)  # equal rows: the residual equals its mean
    workspace = Workspace(sae, 16)
    into = workspace.gradients
    dead = torch.ones(20, dtype=torch.bool)
    result = train_step(sae, x, 1.0, dead, 4, 1 / 32, workspace)
    assert result.loss > 0
    assert result.auxk == 0
    assert torch.isfinite(into.enc).all()
    perfect = sae.b_dec.repeat(16, 1)
    sae.b_enc.zero_()
    result = train_step(sae, perfect, 1.0, dead, 4, 1 / 32, workspace)
    assert result.auxk == 0
    assert (into.enc == 0).all()


class NoDenseLatents(TorchDispatchMode):
    """Fails on a float32 tensor with as many elements as [batch, n_latents]."""

    def __init__(self, elements):
        super().__init__()
        self.elements = elements
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("n_dead", [0, 6000])
def test_no_dense_latents_are_allocated(n_dead):
    batch, n_latents, d_in = 1024, 16384, 16
    sae = make_sae(n_latents, d_in, k=8)
    dead = torch.zeros(n_latents, dtype=torch.bool)
    dead[:n_dead] = True
    workspace = Workspace(sae, batch)
    with NoDenseLatents(batch * n_latents) as watch:
        train_step(sae, rows(batch, d_in), 1.0, dead, 8, 1 / 32, workspace)
    assert 0 < watch.largest < batch * n_latents / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_chosen_are_the_largest_in_the_given_precision(backend):
    kernels = backend()
    x, weight, bias = rows(37, 24), rows(777, 24, seed=2), rows(1, 777, seed=3)[0]
    low = kernels.low_precision(weight)
    chosen = kernels.choose(x, low, bias, 50)
    assert chosen.dtype == torch.int32
    scores = x @ weight.T + bias
    best = scores.topk(30, dim=1).indices
    for row in range(37):
        assert len(set(chosen[row].tolist())) == 50
        assert set(best[row].tolist()) <= set(chosen[row].tolist())


def test_equal_preactivations_choose_the_lower_index():
    kernels = CpuKernels()
    chosen = kernels.choose(torch.zeros(3, 8), torch.zeros(300, 8).bfloat16(), torch.zeros(300), 5)
    assert chosen.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_float32_selection_agrees_with_bfloat16_selection():
    plain, wide = CpuKernels(), CpuKernels()
    wide._dtype = torch.float32  # as on a processor without bfloat16 products
    x, weight, bias = rows(50, 24), rows(3000, 24, seed=2), torch.zeros(3000)
    best = (x @ weight.T).topk(20, dim=1).indices
    for kernels in (plain, wide):
        chosen = kernels.choose(x, kernels.low_precision(weight), bias, 40)
        assert all(np.isin(best[row], chosen[row]).all() for row in range(50))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit_rows", [False, True])
def test_adam_equals_torch_adam(backend, unit_rows):
    kernels = backend()
    weight = torch.nn.functional.normalize(rows(30, 12))
    parameter = torch.nn.Parameter(weight.double().clone())
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.999), eps=6.25e-10)
    first, second, average = torch.zeros(30, 12), torch.zeros(30, 12), weight.clone()
    expected_average = weight.double().clone()
    for step in range(1, 6):
        gradient = rows(30, 12, seed=step)
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


def test_step_gives_the_same_bits_again():
    sae = make_sae(n_latents=2000, d_in=32, k=8)
    x, dead = rows(300, 32), torch.zeros(2000, dtype=torch.bool)
    dead[:500] = True
    results = []
    for _ in range(2):
        workspace = Workspace(sae, 300)
        train_step(sae, x, 1.0, dead, 16, 1 / 32, workspace)
        results.append(workspace.gradients)
    assert torch.equal(results[0].enc, results[1].enc)
    assert torch.equal(results[0].dec, results[1].dec)
    assert torch.equal(results[0].b_dec, results[1].b_dec)
