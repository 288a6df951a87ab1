"""Dictionaries in a running model: their output in place of activations, at any number of sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.hooks import Edit, edited
from sae_harvest.harvest.model.sites import Located, Site, locate
from sae_harvest.store.loading.chunks import selected_at
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.evaluate import sites_of
from sae_harvest.train.sae.sae import SAE

# output    the dictionary's output
# control   its output plus its own error: the activations themselves, up to rounding
# zero      zeros
# mean      the mean of the site's ordinary rows in the store
Replacement = Literal["output", "control", "zero", "mean"]


@dataclass(frozen=True, eq=False)
class Splice:
    """A replacement of activations during a forward pass."""

    saes: Sequence[SAE]
    """Dictionaries, one for each replaced site."""

    replacement: Replacement = "output"
    """The things that take the place of the activations."""

    every_row: bool = False
    """True if outlier rows are replaced as well."""

    means: dict[str, Tensor] = field(default_factory=dict)
    """Mean of each replaced site, float32 [width]; needed for `mean`."""

    @contextmanager
    def open(self, located: dict[Site, Located], masks: dict[str, Tensor]) -> Iterator[None]:
        """Replace activations in the forward passes of a model while this is open.

        Args:
            located: the modules of the sites; see `locate`.
            masks: replaced site → rows that its dictionary's rule selects, bool
                [batch, context_length].
        """
        edits: dict[Site, Edit] = {}
        for sae in self.saes:
            site = Site.parse(replaced_site(sae))
            replace = self._edit(sae, None if self.every_row else masks[str(site)], edits)
            edits[site] = _after(edits.get(site), replace)
        with edited(located, edits):
            yield

    def _edit(self, sae: SAE, mask: Tensor | None, edits: dict[Site, Edit]) -> Edit:
        """Make the function that replaces activations; a transcoder's adds one at its input."""
        inputs: list[Tensor] = []
        if sae.config.is_transcoder:
            source = Site.parse(sae.config.site)

            def note(x: Tensor) -> Tensor:
                inputs[:] = [x]
                return x

            edits[source] = _after(edits.get(source), note)

        def replace(x: Tensor) -> Tensor:
            rows = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if mask is not None:
                rows = mask
            wanted = x[rows].float()  # [replaced, d_out]
            new = self._of_rows(sae, inputs[0][rows].float() if inputs else wanted, wanted)
            out = x.clone()
            out[rows] = new.to(x.dtype)
            return out

        return replace

    def _of_rows(self, sae: SAE, x: Tensor, wanted: Tensor) -> Tensor:
        """Return what takes the place of the rows `wanted`, float32 [rows, d_out]."""
        if self.replacement == "zero":
            return torch.zeros_like(wanted)
        if self.replacement == "mean":
            return self.means[replaced_site(sae)].to(wanted.device).expand_as(wanted)
        output = sae.decode(*sae.encode(x), x=x)
        return output if self.replacement == "output" else output + (wanted - output)


def replaced_site(sae: SAE) -> str:
    """Return the site whose activations a dictionary's output replaces."""
    return sae.config.target_site or sae.config.site


def located_sites(model: PreTrainedModel, saes: Sequence[SAE]) -> dict[Site, Located]:
    """Find the modules of all sites that dictionaries read or replace.

    Raises:
        InputError: two dictionaries replace the same site, or a transcoder predicts a site that
            the model computes before the one that it reads.
    """
    replaced = [replaced_site(sae) for sae in saes]
    for site in replaced:
        if replaced.count(site) > 1:
            raise InputError(f"Two SAEs replace {site}; give one SAE for each site.")
    for sae in saes:
        if (
            sae.config.is_transcoder
            and Site.parse(sae.config.site).order >= Site.parse(replaced_site(sae)).order
        ):
            raise InputError(
                f"A transcoder predicts {replaced_site(sae)} from {sae.config.site}, which the "
                "model computes later, so its output cannot replace the activations."
            )
    names = {name for sae in saes for name in (sae.config.site, replaced_site(sae))}
    return dict(locate(model, [Site.parse(name) for name in sorted(names)]))


def replaced_rows(
    store: ActivationStore, sae: SAE, contexts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return the rows that an SAE's rule selects by norm, bool [contexts, context_length].

    A transcoder's rule has to select a row at both of its sites.
    """
    rule = sae.config.rule.model_copy(update={"split": "all"})
    sites = sites_of(store, sae.config)
    per_shard = store.shard_rows // store.context_length
    found = np.empty((len(contexts), store.context_length), np.bool_)
    for shard in np.unique(contexts // per_shard).tolist():
        rows = selected_at(store, sites, rule, shard).reshape(-1, store.context_length)
        here = contexts // per_shard == shard
        found[here] = rows[contexts[here] - shard * per_shard]
    return found


def _after(first: Edit | None, second: Edit) -> Edit:
    """Return an edit that applies two after one another."""
    return second if first is None else lambda x: second(first(x))
