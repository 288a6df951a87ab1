"""The names of transformers' modules for sites."""

from __future__ import annotations

import torch

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.discovery import BlockLab, probe
from sae_harvest.harvest.model.models import ResolvedModel, load_model
from sae_harvest.harvest.model.sites import Site


def hookpoint(model: ResolvedModel, site: Site) -> str:
    """Find the module whose output is the site, in the model without its head: `layers.12`.

    Raises:
        InputError: there is no such module.
    """
    network = load_model(model, torch.float32, "cpu")
    blocks, calls = probe(network)
    module: torch.nn.Module | None = None
    if site.kind == "resid_post":
        module = blocks[site.layer]
    elif site.kind == "resid_pre" and site.layer > 0:
        module = blocks[site.layer - 1]
    elif site.kind in ("attn_out", "mlp_out"):
        parts = BlockLab(blocks[site.layer], calls[site.layer]).parts()
        if parts is not None:
            name = parts.attention if site.kind == "attn_out" else parts.mlp
            module = blocks[site.layer].get_submodule(name)
    for name, candidate in network.base_model.named_modules():
        if candidate is module:
            return name
    raise InputError(
        f"No module of {model.name} has the output {site}; give delphi's hookpoint with --name."
    )
