"""Steering: the text that a model writes while some latents are clamped.

At the SAE's site, on every row that its rule reads, in the prompt and in the generated text,

    x <- x + restore(sum over i of (c_i - z_i) W_dec[i])

where z_i is the activation of latent i on that row, 0 where it does not fire, and c_i the value
that it is held at ("clamping", Templeton et al. 2024, "Scaling Monosemanticity"). The result is the
SAE's output with z_i replaced by c_i, plus the SAE's error on x, which is kept. A transcoder reads
z_i at its own site, and the vector is added at the site that it predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.hooks import edited
from sae_harvest.harvest.model.sites import Site, locate
from sae_harvest.pipelines.features.tables.texts import INCOMPLETE
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.train.sae.normalization import restore
from sae_harvest.train.sae.sae import SAE

MAX_SEED = 2**63  # exclusive; the limit of a torch generator


@dataclass(frozen=True, slots=True)
class Clamp:
    """A latent and the value that it is held at."""

    latent: int
    """Number of the latent, from 0."""

    value: float
    """Activation in the units of the tables; 0 takes the latent away."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The text that a model wrote.

    >>> Generated(" Paris.", [" Paris", "."]).text
    ' Paris.'
    """

    text: str
    """The text without the prompt, with the model's end token if it wrote one."""

    token_texts: list[str]
    """Texts of the tokens; joined, they are `text`."""


def generate(
    live: LiveModel,
    prompt: str,
    clamps: Sequence[Clamp],
    n_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[str], bool] | None = None,
) -> Generated:
    """Continue a prompt with some latents clamped; without clamps, the model is unchanged.

    The prompt is tokenized like a document of the store. It may be longer than a context: prompt
    and continuation together must fit in the longest input of the model.

    Args:
        n_tokens: largest number of tokens to write; the model may end earlier.
        temperature: 0 takes the likeliest token each time, as transformers' greedy `generate`
            does; above 0, tokens are drawn from softmax(logits / temperature).
        seed: seed of the draws.
        on_token: called after each token with the text so far; generation ends if it returns False.

    Raises:
        InputError: a clamp names a latent that does not exist or is given twice, a number is not
            finite or out of range, the prompt has no tokens or is too long, a transcoder reads its
            site after the site that it changes, or the clamps make the logits infinite or NaN.
    """
    _check_clamps(clamps, live.n_latents)
    if n_tokens < 1:
        raise InputError(f"Asked for {n_tokens} tokens; ask for at least 1.")
    if not 0 <= temperature < math.inf:
        raise InputError(f"The temperature is {temperature}; give 0 or a positive number.")
    if not 0 <= seed < MAX_SEED:
        raise InputError(f"The seed is {seed}; give a whole number from 0 to {MAX_SEED - 1}.")
    context = live.context(live.tokens(prompt))  # [1, 1 + tokens]
    _check_length(live.model, context.shape[1], n_tokens)
    processors = LogitsProcessorList()
    if clamps:
        processors.append(_Finite())
    if temperature:
        processors.append(_Drawn(temperature, seed))
    with live.lock, clamped(live, clamps):
        written = live.model.generate(
            context,
            attention_mask=torch.ones_like(context),
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=live.prefix,  # required, but unused: the batch has one text
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Told(live, context.shape[1], on_token)]),
        )
    texts = _texts(live, written, context.shape[1])
    return Generated("".join(texts), texts)


def _texts(live: LiveModel, ids: Tensor, begin: int) -> list[str]:
    """Return the texts of the tokens of ids [1, tokens] from place `begin` to the end."""
    new = ids[0, begin:].cpu().numpy().astype(np.int32)
    return live.texts.window(new[new < len(live.texts)])  # higher ids are padding, without text


@contextmanager
def clamped(live: LiveModel, clamps: Sequence[Clamp]) -> Iterator[None]:
    """Clamp the latents in every forward pass while it is open. The caller holds the lock."""
    if not clamps:
        yield
        return
    config = live.sae.config
    target = live.site if config.target_site is None else Site.parse(config.target_site)
    read: list[Tensor] = []  # a transcoder's input in this forward pass

    def keep(x: Tensor) -> Tensor:
        read[:] = [x]
        return x

    def shift(x: Tensor) -> Tensor:
        if target != live.site and not read:
            raise InputError(
                f"The transcoder reads {config.site}, which the model computes after "
                f"{config.target_site}, the site to change; steer with another one."
            )
        rows = (x if target == live.site else read.pop()).flatten(0, 1)
        change = clamping(live.sae, rows, clamps).masked_fill_(~live.reads(rows)[:, None], 0.0)
        return (x.float() + change.view(x.shape)).to(x.dtype)

    edits = {live.site: keep} | {target: shift}
    with edited(locate(live.model, list(edits)), edits):
        yield


def clamping(sae: SAE, x: Tensor, clamps: Sequence[Clamp]) -> Tensor:
    """Compute the vectors that clamping adds to rows.

    Args:
        x: rows of the model at the site that the SAE reads, [rows, d_in].

    Returns:
        float32 [rows, width_out], in the units of the model.
    """
    x = sae.check_rows(x)
    indices, values = sae.encode(x)
    latents = torch.tensor([clamp.latent for clamp in clamps], device=x.device)
    wanted = torch.tensor([clamp.value for clamp in clamps], device=x.device)
    there = indices[:, :, None] == latents  # [rows, w, clamps]
    now = (values[:, :, None] * there).sum(dim=1)  # [rows, clamps]
    moved = (wanted - now) @ sae.W_dec[latents]  # [rows, width_out]
    # restore is linear except for a constant that it adds to every reconstruction
    return restore(moved, x, sae.config) - restore(torch.zeros_like(moved), x, sae.config)


class _Finite(LogitsProcessor):
    """Check of the logits; raises `InputError` if the clamps made them infinite or NaN."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(scores.amax(dim=1).isfinite().all()):
            raise InputError(
                "With these clamps the model's logits are not finite; "
                "use values closer to the activations that the latents have in the tables."
            )
        return scores


class _Told(StoppingCriteria):
    """Call of `on_token` after each token; generation ends when it returns False."""

    def __init__(self, live: LiveModel, begin: int, on_token: Callable[[str], bool] | None) -> None:
        self._live, self._begin, self._on_token = live, begin, on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        go_on = True
        if self._on_token is not None:
            text = "".join(_texts(self._live, input_ids, self._begin))
            go_on = self._on_token(text.rstrip(INCOMPLETE))  # without half a character at the end
        return torch.full((len(input_ids),), not go_on, device=input_ids.device)


class _Drawn(LogitsProcessor):
    """Draw of the next token with its own random generator; all other logits become -inf."""

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.cpu().double()
        logits = (logits - logits.amax(dim=1, keepdim=True)) / self._temperature
        drawn = torch.multinomial(logits.softmax(dim=1), 1, generator=self._generator)
        only = torch.full_like(scores, -math.inf)
        return only.scatter_(1, drawn.to(scores.device), 0.0)


def _check_clamps(clamps: Sequence[Clamp], n_latents: int) -> None:
    seen: set[int] = set()
    for clamp in clamps:
        if not 0 <= clamp.latent < n_latents:
            raise InputError(
                f"There is no latent {clamp.latent}; this SAE has 0 to {n_latents - 1}."
            )
        if not math.isfinite(clamp.value):
            raise InputError(
                f"Latent {clamp.latent} cannot be held at {clamp.value}; give a finite number."
            )
        if clamp.latent in seen:
            raise InputError(f"Latent {clamp.latent} is clamped twice; give one value for it.")
        seen.add(clamp.latent)


def _check_length(model: PreTrainedModel, n_context: int, n_tokens: int) -> None:
    text = model.config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if longest and n_context + n_tokens > longest:
        raise InputError(
            f"The model sees at most {longest:,} tokens; the prompt has {n_context:,} with the "
            f"token before it, and {n_tokens:,} more are asked for; shorten the prompt, or ask for "
            "fewer tokens."
        )
