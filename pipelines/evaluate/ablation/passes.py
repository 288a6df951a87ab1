"""Logits of a context's tokens, with and without changes at one site.

Many changes of the same context are one batch, with the plain context as its first entry, so that
all logits that are compared come from one computation. Positions before the first change are
the same for all: they run once, and their keys and values are repeated for the batch. Positions
after the last token that is looked at do not run. Both are exact in a causal model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_harvest.harvest.model.hooks import edited
from sae_harvest.harvest.model.sites import Located, Site
from sae_harvest.pipelines.evaluate.ablation.changes import Change

BATCH_LOGITS = 1 << 25  # logits of a batch, 4 bytes each
BATCH_TOKENS = 1 << 11  # tokens of a batch


def changed_logits(
    model: PreTrainedModel,
    located: dict[Site, Located],
    site: Site,
    tokens: Tensor,
    n_tokens: int,
    changes: Sequence[Change],
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for each change, its number, the plain logits and the changed logits.

    Args:
        model: the model in evaluation mode.
        located: the modules of the site; see `locate`.
        site: the site whose activations change.
        tokens: int64 [tokens], the context up to the last token whose logits are wanted.
        n_tokens: number of tokens at the end whose logits are wanted.
        changes: the changes; each begins at the first of these tokens, or before it.

    Yields:
        the number of the change; logits [n_tokens, vocabulary] without and with it, in the dtype of
        the model. They are overwritten when the next change is asked for.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    order = sorted(range(len(changes)), key=lambda number: (changes[number].start, number))
    starts = [changes[number].start for number in order]
    for first, last in pairwise(_cuts(starts, len(tokens), n_tokens, vocabulary)):
        some = [changes[number] for number in order[first:last]]
        logits = _batch(model, located, site, tokens, some[0].start, n_tokens, some)
        for place, number in enumerate(order[first:last], start=1):
            yield number, logits[0], logits[place]


def _cuts(starts: Sequence[int], length: int, n_tokens: int, vocabulary: int) -> list[int]:
    """Divide changes, sorted by their first position, into batches; return the limits.

    A batch runs from its earliest change on, so a change that begins much later is left to the
    next batch.
    """
    most = max(2, BATCH_LOGITS // (n_tokens * vocabulary)) - 1  # one entry is plain
    cuts = [0]
    for number, start in enumerate(starts):
        begun, size = starts[cuts[-1]], number - cuts[-1]
        far = start - begun > n_tokens
        full = (size + 2) * (length - begun) > BATCH_TOKENS
        if size and (size >= most or far or full):
            cuts.append(number)
    return [*cuts, len(starts)] if starts else []


def _batch(
    model: PreTrainedModel,
    located: dict[Site, Located],
    site: Site,
    tokens: Tensor,
    start: int,
    n_tokens: int,
    changes: Sequence[Change],
) -> Tensor:
    """Return logits of the last tokens, [1 + changes, n_tokens, vocabulary]; the first is plain."""
    n = 1 + len(changes)
    entry = torch.cat(
        [torch.full_like(c.position, number) for number, c in enumerate(changes, start=1)]
    )
    position = torch.cat([change.position for change in changes]) - start
    vector = torch.cat([change.vector for change in changes])

    def add(x: Tensor) -> Tensor:
        """Change [1 + changes, suffix, width]."""
        out = x.clone()
        out[entry, position] += vector.to(x.dtype)
        return out

    ids = tokens[None]
    with torch.inference_mode():
        past = None
        if start:
            past = model(input_ids=ids[:, :start], use_cache=True, **_kept(model, 1))
            past = past.past_key_values
            past.batch_repeat_interleave(n)
        with edited(located, {site: add}):
            out = model(
                input_ids=ids[:, start:].expand(n, -1),
                past_key_values=past,
                use_cache=past is not None,
                **_kept(model, n_tokens),
            )
        logits: Tensor = out.logits[:, -n_tokens:]
        return logits


def _kept(model: PreTrainedModel, n_tokens: int) -> dict[str, int]:
    """Return the argument with which a model computes logits of the last tokens only."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": n_tokens} if "logits_to_keep" in known else {}
