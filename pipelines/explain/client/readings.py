"""Exact readings: logits of a few tokens at a few places of many texts.

The tokens that all texts begin with run once; their keys and values are repeated for the batch. The
rests are padded on the right, which changes nothing before it in a causal model. The LM head is
multiplied for the tokens of the choices only, unless the model does more than that.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_harvest.harvest.model.discovery import probe_tokens
from sae_harvest.pipelines.explain.client.batches import batches
from sae_harvest.pipelines.explain.client.interface import Failure, Reading


@dataclass(frozen=True, slots=True)
class Placed:
    """A reading as tokens."""

    ids: list[int]
    """The tokens of prefix and text, as of one string."""

    places: list[int]
    """For each place, the number of the token before it."""


def placed(tokenizer: Any, request: Reading) -> Placed | Failure:
    """Return the tokens of a reading; a failure if a place lies inside of a token."""
    text = request.prefix + request.text
    ids, limits = _limits(tokenizer, text)
    places = [limits.get(len(request.prefix) + slot, 0) - 1 for slot in request.slots]
    if min(places, default=0) < 0:  # nothing to read before the first token, either
        return Failure("no token limit at the place")
    return Placed(ids, places)


def first_tokens(tokenizer: Any, request: Reading) -> list[int]:
    """Return the first token of each choice, as it follows the first place of the reading.

    Some tokenizers write a token at the beginning of a text in another way than inside of it.
    """
    before = request.prefix + request.text[: request.slots[0]] if request.slots else ""
    found = []
    for choice in request.choices:
        ids, limits = _limits(tokenizer, before + choice)
        number = limits.get(len(before))
        alone = tokenizer.encode(choice, add_special_tokens=False)
        found.append(ids[number] if number is not None and number < len(ids) else alone[0])
    return found


def _limits(tokenizer: Any, text: str) -> tuple[list[int], dict[int, int]]:
    """Return the tokens of a text, and the numbers of tokens by the characters they begin at.

    The end of the text stands for a token behind the last. A character where one token begins
    and the one before has not ended, or has ended earlier, is no limit.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids: list[int] = encoded["input_ids"]
    limits: dict[int, int] = {}
    end = last = 0
    pairs = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    for number, ((start, stop), special) in enumerate(pairs):
        if special:
            continue
        if start == end:
            limits.setdefault(start, number)
        end, last = stop, number + 1
    if end == len(text):
        limits[end] = last
    return ids[: max(last, 1)], limits


class ChoiceLogits:
    """The logits of a model for a few tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find out by experiment if logits are the LM head's products with hidden states.

        Some models scale or squash them afterwards; then the whole vocabulary is computed.
        """
        self._model = model
        self._head: Any = model.get_output_embeddings()
        ids = probe_tokens(model)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            self._plain = isinstance(self._head, torch.nn.Linear) and torch.equal(
                self._head(hidden).float(), logits.float()
            )
        self._shares = "past_key_values" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def of(
        self, texts: Sequence[Placed], tokens: Sequence[int], batch_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield numbers of texts and the logits at their places, float32 [places, tokens].

        Args:
            texts: the texts; those that begin alike are best asked together.
            tokens: the tokens whose logits are wanted.
            batch_tokens: tokens of a forward pass, about.
        """
        device = self._model.device
        wanted = torch.tensor(tokens, device=device)
        n_shared = _shared(texts) if self._shares and len(texts) > 1 else 0
        past = None
        if n_shared:
            ids = torch.tensor([texts[0].ids[:n_shared]], device=device)
            past = self._model.base_model(input_ids=ids, use_cache=True).past_key_values
        rests = [text.ids[n_shared:] for text in texts]
        for some in batches([len(rest) for rest in rests], batch_tokens):
            given = torch.zeros(len(some), max(len(rests[n]) for n in some), dtype=torch.int64)
            for row, number in enumerate(some):
                given[row, : len(rests[number])] = torch.tensor(rests[number])
            cache = copy.deepcopy(past)
            if cache is not None:
                cache.batch_repeat_interleave(len(some))
            for row, states in enumerate(self._states(given.to(device), cache)):
                places = torch.tensor(texts[some[row]].places, device=device) - n_shared
                yield some[row], self._logits(states[places], wanted)

    def _states(self, ids: Tensor, cache: Any) -> Tensor:
        """Return hidden states, or logits of the whole vocabulary: [texts, tokens, any]."""
        run: Any = self._model.base_model if self._plain else self._model
        given = {} if cache is None else {"past_key_values": cache}
        out = run(input_ids=ids, use_cache=cache is not None, **given)
        states: Tensor = out.last_hidden_state if self._plain else out.logits
        return states

    def _logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        if not self._plain:
            return states[:, tokens].float()
        logits = states.float() @ self._head.weight[tokens].float().T
        bias = self._head.bias
        return logits if bias is None else logits + bias[tokens].float()


def _shared(texts: Sequence[Placed]) -> int:
    """Return how many first tokens all texts have, before the first place of any."""
    most = min(min(text.places, default=len(text.ids) - 1) for text in texts)
    first = np.array(texts[0].ids[:most])
    for text in texts[1:]:
        differs = np.flatnonzero(first[:most] != np.array(text.ids[:most]))
        most = int(differs[0]) if len(differs) else most
    return most
