"""Hooks that read and change the activations of sites during a forward pass.

`SiteTap` reads sites in a pass of its own, which stops after the last of them. `edited` changes
activations in every forward pass of the model while it is open. A tap reads the results of open
edits, whichever of the two was made first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_harvest.common.errors import InputError
from sae_harvest.common.private_apis import n_changes
from sae_harvest.harvest.model.discovery import first_tensor, probe_tokens
from sae_harvest.harvest.model.sites import Located, Site, locate_in_blocks

Edit = Callable[[Tensor], Tensor]  # activations [batch, position, width] to new ones of that shape

_Visit = Callable[[Tensor], Tensor | None]  # as Edit; None leaves the activations as they are


class SiteTap:
    """Reads several sites of a model in one forward pass that stops after the last of them.

    The blocks after it, the final norm and the LM head never run. Building a tap runs the model
    over a few tokens, to find the sites (see `locate`) and their widths. A tap has hooks on the
    model during its own passes only. Several taps can share a model; their calls must not overlap.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        before_block: Callable[[], None] = lambda: None,
    ) -> None:
        """Take a causal LM of transformers in evaluation mode, and distinct sites.

        `before_block` is called before every block that runs for the tap. An exception from it ends
        the pass: a batch of a large model may take a minute, one block a second.

        Raises InputError for a layer out of range or a site that the architecture doesn't offer.
        """
        if not sites or len(set(sites)) != len(sites):
            raise InputError(f"Sites must be given once each, and at least one; got {len(sites)}.")
        if model.training:
            raise ValueError("the model is in training mode: dropout would change its activations")
        self._model = model
        self._base = model.base_model
        self._before_block = before_block
        self._blocks, self._located = locate_in_blocks(model, sites)
        self._copied: set[Site] = set()
        self._versions: list[tuple[Site, Tensor, int]] | None = None
        self.widths: dict[str, int] = self._rehearse()

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return activations `[batch, ctx, width]` by site, in the model's dtype and on its device.

        `input_ids` is `[batch, ctx]`, int32 or int64. No mask is used, so every position is read.
        The results are inference tensors. Sites may share memory: do not change them in place.
        """
        with torch.inference_mode():
            return self._forward(input_ids)

    def _forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        captured: dict[Site, Tensor] = {}

        def keep(site: Site, tensor: Tensor) -> None:
            captured[site] = self._guarded(site, tensor)
            if len(captured) == len(self._located):
                raise _AllCaptured

        def before(module: nn.Module, args: Any) -> None:
            self._before_block()

        with ExitStack() as stack:
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(before).remove)
            visits = {site: partial(keep, site) for site in self._located}
            stack.enter_context(_hooked(self._located, visits))
            try:
                self._base(input_ids=input_ids.to(self._model.device), use_cache=False)
            except _AllCaptured:
                return {str(site): captured[site] for site in self._located}
        raise RuntimeError("the forward pass ended before every site was reached")

    def _rehearse(self) -> dict[str, int]:
        """Run once over a few tokens to find the widths, and the sites that must be copied.

        Outside inference mode, a tensor counts its in-place changes. A captured tensor that changes
        before the pass ends has to be copied at its capture.
        """
        self._versions = []
        with torch.no_grad():
            captured = self._forward(probe_tokens(self._model))
        self._copied = {site for site, tensor, seen in self._versions if n_changes(tensor) != seen}
        self._versions = None
        return {name: tensor.shape[-1] for name, tensor in captured.items()}

    def _guarded(self, site: Site, tensor: Tensor) -> Tensor:
        """Return the tensor, copied if the rehearsal saw it change later in the pass."""
        if self._versions is not None:
            self._versions.append((site, tensor, n_changes(tensor)))
        return tensor.clone() if site in self._copied else tensor


@contextmanager
def edited(located: Mapping[Site, Located], edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Replace activations by the results of edits, in every forward pass while this is open.

    An edit is called with the activations of its site, `[batch, position, width]`, before anything
    reads them. It returns new ones of the same shape, dtype and device. It may return its argument
    but must not write into it. With a KV cache, positions are those of the new tokens only.

    At `resid_mid` the output of attention is changed, such that its sum with the block's input is
    the edit's result, up to the rounding of that sum. Where the edit changes nothing, the values
    stay the same to the bit.

    Args:
        located: the modules of the sites, from `locate`. Call it, and build taps, before this: both
            run the model over a few tokens, and open edits would change these runs.
        edits: one function for each site to change, any number of them.

    Raises:
        ValueError: in the forward pass, if an edit returned another shape, dtype or device.
    """
    visits = {site: partial(_checked, site, edit) for site, edit in edits.items()}
    with _hooked(located, visits):
        yield


def _checked(site: Site, edit: Edit, activations: Tensor) -> Tensor:
    """Return the edit's result, after a check of shape, dtype and device."""
    returned = edit(activations)
    expected, got = _kind(activations), _kind(returned)
    if got != expected:
        raise ValueError(f"the edit of {site} returned {got}, expected {expected}")
    return returned


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} on {value.device}"


class _AllCaptured(Exception):
    """Ends a forward pass from inside a hook; never leaves this module."""


@contextmanager
def _hooked(located: Mapping[Site, Located], visits: Mapping[Site, _Visit]) -> Iterator[None]:
    """Call each function with the activations of its site, while this is open."""
    with ExitStack() as stack:
        # Hooks of one module run in the order of their registration, and attn_out and resid_mid
        # are both hooks of the attention module.
        for site in sorted(visits, key=lambda site: site.order):
            for handle in _register(site.kind, located[site], visits[site]):
                stack.callback(handle.remove)
        yield


def _register(kind: str, located: Located, visit: _Visit) -> list[Any]:
    """Register the hooks of one site; return their handles."""
    block, place, parts = located.block, located.place, located.parts
    entered: list[Tensor] = []  # the block's input, until attention has ended; for resid_mid only
    shape: list[int] = []  # batch and positions, for modules that take both as one dimension (OPT)

    def given(args: Any, kwargs: Any) -> Tensor:
        tensor: Tensor = args[place] if isinstance(place, int) else kwargs[place]
        return tensor

    def visited(tensor: Tensor) -> Tensor | None:
        if tensor.ndim == 3:
            return visit(tensor)
        new = visit(tensor.reshape(*shape, -1))
        return None if new is None else new.reshape(tensor.shape)

    def before_block(module: nn.Module, args: Any, kwargs: Any) -> Any:
        new = visit(given(args, kwargs))
        if new is None:
            return None
        if isinstance(place, int):
            return (*args[:place], new, *args[place + 1 :]), kwargs
        return args, kwargs | {place: new}

    def enter_block(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = given(args, kwargs)
        shape[:] = x.shape[:2]
        if kind == "resid_mid":
            entered[:] = [x]

    def after_attention(module: nn.Module, args: Any, output: Any) -> Any:
        attention, x = first_tensor(output), entered.pop()
        added = attention.reshape(x.shape)
        new = visit(x + added)
        if new is None:
            return None
        added = torch.where(new == x + added, added, new - x)
        return _with_first(output, added.reshape(attention.shape))

    def after_module(module: nn.Module, args: Any, output: Any) -> Any:
        new = visited(first_tensor(output))
        return None if new is None else _with_first(output, new)

    def before_projection(module: nn.Module, args: Any) -> Any:
        new = visited(args[0])
        return None if new is None else (new, *args[1:])

    if kind == "resid_pre":
        return [block.register_forward_pre_hook(before_block, with_kwargs=True)]
    if kind == "resid_post":
        return [block.register_forward_hook(after_module)]
    assert parts is not None  # or it was not located
    enter = block.register_forward_pre_hook(enter_block, with_kwargs=True)
    if kind == "mlp_act":
        assert parts.down is not None
        down = block.get_submodule(parts.down)
        return [enter, down.register_forward_pre_hook(before_projection)]
    part = block.get_submodule(parts.mlp if kind == "mlp_out" else parts.attention)
    hook = after_attention if kind == "resid_mid" else after_module
    return [enter, part.register_forward_hook(hook)]


def _with_first(output: Any, tensor: Tensor) -> Any:
    """Replace the first tensor of a module's output; keep the type of the output."""
    if isinstance(output, tuple | list):
        return type(output)((tensor, *output[1:]))
    return tensor
