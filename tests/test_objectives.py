"""Every objective's losses and gradients against its dense float64 formula; AuxK's reach."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_harvest.common.errors import RunError
from sae_harvest.train.config import SAEConfig, TrainConfig
from sae_harvest.train.sae.kernels.cpu import CpuKernels
from sae_harvest.train.sae.kernels.torch_ops import TorchKernels
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.step.loss_and_gradients import train_step
from sae_harvest.train.step.step_context import Workspace
from tests.dense_objectives import Dense

BACKENDS = [CpuKernels, TorchKernels]
N_LATENTS, D_IN, ROWS, K = 300, 24, 100, 8
SIZES = (20, 90, N_LATENTS)
VARIANCE = 7.0
OBJECTIVES = {
    "topk": {"k": K},
    "multi-topk": {"k": K, "multi_topk": 0.125},
    "multi-topk of all": {"k": 200, "multi_topk": 0.5},
    "nested topk": {"k": K, "matryoshka": SIZES},
    "batchtopk": {"k": K, "activation": "batchtopk"},
    "nested batchtopk": {"k": K, "activation": "batchtopk", "matryoshka": SIZES},
    "jumprelu": {"k": K, "activation": "jumprelu", "bandwidth": 0.6},
    "nested jumprelu": {"k": K, "activation": "jumprelu", "bandwidth": 0.6, "matryoshka": SIZES},
    "relu_l1": {"activation": "relu_l1", "l1": 0.3},
    "nested relu_l1": {"activation": "relu_l1", "l1": 0.3, "matryoshka": SIZES},
    "relu_kl": {"k": K, "activation": "relu_kl", "kl": 0.7, "bandwidth": 0.8},
    "gated": {"activation": "gated", "l1": 0.3},
    "nested gated": {"activation": "gated", "l1": 0.3, "matryoshka": SIZES},
}
ACTIVATIONS = ["topk", "batchtopk", "jumprelu", "relu_l1", "relu_kl", "gated"]
TENSORS = {"W_enc": "enc", "W_dec": "dec", "b_enc": "bias", "b_dec": "b_dec"}


def config_of(**fields):
    known = {"n_latents": N_LATENTS, "tokens": 1000, "batch_rows": ROWS, "k_aux": 16}
    return TrainConfig.model_validate(known | fields)


def make_sae(config, d_in=D_IN, d_out=None, seed=0):
    """Weights in no way special: the encoder is not the decoder, all biases differ."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    normalization = config.normalization
    sae_config = SAEConfig(
        d_in=d_in,
        d_out=d_out,
        n_latents=config.n_latents,
        k=config.k if config.activation in ("topk", "batchtopk") else None,
        activation=config.sae_activation,
        site="resid_post.1",
        target_site=None if d_out is None else "mlp_out.1",
        normalization=normalization,
        input_scale=1.7 if normalization == "scale" else 1.0,
        output_scale=0.6 if d_out is not None and normalization == "scale" else 1.0,
    )
    n, width = config.n_latents, d_out or d_in
    dec = torch.nn.functional.normalize(random(n, width))
    enc = dec if d_out is None else torch.nn.functional.normalize(random(n, d_in))
    tensors = {
        "W_enc": enc + 0.3 * random(n, d_in) / d_in**0.5,
        "W_dec": dec,
        "b_enc": 0.1 * random(n) - (1.5 if sae_config.activation in ("relu", "gated") else 0),
        "b_dec": 0.5 * random(width),
        "b_in": 0.5 * random(d_in),
        "threshold": 1.4 + 0.2 * random(n).abs(),
        "r_mag": 0.2 * random(n),
        "b_mag": 0.3 * random(n) - 1,
    }
    return SAE(sae_config, **{name: tensors[name] for name in SAE.shapes(sae_config)})


def rows(count=ROWS, width=D_IN, seed=1):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def some_dead(count, n_latents=N_LATENTS):
    dead = torch.zeros(n_latents, dtype=torch.bool)
    dead[torch.randperm(n_latents, generator=torch.Generator().manual_seed(3))[:count]] = True
    return dead


def take_step(sae, x, config, dead, **more):
    """The result, and gradients by tensor. Whatever was in the buffers before must not matter."""
    workspace = Workspace(sae, len(x) + 3)
    into = workspace.gradients
    for buffer in (into.enc, into.dec, into.bias, into.squares, into.b_dec):
        buffer.fill_(torch.nan)
    for name in ("centred", "error", "both errors", "wide error", "error 0", "error 1", "error 2"):
        like = x if name == "centred" else x.new_empty(len(x), sae.W_dec.shape[1])
        workspace.buffer(name, like).fill_(torch.nan)
    result = train_step(sae, x, config, VARIANCE, dead, workspace, **more)
    gradients = {name: getattr(into, attribute).clone() for name, attribute in TENSORS.items()}
    return result, gradients | workspace.extra


def assert_equal_to_dense(sae, x, config, dead, target=None):
    result, gradients = take_step(sae, x, config, dead, step=10**6, target=target)
    dense = Dense(sae, x, config, VARIANCE, dead, target=target)
    assert result.loss == pytest.approx(dense.loss.item(), rel=1e-5)
    assert result.auxk == pytest.approx(dense.auxk.item(), rel=1e-5)
    assert result.penalties.keys() == dense.penalties.keys()
    for name, penalty in dense.penalties.items():
        assert result.penalties[name] == pytest.approx(penalty.item(), rel=1e-5), name
    assert gradients.keys() == dense.gradients.keys()
    for name, expected in dense.gradients.items():
        off = (gradients[name].double() - expected).norm() / expected.norm()
        assert off < 2e-5, (name, off)
    norm = sum(part.square().sum() for part in dense.gradients.values()).sqrt()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert torch.equal(result.fired, (dense.values > 0).any(0))
    assert result.l0 == pytest.approx((dense.values > 0).sum(1).double().mean().item())
    variance = (dense.target - dense.target.mean(0)).square().sum()
    error = dense.values @ dense.w["W_dec"] + dense.w["b_dec"] - dense.target
    assert result.fvu == pytest.approx((error.square().sum() / variance).item(), rel=1e-5)
    return result, dense


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_dead", [0, 10, 150], ids=["none dead", "few dead", "half dead"])
@pytest.mark.parametrize("fields", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_losses_and_gradients_equal_the_dense_float64_formula(fields, n_dead, backend):
    config = config_of(**fields)
    sae = make_sae(config)
    sae.kernels = backend()
    result, dense = assert_equal_to_dense(sae, rows(), config, some_dead(n_dead))
    assert (result.auxk > 0) == (n_dead > 0)
    assert 1 < result.l0 < N_LATENTS / 4 or config.k == 200
    for name, gradient in dense.gradients.items():  # the formula itself reaches every tensor
        assert gradient.norm() > 0, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transcoders_equal_the_dense_formula(activation):
    config = config_of(target_site="mlp_out.1", activation=activation, **k_of(activation))
    sae = make_sae(config, d_out=17)
    result, _ = assert_equal_to_dense(
        sae, rows(), config, some_dead(50), target=rows(width=17, seed=5)
    )
    assert result.auxk > 0


@pytest.mark.parametrize("normalization", ["none", "unit_norm", "layer_norm"])
def test_normalisations_equal_the_dense_formula(normalization):
    config = config_of(k=K, normalization=normalization)
    assert_equal_to_dense(make_sae(config), rows(), config, some_dead(20))


def k_of(activation):
    return {"k": K} if activation in ("topk", "batchtopk", "jumprelu", "relu_kl") else {}


def test_penalties_grow_over_the_first_steps():
    config = config_of(activation="relu_l1", l1=0.3, tokens=1000 * ROWS)
    sae, dead = make_sae(config), some_dead(0)
    whole = take_step(sae, rows(), config, dead, step=10**6)[0].penalties["l1_loss"]
    for step, share in ((0, 1 / 51), (24, 25 / 51), (50, 1.0), (900, 1.0)):
        penalty = take_step(sae, rows(), config, dead, step=step)[0].penalties["l1_loss"]
        assert penalty == pytest.approx(share * whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_auxk_reaches_dead_encoder_rows_and_not_b_dec(activation, backend):
    config = config_of(activation=activation, k_aux=120, **k_of(activation))
    sae = make_sae(config)
    sae.kernels = backend()
    dead = torch.arange(N_LATENTS) >= 200
    sae.b_enc[dead] = -100.0  # so far from firing that nothing else reaches them
    x = rows()
    without = config.model_copy(update={"auxk_alpha": 0.0})
    _, plain = take_step(sae, x, without, dead)
    _, with_aux = take_step(sae, x, config, dead)
    assert (plain["W_enc"][dead] == 0).all()
    assert (with_aux["W_enc"][dead].norm(dim=1) > 0).all()
    assert (with_aux["b_enc"][dead] != 0).all()
    assert (with_aux["W_dec"][dead].norm(dim=1) > 0).all()
    assert torch.equal(with_aux["b_dec"], plain["b_dec"])
    for name in ("W_enc", "W_dec", "b_enc"):  # the residual is a constant
        assert torch.equal(with_aux[name][~dead], plain[name][~dead])


def test_auxk_is_zero_where_the_residual_does_not_vary():
    config = config_of(n_latents=20, k=2, normalization="none")
    sae = make_sae(config, d_in=8)
    dead = torch.ones(20, dtype=torch.bool)
    equal = rows(1, 8).repeat(16, 1)  # equal rows: the residual equals its mean
    result, gradients = take_step(sae, equal, config, dead)
    assert result.loss > 0
    assert result.auxk == 0
    assert torch.isfinite(gradients["W_enc"]).all()
    sae.b_enc.zero_()
    perfect = sae.b_dec.repeat(16, 1)
    result, gradients = take_step(sae, perfect, config, dead)
    assert result.auxk == 0
    assert (gradients["W_enc"] == 0).all()


def test_latents_cut_by_relu_get_no_gradient():
    config = config_of(k=200)
    sae = make_sae(config)
    sae.b_enc -= 1.5  # fewer than k are positive
    result, dense = assert_equal_to_dense(sae, rows(), config, some_dead(0))
    _, gradients = take_step(sae, rows(), config, some_dead(0))
    assert result.l0 < 100
    assert torch.equal(gradients["b_enc"] != 0, dense.gradients["b_enc"] != 0)


def test_jumprelu_gradients_worked_by_hand():
    """One dimension, one row x = 1, two latents with decoder 1 and -1, bandwidth 1, k = 1.

    pi = (2, 0.3), theta = (1.8, 0.5): the first is active, both are within 1/2 of theta.
    x_hat = 2, error 1, total variance 2: loss 1/2, d loss / d x_hat = 1, d loss / d v = (1, -1).
    L0 = 1 = k: no penalty, no slope. With l0 = 3 and k = 2 (L0 / k - 1 = -1/2) the penalty is
    3/4 and d penalty / d L0 = 3 * 2 * (-1/2) / 2 = -3/2.
    By theta: first -(1.8 * 1 + slope), second -(0.5 * -1 + slope); by its log: times theta.
    """
    for k, l0, penalty, slope in ((1, 1.0, 0.0, 0.0), (2, 3.0, 0.75, -1.5)):
        config = config_of(
            n_latents=2, activation="jumprelu", k=k, l0=l0, bandwidth=1.0, normalization="none"
        )
        sae = SAE(
            SAEConfig(d_in=1, n_latents=2, activation="jumprelu", site="resid_post.1"),
            W_enc=torch.tensor([[2.0], [0.3]]),
            W_dec=torch.tensor([[1.0], [-1.0]]),
            b_enc=torch.zeros(2),
            b_dec=torch.zeros(1),
            threshold=torch.tensor([1.8, 0.5]),
        )
        workspace, dead = Workspace(sae, 1), torch.zeros(2, dtype=torch.bool)
        result = train_step(sae, torch.ones(1, 1), config, 2.0, dead, workspace, step=10**6)
        assert result.loss == pytest.approx(0.5)
        assert result.penalties["l0_loss"] == pytest.approx(penalty)
        expected = torch.tensor([-(1.8 + slope) * 1.8, -(-0.5 + slope) * 0.5])
        torch.testing.assert_close(workspace.extra["threshold"], expected)
        # pi gets the slope of active latents alone, c = 1
        torch.testing.assert_close(workspace.gradients.enc, torch.tensor([[1.0], [0.0]]))


def test_density_gradient_worked_by_hand():
    """One latent of three is inside the window in one of two rows.

    pi = 0.1 in one row and -9 in the other, bandwidth 0.4: h = 0.75 and 0, so the density is
    (1 + 0.75) / 4 = 0.4375. k / n_latents = 1/3, so d KL / d density = -(1/3) / 0.4375 +
    (2/3) / 0.5625 = 0.423280, and d penalty / d pi = kl / k * that / 4 / 0.4 = 0.264550 kl.
    """
    config = config_of(
        n_latents=3, k=1, activation="relu_kl", kl=2.0, bandwidth=0.4, normalization="none"
    )
    sae = SAE(
        SAEConfig(d_in=2, n_latents=3, activation="relu", site="resid_post.1"),
        W_enc=torch.tensor([[0.1, -9.0], [-9.0, -9.0], [-9.0, -9.0]]),
        W_dec=torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]),
        b_enc=torch.zeros(3),
        b_dec=torch.zeros(2),
    )
    workspace, dead = Workspace(sae, 2), torch.zeros(3, dtype=torch.bool)
    # the only active value is 0.1; its error slope is 2 (0.1 - 0) / (2 rows * variance 1)
    result = train_step(sae, torch.eye(2), config, 1.0, dead, workspace, step=10**6)
    assert workspace.gradients.bias[0].item() == pytest.approx(0.1 + 2 * 0.264550, rel=1e-5)
    assert workspace.gradients.bias[1:].tolist() == [0.0, 0.0]
    assert result.l0 == 0.5


@pytest.mark.parametrize("duplicates", [1, 40])
def test_batchtopk_keeps_the_largest_of_the_batch_exactly(duplicates):
    """Also where one row has nearly all of them, which no sample of rows can tell."""
    config = config_of(k=K, activation="batchtopk")
    sae = make_sae(config)
    x = rows()
    x[3] *= 30  # takes most of the batch's places
    x[50 : 50 + duplicates] = x[50]
    result, _ = take_step(sae, x, config, some_dead(0))
    pi = sae.centre(x).double() @ sae.W_enc.double().T + sae.b_enc.double()
    values = torch.relu(pi).flatten().sort(descending=True).values
    least = values[ROWS * K - 1].item()
    assert result.least_kept == pytest.approx(least, rel=1e-6)
    # pairs that equal the least are all kept, so that equal rows have equal latents
    expected = (torch.relu(pi) >= least * (1 - 1e-6)).sum().item() / ROWS
    assert result.l0 == pytest.approx(expected)
    assert K <= result.l0 < K + 0.5


def test_batchtopk_with_fewer_positive_than_asked_keeps_them_all():
    config = config_of(k=200, activation="batchtopk")
    sae = make_sae(config)
    sae.b_enc -= 1.0
    result, dense = assert_equal_to_dense(sae, rows(), config, some_dead(0))
    assert result.least_kept == 0
    assert result.l0 == pytest.approx((dense.pi > 0).sum(1).double().mean().item())


def test_latents_that_are_no_longer_sparse_are_refused():
    config = config_of(n_latents=5000, activation="relu_l1")
    sae = make_sae(config)
    sae.b_enc.fill_(0.5)
    with pytest.raises(RunError, match=r"of 5,000 latents are active per row.*relu_l1"):
        take_step(sae, rows(20), config, some_dead(0, 5000))


class NoDenseLatents(TorchDispatchMode):
    """Watches for a float32 tensor with as many elements as [batch, n_latents]."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("n_dead", [0, 6000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_dense_latents_are_allocated(activation, n_dead):
    batch, n_latents, d_in = 1024, 16384, 16
    config = config_of(
        n_latents=n_latents, activation=activation, batch_rows=batch, tokens=batch, k_aux=8,
        **k_of(activation),
    )  # fmt: skip
    sae = make_sae(config, d_in)
    if activation not in ("topk", "batchtopk"):
        sae.b_enc -= 2.0
    dead = some_dead(n_dead, n_latents)
    workspace = Workspace(sae, batch)
    with NoDenseLatents() as watch:
        train_step(sae, rows(batch, d_in), config, 1.0, dead, workspace)
    assert 0 < watch.largest < batch * n_latents / 2


@pytest.mark.parametrize("fields", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_a_step_gives_the_same_bits_again(fields):
    config = config_of(**fields)
    sae, x, dead = make_sae(config), rows(), some_dead(100)
    _, first = take_step(sae, x, config, dead)
    _, second = take_step(sae, x, config, dead)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
