"""Steering: what a model writes while some latents are held at values of our choice.

At the SAE's site, on every row that its rule reads, of the prompt and of what is generated alike,

    x <- x + restore(sum over i of (c_i - z_i) W_dec[i])

where z_i is the activation that the latent has there, 0 where it does not fire, and c_i the value
it is held at ("clamping", Templeton et al. 2024, "Scaling Monosemanticity"). It is the SAE's output
with z_i replaced by c_i, plus what the SAE does not explain of x: the error stays. A transcoder
reads one site, and what its latents would have written changes at the other.
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

MAX_SEED = 2**63  # what a torch generator takes, and more than anyone needs


@dataclass(frozen=True, slots=True)
class Clamp:
    """A latent and the value it is held at, in the units of the tables; 0 takes it away."""

    latent: int
    value: float


@dataclass(frozen=True, slots=True)
class Generated:
    """The text that a model wrote, without the prompt; `token_texts`, joined, are `text`.

    >>> Generated(" Paris.", [" Paris", "."]).text
    ' Paris.'

    It ends with the model's own end token if the model came to one.
    """

    text: str
    token_texts: list[str]


def generate(
    live: LiveModel,
    prompt: str,
    clamps: Sequence[Clamp],
    n_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[str], bool] | None = None,
) -> Generated:
    """Continue a prompt with some latents clamped; without clamps, it is the plain model.

    The prompt is read as a document of the store is, but may be longer than its contexts: prompt
    and continuation together have the model's own limit.

    Args:
        n_tokens: at most; the model may end earlier.
        temperature: 0 takes the likeliest token each time, as transformers' greedy `generate`
            does; above 0, tokens are drawn from softmax(logits / temperature).
        seed: of what is drawn.
        on_token: called after each token with the text so far; generation ends if it returns False.

    Raises:
        InputError: a latent that the SAE lacks or that is given twice, a number that is none or
            out of range, a prompt without tokens or too long, a site that the model does not
            offer, or clamps so strong that the model breaks down.
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
            pad_token_id=live.prefix,  # of a batch's shorter texts: none here
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Told(live, context.shape[1], on_token)]),
        )
    texts = _texts(live, written, context.shape[1])
    return Generated("".join(texts), texts)


def _texts(live: LiveModel, ids: Tensor, begin: int) -> list[str]:
    """Texts of the tokens from `begin` on of ids [1, tokens]."""
    new = ids[0, begin:].cpu().numpy().astype(np.int32)
    return live.texts.window(new[new < len(live.texts)])  # beyond: rows of padding, without text


@contextmanager
def clamped(live: LiveModel, clamps: Sequence[Clamp]) -> Iterator[None]:
    """While open, the latents are clamped in whatever the model does. The caller holds the lock."""
    if not clamps:
        yield
        return
    config = live.sae.config
    target = live.site if config.target_site is None else Site.parse(config.target_site)
    read: list[Tensor] = []  # by a transcoder, in this forward pass

    def keep(x: Tensor) -> Tensor:
        read[:] = [x]
        return x

    def shift(x: Tensor) -> Tensor:
        if target != live.site and not read:
            raise InputError(
                f"The transcoder changes {config.target_site} by what it reads at "
                f"{config.site}, which the model computes later; steer with another one."
            )
        rows = (x if target == live.site else read.pop()).flatten(0, 1)
        change = clamping(live.sae, rows, clamps).masked_fill_(~live.reads(rows)[:, None], 0.0)
        return (x.float() + change.view(x.shape)).to(x.dtype)

    edits = {live.site: keep} | {target: shift}
    with edited(locate(live.model, list(edits)), edits):
        yield


def clamping(sae: SAE, x: Tensor, clamps: Sequence[Clamp]) -> Tensor:
    """The vectors that clamping adds to rows.

    Args:
        x: [rows, d_in], as the model computes them at the site that the SAE reads.

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
    # restore is linear but for what it adds to every reconstruction
    return restore(moved, x, sae.config) - restore(torch.zeros_like(moved), x, sae.config)


class _Finite(LogitsProcessor):
    """Refuses clamps that leave no logits to choose by."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(scores.amax(dim=1).isfinite().all()):
            raise InputError(
                "With latents clamped so far the model's logits are not finite; "
                "use values nearer to those that the latents have in the tables."
            )
        return scores


class _Told(StoppingCriteria):
    """Tells the text so far after each token, and ends where nobody wants more."""

    def __init__(self, live: LiveModel, begin: int, on_token: Callable[[str], bool] | None) -> None:
        self._live, self._begin, self._on_token = live, begin, on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        go_on = True
        if self._on_token is not None:
            text = "".join(_texts(self._live, input_ids, self._begin))
            go_on = self._on_token(text.rstrip(INCOMPLETE))  # half a character is not told yet
        return torch.full((len(input_ids),), not go_on, device=input_ids.device)


class _Drawn(LogitsProcessor):
    """Leaves one token to choose: drawn by a generator of its own, not the process's."""

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
            f"The model sees at most {longest:,} tokens; the prompt has {n_context:,} with the one "
            f"before it, and {n_tokens:,} more were asked for; shorten the prompt or ask for fewer."
        )
