"""A model and its SAE, loaded once, that read typed text.

A text is tokenized like a document of the store. One token is put before it: the BOS token if the
store's contexts begin with one, else the end-of-text token. Without it the first word would be the
attention sink, and its activations would mean nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.hooks import SiteTap
from sae_harvest.harvest.model.models import load_model, load_tokenizer, tokenizer_fingerprint
from sae_harvest.harvest.model.sites import Site
from sae_harvest.harvest.text.documents import Document
from sae_harvest.harvest.tokens.encoding import DocumentEncoder
from sae_harvest.pipelines.features.tables.folder import require_run
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations, model_of, sae_of, store_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE


@dataclass(frozen=True, slots=True)
class LiveText:
    """The latents that fire on each token of a text.

    >>> import sae_harvest as sh
    >>> found = sh.open_features("runs/demo/features").activations("the cat sees")
    >>> "".join(found.token_texts), found.indices.dtype, found.values.dtype
    ('the cat sees', dtype('int32'), dtype('float32'))
    """

    token_ids: list[int]
    """Ids of the text's tokens, without the token that is put before the text."""

    token_texts: list[str]
    """Texts of the tokens; joined, they are the text."""

    indices: npt.NDArray[np.int32]
    """Latents, int32 [tokens, w]."""

    values: npt.NDArray[np.float32]
    """Their activations, float32 [tokens, w], in the units of the tables, in falling order.

    0 means that the latent at this place of `indices` does not fire.
    """


class LiveModel:
    """The model and the SAE that feature tables were made with. One call runs at a time.

    The model computes in the dtype of the harvest (`compute_dtype` of the store's plan), so that
    its activations equal those of the tables.

    Attributes:
        lock: held while the model runs.
        n_latents: number of latents of the SAE.
        prefix: id of the token that is put before every text.
    """

    def __init__(
        self, store: ActivationStore, sae: SAE, model: PreTrainedModel, tokenizer: Any
    ) -> None:
        """Take the arguments from `open`; raise `InputError` if the model lacks the site."""
        self.sae, self.model = sae, model
        self.site = Site.parse(sae.config.site)
        self.context_length = store.context_length
        self.n_latents = sae.config.n_latents
        self.texts = TokenTexts(tokenizer)
        self.lock = Lock()
        names = store.plan["tokenizer"]
        begins = store.plan["bos"] == "context"
        self.prefix: int = names["beginning_of_text"] if begins else names["end_of_text"]
        self._vocabulary: int = store.plan["model"]["vocabulary"]
        self._encoder = DocumentEncoder(tokenizer)
        self._tap = SiteTap(model, [self.site])
        medians = sae.config.rule.max_norm_medians
        # the medians of shards are close: within 0.3 % for shards of 65,536 rows of SmolLM2
        self._largest_norm = math.inf
        if medians is not None:
            self._largest_norm = medians * store.norm_median(sae.config.site, 0)

    @classmethod
    def open(
        cls, features: Path, device: str = "cpu", moved: Locations = NOTHING_MOVED
    ) -> LiveModel:
        """Load the store, SAE and model that the tables in a folder were made from.

        Args:
            moved: new places of store, SAE and model, if they have moved.

        Raises:
            RunError: the folder holds no finished tables, or their store or SAE is missing or has
                another digest.
            InputError: the model is missing, or has other weights or another tokenizer.
            SaeHarvestError: one of them cannot be read.
        """
        run = require_run(features)
        device = choose_device(device)
        sae = sae_of(features, run, moved.saes, device)
        store = store_of(features, run, moved.stores)
        resolved = model_of(store, moved.models)
        tokenizer = load_tokenizer(resolved)
        if tokenizer_fingerprint(tokenizer) != store.plan["tokenizer"].get("xxh3"):
            raise InputError(
                f"The tokenizer of {resolved.name} is not the tokenizer that {store.place} was "
                "harvested with; put the old one back."
            )
        dtype: torch.dtype = getattr(torch, store.plan["compute_dtype"])
        return cls(store, sae, load_model(resolved, dtype, device), tokenizer)

    def activations(self, text: str) -> LiveText:
        """Return the latents that fire on each token of a text.

        No latent fires on rows that the SAE's rule leaves out (outlier rows), as in the tables.

        Raises:
            InputError: the text has no tokens, or more than fit in a context of the store.
        """
        ids = self.tokens(text)
        room = self.context_length - 1
        if len(ids) > room:
            raise InputError(
                f"The text has {len(ids):,} tokens, and at most {room:,} fit in a context of the "
                f"store ({self.context_length:,}, of which one stands before the text); "
                "give a shorter text."
            )
        with self.lock, torch.inference_mode():
            context = self._tap(self.context(ids))[str(self.site)]  # [1, 1 + tokens, d_in]
            x = context[0, 1:].float()
            indices, values = self.sae.encode(x)
            values = values.masked_fill(~self.reads(x)[:, None], 0.0)
        return LiveText(
            token_ids=ids,
            token_texts=self.texts.window(np.array(ids, np.int32)),
            indices=indices.cpu().numpy(),
            values=values.cpu().numpy(),
        )

    def tokens(self, text: str) -> list[int]:
        """Return a text's token ids, made as for documents of the store, without the prefix token.

        The spelling of a control token in the text is read as ordinary text.

        Raises:
            InputError: the text has no tokens, or holds a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                "The text holds half a character (a lone surrogate), which no tokenizer reads; "
                "give whole characters."
            ) from None
        document = Document("", "", None, None, text)
        (batch,) = self._encoder.batches([(document, {})], self.context_length)
        ids: list[int] = batch.tokens[:-1].tolist()  # the last one ends a document
        if not ids:
            raise InputError("The text has no tokens; give at least one word.")
        if max(ids) >= self._vocabulary:
            raise InputError(
                f"The tokenizer gives token {max(ids)}, the model's vocabulary ends at "
                f"{self._vocabulary - 1}; leave out the word that it stands for."
            )
        return ids

    def context(self, ids: list[int]) -> Tensor:
        """Return the model's input, the prefix token and these tokens: int64 [1, 1 + tokens]."""
        return torch.tensor([[self.prefix, *ids]], device=self.model.device)

    def reads(self, x: Tensor) -> Tensor:
        """Return the mask, bool [rows], of rows [rows, d_in] whose norm the SAE's rule selects."""
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) <= self._largest_norm
