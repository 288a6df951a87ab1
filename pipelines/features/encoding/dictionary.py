"""The dictionary that a feature build describes: the latents of an SAE, or neurons of an MLP."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.harvest.model.models import load_model
from sae_harvest.harvest.model.sites import Site, locate
from sae_harvest.pipelines.features.encoding.encode import Encoder
from sae_harvest.pipelines.features.tables.folder import IDENTITY
from sae_harvest.pipelines.source import model_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.sae import SAE

ACTIVE = 1024  # firing latents per row that a block has room for if the SAE has no k
BLOCK = 512  # neurons whose output weights are read at a time


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Latents, and the data about them beside their activations."""

    site: str
    """Site whose activations the encoder reads."""
    rule: RowRule
    """Choice of rows."""
    encoder: Encoder | None
    """Computes the latents of rows; None if the rows are encoded already."""
    n_latents: int
    """Number of latents."""
    pairs_per_row: int
    """About, or at most, how many latents fire on a row."""
    digest: str
    """Identity of the SAE or the neurons."""
    W_dec: Tensor | None
    """float32 [n_latents, d], the vector that a latent writes at `writes_to`; None if unknown."""
    writes_to: str
    """Site at which the latents write."""
    weights: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """W_enc and b_enc of an SAE; empty otherwise."""


class Neurons:
    """An encoder with neurons as latents: a neuron fires where its activation is above 0."""

    def __init__(self, width: int) -> None:
        self._numbers = torch.arange(width, dtype=torch.int32)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return all neurons of each row, int32 and float32 [batch, width]; 0: no firing."""
        return self._numbers.expand(len(x), -1), x.clamp(min=0)


def load_dictionary(
    store: ActivationStore, sae_path: str, site: str | None, device: str
) -> Dictionary:
    """Load the SAE at a path, or the neurons of a site for `identity`.

    Args:
        site: site of the neurons, if the store has several; an SAE records its own.

    Raises:
        RunError: the SAE was trained on another site or another model.
        InputError: the site is not the SAE's, or has no neurons.
    """
    if sae_path == IDENTITY:
        site = store.site(site)
        if Site.parse(site).kind != "mlp_act":
            raise InputError(
                f"--sae identity describes neurons, and {site} has none; give a store with mlp_act."
            )
        width = store.width(site)
        return Dictionary(
            site=site,
            rule=RowRule(split="all"),
            encoder=Neurons(width),
            n_latents=width,
            pairs_per_row=width,
            digest=IDENTITY,
            W_dec=output_weights(store, site),
            writes_to=f"mlp_out.{Site.parse(site).layer}",
        )
    sae = SAE.load(sae_path, device)
    own = sae_fits(store, sae, Path(sae_path))
    if site not in (None, own):
        raise InputError(f"The SAE in {sae_path} was trained on {own}; leave out --site {site}.")
    return Dictionary(
        site=own,
        rule=sae.config.rule.model_copy(update={"split": "all"}),
        encoder=sae,
        n_latents=sae.config.n_latents,
        pairs_per_row=sae.config.k or ACTIVE,
        digest=sae.digest,
        W_dec=sae.W_dec.cpu(),
        writes_to=sae.config.target_site or own,
        weights={name: getattr(sae, name).cpu().numpy() for name in ("W_enc", "b_enc")},
    )


def output_weights(store: ActivationStore, site: str) -> Tensor:
    """Find each neuron's vector in the residual stream: float32 [d_mlp, d_model].

    It is computed from the projection's outputs, so that the way a family stores its weights
    doesn't matter.
    """
    model = load_model(model_of(store), torch.float32, "cpu")
    located = locate(model, [neurons := Site.parse(site)])[neurons]
    assert located.parts is not None  # or there would be no such site
    assert located.parts.down is not None
    down: nn.Module = located.block.get_submodule(located.parts.down)
    width = store.width(site)
    rows = []
    with torch.no_grad():
        nothing = down(torch.zeros(1, width))
        for first in range(0, width, BLOCK):
            one = torch.zeros(min(BLOCK, width - first), width)
            one[torch.arange(len(one)), first + torch.arange(len(one))] = 1
            rows.append(down(one) - nothing)
    return torch.cat(rows)


def sae_fits(store: ActivationStore, sae: SAE, sae_path: Path) -> str:
    """Return the store's site that the SAE was trained on; `RunError` if they don't fit."""
    site = sae.config.site
    if site not in store.sites:
        raise RunError(
            f"The SAE in {sae_path} was trained on {site}; {store.place} holds "
            f"{', '.join(store.sites)}. Harvest that site, or use the SAE's own store."
        )
    if store.width(site) != sae.config.d_in:
        raise RunError(
            f"The SAE in {sae_path} takes {sae.config.d_in} numbers a row; {site} in "
            f"{store.place} is {store.width(site)} wide. Use the store of the same model."
        )
    weights = store.plan["model"]["weights"]
    if sae.config.model_weights not in ("", weights):
        raise RunError(
            f"The SAE in {sae_path} was trained on {sae.config.model} with other weights "
            f"({sae.config.model_weights}) than {store.place} was harvested from ({weights}). "
            "Use a store of the same model."
        )
    return site
