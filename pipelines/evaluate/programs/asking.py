"""The activations of latents on the last of some tokens, by the model and the SAE.

The model stops at the SAE's site. One token is put before every input, as for typed texts (see
`pipelines/live.py`): without it the first token would be the attention sink. A row that the SAE's
rule leaves out for its norm has the activation 0, as in the tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sae_harvest.harvest.model.hooks import SiteTap
from sae_harvest.pipelines.evaluate.programs.n2g import Input
from sae_harvest.pipelines.live import LiveModel

BATCH_TOKENS = 2048
PADDING = " _"  # its token takes the place of others


class ModelActivations:
    """Asks a model; an `Ask` of N2G."""

    def __init__(self, live: LiveModel, batch_tokens: int = BATCH_TOKENS) -> None:
        self._live, self._batch_tokens = live, batch_tokens
        self._tap = SiteTap(live.model, [live.site])
        self.asked = 0
        """Number of inputs so far."""

    @property
    def padding(self) -> int:
        """The padding token: the last one of " _"."""
        return self._live.tokens(PADDING)[-1]

    def __call__(self, inputs: Sequence[Input]) -> npt.NDArray[np.float64]:
        """Return the activation of each input's latent on its last token, float64 [inputs].

        Inputs of the same length are in the same passes, so that no mask is needed. Equal inputs
        of several latents are run once.
        """
        self.asked += len(inputs)
        wanted: dict[tuple[int, ...], list[int]] = {}
        for place, (_, tokens) in enumerate(inputs):
            wanted.setdefault(tokens, []).append(place)
        found = np.zeros(len(inputs))
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for tokens in wanted:
            by_length.setdefault(len(tokens), []).append(tokens)
        for length, texts in sorted(by_length.items()):
            each = max(1, self._batch_tokens // (length + 1))
            for first in range(0, len(texts), each):
                some = texts[first : first + each]
                places = [place for tokens in some for place in wanted[tokens]]
                text = np.repeat(np.arange(len(some)), [len(wanted[tokens]) for tokens in some])
                latents = np.array([inputs[place][0] for place in places])
                found[places] = self._of(some, text, latents)
        return found

    def _of(
        self,
        texts: list[tuple[int, ...]],
        text: npt.NDArray[np.int64],
        latents: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float64]:
        """Return activations of latents on the last token of texts [text] of the same length."""
        live = self._live
        ids = torch.tensor([[live.prefix, *tokens] for tokens in texts], device=live.model.device)
        with torch.inference_mode():
            x = self._tap(ids)[str(live.site)][:, -1].float()  # [texts, d_in]
            indices, values = live.sae.encode(x)  # [texts, w]
            values = values.masked_fill(~live.reads(x)[:, None], 0.0)
        indices, values = indices.cpu()[text], values.cpu()[text]  # [inputs, w]
        own = indices == torch.from_numpy(latents)[:, None]
        return (values * own).sum(1).double().numpy()
