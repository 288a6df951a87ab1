"""New text for many prompts at once, the same as for each prompt alone.

A batch changes the last digits of logits, so two tokens that are almost equally good could change
places. Where the best two are that close, the text runs alone and decides. Drawing a token is
choosing the best one as well, after noise of the request's own generator is added to the logits:
that draws from the softmax (Gumbel's trick).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_harvest.pipelines.explain.client.interface import Generation

# Logits of a batch and of a text alone differ less than half of this: in float32 by 1e-4 at most
# in our measurements. In bfloat16 it is no bound, but most of what would change is found.
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


class Continuing:
    """Continues prompts by a model."""

    def __init__(self, model: PreTrainedModel, ends: Collection[int]) -> None:
        """Take a model, and the tokens that end an answer."""
        self._model, self._ends = model, ends
        known = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.pads = "position_ids" in known
        """True if prompts of different lengths may be continued together."""

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Generation]
    ) -> list[list[int]]:
        """Return the new tokens of each prompt."""
        ids, mask = _padded(prompts)
        given: Tensor = ids.to(self._model.device)
        mask = mask.to(self._model.device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        draws = [torch.Generator().manual_seed(request.seed) for request in requests]
        new: list[list[int]] = [[] for _ in prompts]
        rows, past = list(range(len(prompts))), None  # prompts in the batch
        while rows:
            padding = {"attention_mask": mask, "position_ids": position} if self.pads else {}
            out: Any = self._model(
                input_ids=given, past_key_values=past, use_cache=True, **padding, **self._last
            )
            past = out.past_key_values
            for logits, number in zip(out.logits[:, -1].float().cpu(), rows, strict=True):
                alone = [*prompts[number], *new[number]]
                new[number].append(self._chosen(logits, requests[number], draws[number], alone))
            going = [
                row
                for row, number in enumerate(rows)
                if self._goes_on(new[number], requests[number])
            ]
            if len(going) < len(rows):
                kept = torch.tensor(going, dtype=torch.int64, device=self._model.device)
                rows, mask, position = [rows[row] for row in going], mask[kept], position[kept]
                if rows:
                    past.batch_select_indices(kept)
            given = torch.tensor([[new[number][-1]] for number in rows], device=self._model.device)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            position = position[:, -1:] + 1
        return [tokens[:-1] if tokens[-1] in self._ends else tokens for tokens in new]

    def _goes_on(self, new: Sequence[int], request: Generation) -> bool:
        return len(new) < request.max_tokens and new[-1] not in self._ends

    def _chosen(
        self, logits: Tensor, request: Generation, draws: torch.Generator, ids: Sequence[int]
    ) -> int:
        """Choose the token that follows `ids`, by logits of a batch, or by its own if need be."""
        noise = torch.zeros(())
        if request.temperature > 0:
            uniform = torch.rand(len(logits), generator=draws, dtype=torch.float64)
            noise = -request.temperature * (-uniform.log()).log()
        best = (logits + noise).topk(2)
        if best.values[0] - best.values[1] > CLOSE[self._model.dtype]:
            return int(best.indices[0])
        given = torch.tensor([ids], device=self._model.device)
        alone = self._model(input_ids=given, use_cache=False, **self._last).logits[0, -1]
        return int((alone.float().cpu() + noise).argmax())


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 [prompts, tokens], with the padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
