"""Sites, the places in a model that are harvested, and the tap that reads them.

    resid_pre.L   the residual stream entering block L          [batch, ctx, d_model]
    attn_out.L    what attention adds to it
    resid_mid.L   resid_pre.L + attn_out.L; not where attention and MLP run in parallel
    mlp_act.L     the neurons: input of the MLP's last projection [batch, ctx, d_mlp]
    mlp_out.L     what the MLP adds to the residual stream
    resid_post.L  the residual stream leaving block L, before any final norm

Blocks are counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.discovery import (
    BlockLab,
    BlockParts,
    first_tensor,
    probe,
    probe_tokens,
)

SITE_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act")
_INNER_KINDS = frozenset({"resid_mid", "attn_out", "mlp_out", "mlp_act"})


@dataclass(frozen=True)
class Site:
    """One place in a model: a kind of activation and the block it belongs to, from 0."""

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in SITE_KINDS or self.layer < 0:
            raise InputError(_not_a_site(f"{self.kind}.{self.layer}"))

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that `resid_post.12` names. Raises InputError for any other spelling."""
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
    """A site's modules.

    place: where a call of the block has the residual stream, a position or a keyword;
    parts: paths of the modules within the block, of inner sites only.
    """

    block: nn.Module
    place: int | str
    parts: BlockParts | None


def locate(model: PreTrainedModel, sites: Sequence[Site]) -> dict[Site, Located]:
    """Find sites by running the model over a few tokens (see `harvest.model.discovery`).

    Raises InputError for a layer out of range or a site that the architecture doesn't offer.
    """
    return _locate(model, sites)[1]


def _locate(
    model: PreTrainedModel, sites: Sequence[Site]
) -> tuple[nn.ModuleList, dict[Site, Located]]:
    """The model's blocks, and `locate`."""
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


class SiteTap:
    """Reads several sites of a model in one forward pass that stops after the last of them.

    The blocks after it, the final norm and the LM head never run. Building a tap runs the model
    over a few tokens, to find the sites (see `locate`) and their widths. Between calls
    the model works as ever, and several taps can share it. Use a tap as a context manager, or call
    `close`, to take its hooks off again. Calls of one tap must not overlap.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        before_block: Callable[[], None] = lambda: None,
    ) -> None:
        """`model` is a causal LM of transformers, in evaluation mode; `sites` are distinct.

        `before_block` is called before every block that runs for the tap. What it raises ends the
        pass: a batch of a large model may take a minute, one block of it a second.

        Raises InputError for a layer out of range or a site that the architecture doesn't offer.
        """
        if not sites or len(set(sites)) != len(sites):
            raise InputError(f"Sites must be given once each, and at least one; got {len(sites)}.")
        if model.training:
            raise ValueError("the model is in training mode: dropout would change its activations")
        self._model = model
        self._base = model.base_model
        self._names = tuple(str(site) for site in sites)
        self._captured: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}  # resid_mid only: what its block was given
        self._shape: tuple[int, int] = (0, 0)
        self._listening = False  # so that the model can be used otherwise, or by another tap
        self._copied: set[str] = set()
        self._versions: list[tuple[str, Tensor, int]] | None = None
        self._handles: list[Any] = []
        blocks, located = _locate(model, sites)
        try:
            for block in blocks:
                self._watch(block, before_block)
            for site in sites:
                self._attach(site, located[site])
            self.widths: dict[str, int] = self._rehearse()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SiteTap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off the model. The tap can't be used afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Site name to activations `[batch, ctx, width]`, in the model's dtype and on its device.

        `input_ids` is `[batch, ctx]`, int32 or int64, and every position counts: no mask is used.
        The tensors are inference tensors, sites may share memory, and are good until changed.
        """
        with torch.inference_mode():
            return self._forward(input_ids)

    def _forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        self._shape = (input_ids.shape[0], input_ids.shape[1])
        self._listening = True
        try:
            self._base(input_ids=input_ids.to(self._model.device), use_cache=False)
        except _AllCaptured:
            return {name: self._captured[name] for name in self._names}
        finally:
            self._listening = False
            self._captured, self._inputs = {}, {}
        raise RuntimeError("the forward pass ended before every site was reached")

    def _rehearse(self) -> dict[str, int]:
        """Run once over a few tokens: widths, and which sites must be copied.

        Outside inference mode a tensor counts the changes made to it in place; a captured one
        that changes before the pass ends has to be copied when it is captured.
        """
        self._versions = []
        with torch.no_grad():
            captured = self._forward(probe_tokens(self._model))
        self._copied = {name for name, tensor, seen in self._versions if tensor._version != seen}
        self._versions = None
        return {name: tensor.shape[-1] for name, tensor in captured.items()}

    def _watch(self, block: nn.Module, before_block: Callable[[], None]) -> None:
        def hook(module: nn.Module, args: Any) -> None:
            if self._listening:
                before_block()

        self._handles.append(block.register_forward_pre_hook(hook))

    def _attach(self, site: Site, located: Located) -> None:
        """Put the hooks for one site on the model."""
        name = str(site)
        block, place, parts = located.block, located.place, located.parts

        def given(args: Any, kwargs: Any) -> Tensor:
            return args[place] if isinstance(place, int) else kwargs[place]

        def before_block(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._listening:
                self._keep(name, given(args, kwargs))

        def after_module(module: nn.Module, args: Any, output: Any) -> None:
            if self._listening:
                self._keep(name, first_tensor(output))

        def before_sum(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._listening:
                self._inputs[name] = self._guarded(name, given(args, kwargs))

        def after_attention(module: nn.Module, args: Any, output: Any) -> None:
            if self._listening:
                self._keep(name, self._inputs[name] + self._shaped(first_tensor(output)))

        def before_projection(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._listening:
                self._keep(name, args[0])

        def on_input(module: nn.Module, hook: Callable[..., None]) -> None:
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        def on_output(module: nn.Module, hook: Callable[..., None]) -> None:
            self._handles.append(module.register_forward_hook(hook))

        if site.kind == "resid_pre":
            on_input(block, before_block)
        elif site.kind == "resid_post":
            on_output(block, after_module)
        elif parts is None:
            raise AssertionError("inner sites come with their parts")
        elif site.kind == "attn_out":
            on_output(block.get_submodule(parts.attention), after_module)
        elif site.kind == "mlp_out":
            on_output(block.get_submodule(parts.mlp), after_module)
        elif site.kind == "resid_mid":
            on_input(block, before_sum)
            on_output(block.get_submodule(parts.attention), after_attention)
        elif parts.down is not None:
            on_input(block.get_submodule(parts.down), before_projection)

    def _shaped(self, tensor: Tensor) -> Tensor:
        """`[batch, ctx, width]`, from modules that see all positions as one batch (OPT) too."""
        return tensor if tensor.ndim == 3 else tensor.reshape(*self._shape, -1)

    def _guarded(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, copied if the rehearsal saw it change later in the pass."""
        if self._versions is not None:
            self._versions.append((name, tensor, tensor._version))
        return tensor.clone() if name in self._copied else tensor

    def _keep(self, name: str, tensor: Tensor) -> None:
        """Capture one site; end the forward pass when it was the last one wanted."""
        self._captured[name] = self._guarded(name, self._shaped(tensor))
        if len(self._captured) == len(self._names):
            raise _AllCaptured


class _AllCaptured(Exception):
    """Ends a forward pass from inside a hook; never leaves this module."""


def _not_a_site(text: str) -> str:
    return (
        f"{text!r} is not a site: expected KIND.LAYER with KIND one of {', '.join(SITE_KINDS)} "
        "and LAYER counted from 0, such as resid_post.8."
    )


def _required(parts: BlockParts | None, site: Site, model: PreTrainedModel) -> BlockParts:
    """The block's parts, if they are enough for the site; InputError otherwise."""
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
