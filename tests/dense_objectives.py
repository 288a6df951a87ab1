"""The losses of every objective by their dense formulas in float64, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.config import TrainConfig
from sae_harvest.train.sae.sae import SAE
from tests.kernel_oracle import project, top_k


class Jump(torch.autograd.Function):
    """pi [pi > theta]; d / d theta is -(theta / eps) [|pi - theta| < eps / 2]."""

    @staticmethod
    def forward(ctx, pi, theta, eps):
        ctx.save_for_backward(pi, theta)
        ctx.eps = eps
        return pi * (pi > theta)

    @staticmethod
    def backward(ctx, slope):
        pi, theta = ctx.saved_tensors
        near = (pi - theta).abs() < ctx.eps / 2
        return slope * (pi > theta), (-theta / ctx.eps * near * slope).sum(0), None


class Above(torch.autograd.Function):
    """[pi > theta]; d / d theta is -(1 / eps) [|pi - theta| < eps / 2], d / d pi is 0."""

    @staticmethod
    def forward(ctx, pi, theta, eps):
        ctx.save_for_backward(pi, theta)
        ctx.eps = eps
        return (pi > theta).double()

    @staticmethod
    def backward(ctx, slope):
        pi, theta = ctx.saved_tensors
        near = (pi - theta).abs() < ctx.eps / 2
        return None, (-1 / ctx.eps * near * slope).sum(0), None


def normalised(x: Tensor, config) -> Tensor:
    if config.normalization == "unit_norm":
        return x / x.norm(dim=1, keepdim=True) * x.shape[1] ** 0.5
    if config.normalization == "layer_norm":
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    return x / config.input_scale


class Dense:
    """Losses and gradients of one batch.

    losses: reconstruction, penalties by name, auxk. gradients: by tensor, of the decoder without
    the part along its rows, of thresholds by their logarithm. values: v, [batch, n_latents].
    """

    def __init__(
        self,
        sae: SAE,
        x: Tensor,
        config: TrainConfig,
        total_variance: float,
        dead: Tensor,
        penalty_share: float = 1.0,
        target: Tensor | None = None,
    ) -> None:
        self.config, self.variance, self.share = config, total_variance, penalty_share
        self.w = {
            name: tensor.double().clone().requires_grad_(name != "b_in")
            for name, tensor in sae.tensors().items()
        }
        if config.activation == "jumprelu":
            self.log = self.w["threshold"].detach().log().requires_grad_()
            self.w["threshold"] = self.log.exp()
        w = self.w
        rows = normalised(x.double(), sae.config)
        self.target = rows if target is None else target.double() / sae.config.output_scale
        self.centred = rows - (w["b_dec"] if target is None else w["b_in"])
        self.pi = self.centred @ w["W_enc"].T + w["b_enc"]
        self.n = config.n_latents
        self.penalties: dict[str, Tensor] = {}
        self.values = getattr(self, config.activation)()
        self.loss = self.reconstruction(self.values)
        self.auxk = self.auxiliary(dead, self.centred.detach() if target is None else self.centred)
        total = self.loss + self.auxk + sum(self.penalties.values())
        names = [name for name in w if w[name].requires_grad and name != "threshold"]
        if config.activation == "jumprelu":
            names.append("threshold")
        leaves = [self.log if name == "threshold" else w[name] for name in names]
        grads = torch.autograd.grad(total, leaves)
        self.gradients = dict(zip(names, grads, strict=True))
        self.gradients["W_dec"] = project(self.gradients["W_dec"], w["W_dec"].detach())

    def error(self, values: Tensor) -> Tensor:
        """Mean squared error per row over the total variance."""
        x_hat = values @ self.w["W_dec"] + self.w["b_dec"]
        return (x_hat - self.target).square().sum(1).mean() / self.variance

    def reconstruction(self, values: Tensor) -> Tensor:
        sizes = self.config.matryoshka or (self.n,)
        first = torch.arange(self.n)
        return sum(self.error(values * (first < size)) for size in sizes) / len(sizes)

    def topk(self) -> Tensor:
        cut = torch.relu(self.pi)
        if self.config.multi_topk > 0:
            wide = self.error(top_k(cut, min(self.n, 4 * self.config.k)))
            self.penalties["multi_topk_loss"] = self.config.multi_topk * wide
        return top_k(cut, self.config.k)

    def batchtopk(self) -> Tensor:
        flat = torch.relu(self.pi).flatten()[None]
        return top_k(flat, len(self.pi) * self.config.k).view_as(self.pi)

    def l1(self, values: Tensor) -> Tensor:
        return self.share * self.config.l1 * values.sum(1).mean() / self.variance**0.5

    def relu_l1(self) -> Tensor:
        values = torch.relu(self.pi)
        self.penalties["l1_loss"] = self.l1(values)
        return values

    def relu_kl(self) -> Tensor:
        soft = (self.pi / self.config.bandwidth + 0.5).clamp(0, 1)
        found = (1 + soft.sum(0)) / (len(soft) + 2)
        rho = torch.tensor(self.config.k / self.n, dtype=torch.float64)
        kl = rho * (rho / found).log() + (1 - rho) * ((1 - rho) / (1 - found)).log()
        self.penalties["kl_loss"] = self.share * self.config.kl / self.config.k * kl.sum()
        return torch.relu(self.pi)

    def jumprelu(self) -> Tensor:
        theta, eps = self.w["threshold"], self.config.bandwidth
        l0 = Above.apply(self.pi, theta, eps).sum(1).mean()
        self.penalties["l0_loss"] = self.share * self.config.l0 * (l0 / self.config.k - 1) ** 2
        return Jump.apply(self.pi, theta, eps)

    def gated(self) -> Tensor:
        gate = torch.relu(self.pi)
        self.penalties["l1_loss"] = self.l1(gate)
        frozen = gate @ self.w["W_dec"].detach() + self.w["b_dec"].detach() - self.target
        self.penalties["gate_loss"] = frozen.square().sum(1).mean() / self.variance
        plain = self.pi - self.w["b_enc"]
        magnitude = torch.relu(self.w["r_mag"].exp() * plain + self.w["b_mag"])
        return (self.pi > 0) * magnitude

    def auxiliary(self, dead: Tensor, centred: Tensor) -> Tensor:
        w = self.w
        target = (self.target - self.values @ w["W_dec"] - w["b_dec"]).detach()
        spread = (target - target.mean(0)).square().sum()
        if not dead.any():
            return torch.zeros((), dtype=torch.float64)
        pi = centred @ w["W_enc"][dead].T + w["b_enc"][dead]
        k = min(self.config.auxiliary_k(target.shape[1]), int(dead.sum()))
        guess = top_k(pi, k) @ w["W_dec"][dead]
        return self.config.auxk_alpha * (guess - target).square().sum() / spread
