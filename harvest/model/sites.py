"""Sites: the places in a model whose activations are read or changed.

    resid_pre.L   the residual stream entering block L          [batch, ctx, d_model]
    attn_out.L    what attention adds to it
    resid_mid.L   resid_pre.L + attn_out.L; undefined if attention and MLP run in parallel
    mlp_act.L     the neurons: input of the MLP's last projection [batch, ctx, d_mlp]
    mlp_out.L     what the MLP adds to the residual stream
    resid_post.L  the residual stream leaving block L, before any final norm

Blocks are counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.discovery import BlockLab, BlockParts, probe

SITE_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act")
_COMPUTED = ("resid_pre", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post")  # in order
_INNER_KINDS = frozenset({"resid_mid", "attn_out", "mlp_out", "mlp_act"})


@dataclass(frozen=True)
class Site:
    """One place in a model: a kind of activation, and the number of its block, from 0."""

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in SITE_KINDS or self.layer < 0:
            raise InputError(_not_a_site(f"{self.kind}.{self.layer}"))

    @property
    def order(self) -> tuple[int, int]:
        """A key that sorts sites in the order in which a forward pass computes them."""
        return self.layer, _COMPUTED.index(self.kind)

    @classmethod
    def parse(cls, text: str) -> Site:
        """Parse a name such as `resid_post.12`. Raises InputError for any other spelling."""
        match = re.fullmatch(r"([a-z_]+)\.([0-9]{1,6})", text.strip())
        if match is None:
            raise InputError(_not_a_site(text))
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    def check(self, config: PreTrainedConfig) -> None:
        """Raise InputError, naming the range, if the model has no such layer."""
        n_layers = config.get_text_config(decoder=True).num_hidden_layers
        if self.layer >= n_layers:
            raise InputError(
                f"Site {self} is out of range: the model has {n_layers} layers, so choose one of "
                f"{self.kind}.0 to {self.kind}.{n_layers - 1}."
            )


@dataclass(frozen=True)
class Located:
    """The modules that compute a site."""

    block: nn.Module
    """The site's block."""
    place: int | str
    """The argument of the block that is the residual stream: a position or a keyword."""
    parts: BlockParts | None
    """Paths of the modules within the block; None for `resid_pre` and `resid_post`."""


def locate(model: PreTrainedModel, sites: Sequence[Site]) -> dict[Site, Located]:
    """Find sites by running the model over a few tokens (see `harvest.model.discovery`).

    Raises InputError for a layer out of range or a site that the architecture doesn't offer.
    """
    return locate_in_blocks(model, sites)[1]


def locate_in_blocks(
    model: PreTrainedModel, sites: Sequence[Site]
) -> tuple[nn.ModuleList, dict[Site, Located]]:
    """Find the model's blocks, and the sites in them; see `locate`."""
    for site in sites:
        site.check(model.config)
    blocks, calls = probe(model)
    inner = {site.layer for site in sites if site.kind in _INNER_KINDS}
    found = {layer: BlockLab(blocks[layer], calls[layer]).parts() for layer in inner}
    parts = {s: _required(found[s.layer], s, model) for s in sites if s.kind in _INNER_KINDS}
    return blocks, {
        site: Located(blocks[site.layer], calls[site.layer].place, parts.get(site))
        for site in sites
    }


def _not_a_site(text: str) -> str:
    return (
        f"{text!r} is not a site: expected KIND.LAYER with KIND one of {', '.join(SITE_KINDS)} "
        "and LAYER counted from 0, such as resid_post.8."
    )


def _required(parts: BlockParts | None, site: Site, model: PreTrainedModel) -> BlockParts:
    """Return the block's parts if the site is defined by them; InputError otherwise."""
    family = f"{model.config.model_type} model"
    if parts is None:
        raise InputError(
            f"Site {site} isn't offered by this {family}: its blocks don't add one attention "
            "output and one MLP output to the residual stream; use resid_pre or resid_post."
        )
    if site.kind == "resid_mid" and parts.parallel:
        raise InputError(
            f"Site {site} isn't defined for this {family}: attention and MLP run in parallel, so "
            "no residual lies between them; use resid_pre or resid_post."
        )
    if site.kind == "mlp_act" and parts.down is None:
        raise InputError(
            f"Site {site} isn't offered by this {family}: its MLP doesn't end in one projection "
            "of all neurons (a mixture of experts, say); use mlp_out."
        )
    return parts
