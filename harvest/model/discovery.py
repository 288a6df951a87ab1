"""The modules that compute the sites of a model, found by experiment, not by a table of names.

`probe` runs the model once over a few tokens and finds the list of its blocks. `BlockLab` then
copies one block in float32 and looks for the two modules whose outputs the block adds to the
residual stream: `x + attention + mlp = y`, up to the rounding of two float32 additions. It finds
which of the two is attention, and which projection the neurons go through, by changing an input or
an output and observing the effect. A block that doesn't add two such outputs (norms after the
addition, scaled residuals, state-space layers) has no inner sites, and errors say so.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_harvest.common.errors import InputError

PROBE_TOKENS = 8
# x + a + b rounds twice, in any order: 2 eps for each rounding, and some margin
ROUNDINGS = 8


class BlockCall(NamedTuple):
    """The call that the model made to one block."""

    args: tuple[Any, ...]
    """Positional arguments."""
    kwargs: dict[str, Any]
    """Keyword arguments."""
    place: int | str
    """Position in `args`, or name in `kwargs`, of the residual stream `[1, tokens, d]`."""

    @property
    def residual(self) -> Tensor:
        """The residual stream that enters the block."""
        found: Tensor = (
            self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]
        )
        return found


@dataclass(frozen=True)
class BlockParts:
    """The modules that compute the inner sites, by their names in the block."""

    attention: str
    """Module whose output attention adds to the residual stream."""
    mlp: str
    """Module whose output the MLP adds to the residual stream."""
    parallel: bool
    """True if both read the block's input, so that no residual lies between them."""
    down: str | None
    """Linear map whose input is the neurons; None if no single map decides the MLP's output."""


def first_tensor(output: Any) -> Any:
    """Return the output of a module, or its first element if it is a tuple."""
    return output[0] if isinstance(output, tuple | list) and output else output


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """Make a context of distinct tokens: `[1, PROBE_TOKENS]`, int64, on the model's device."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    steps = torch.arange(1, PROBE_TOKENS + 1, device=model.device)
    return (steps * vocabulary // (PROBE_TOKENS + 1))[None]  # [1, tokens]


def probe(model: PreTrainedModel) -> tuple[nn.ModuleList, list[BlockCall]]:
    """Find the model's blocks, and the call to each of them in one short forward pass.

    The blocks are the module list with `num_hidden_layers` entries through which the residual
    stream `[1, tokens, d_model]` runs: each entry runs once, on the output of the entry before, and
    the output of the last entry alone decides the model's output. Another list may have the same
    number of entries by coincidence, such as the projections of Gemma 3n. Of several such lists,
    one inside another, the largest is chosen. Raises InputError if there is none.
    """
    text = model.config.get_text_config(decoder=True)
    n_layers = text.num_hidden_layers
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    calls: list[list[tuple[int, BlockCall]]] = [[] for _ in lists]
    outputs: list[list[Any]] = [[] for _ in lists]

    def before(which: int, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = _residual_place(args, kwargs, (1, PROBE_TOKENS, text.hidden_size))
            if place is not None:
                # a later block may add to the same memory in place
                args, kwargs = _map_tensors((args, kwargs), Tensor.clone)
                calls[which].append((layer, BlockCall(args, kwargs, place)))

        return hook

    def after(which: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[which].append(_map_tensors(first_tensor(output), Tensor.clone))

        return hook

    with contextlib.ExitStack() as hooks:
        for which, blocks in enumerate(lists):
            for layer, block in enumerate(blocks):
                pre = block.register_forward_pre_hook(before(which, layer), with_kwargs=True)
                hooks.callback(pre.remove)
                hooks.callback(block.register_forward_hook(after(which)).remove)
        end = _last_state(model, probe_tokens(model))
    found = [
        which
        for which, blocks in enumerate(lists)
        if [layer for layer, _ in calls[which]] == list(range(n_layers))
        and _chained([call for _, call in calls[which]], outputs[which])
        and _decides(blocks[-1], outputs[which][-1], model, end)
    ]
    if not found:
        raise InputError(
            f"The blocks of this {model.config.model_type} model were not found: no module list "
            f"with num_hidden_layers = {n_layers} entries passes one residual stream from each "
            "entry to the next and on to the output, so its activations have no layer numbers; "
            "use a plain decoder-only transformer."
        )
    best = max(found, key=lambda which: sum(p.numel() for p in lists[which].parameters()))
    return lists[best], [call for _, call in calls[best]]


def _last_state(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Compute the final hidden states of the model without its head: `[1, tokens, d_model]`."""
    with torch.no_grad():
        output: Tensor = model.base_model(input_ids=tokens, use_cache=False)[0]
        return output


def _chained(calls: list[BlockCall], outputs: list[Any]) -> bool:
    """True if the input of every block is the output of the block before."""
    return all(
        isinstance(before, Tensor) and _same(before, call.residual)
        for before, call in zip(outputs, calls[1:], strict=False)
    )


def _decides(block: nn.Module, output: Any, model: PreTrainedModel, end: Tensor) -> bool:
    """True if `output`, in place of the block's own output, gives `end` for other tokens too."""

    def hold(module: nn.Module, args: Any, there: Any) -> Any:
        if isinstance(there, tuple | list):
            return type(there)((output.clone(), *there[1:]))
        return output.clone()

    handle = block.register_forward_hook(hold)
    try:
        return isinstance(output, Tensor) and _same(
            _last_state(model, probe_tokens(model) + 1), end
        )
    finally:
        handle.remove()


def _same(a: Tensor, b: Tensor) -> bool:
    """True for the same values in any shape; a NaN is the same as another."""
    return a.numel() == b.numel() and torch.allclose(
        a.reshape(-1), b.reshape(-1), rtol=0, atol=0, equal_nan=True
    )


class BlockLab:
    """Experiments on one block, copied in float32, with the call the model made to it."""

    def __init__(self, block: nn.Module, call: BlockCall) -> None:
        self._block = copy.deepcopy(block).float()
        args, kwargs = _map_tensors((call.args, call.kwargs), _as_float32)
        self._call = BlockCall(args, kwargs, call.place)
        self._x = self._call.residual
        self._generator = torch.Generator().manual_seed(0)

    def parts(self) -> BlockParts | None:
        """Find the block's attention, MLP and down projection; None if that fails."""
        y, outputs = self._run(self._x)
        pair = self._addends(y, outputs)
        if pair is None:
            return None
        first, second = pair
        _, after = self._run(self._x, {first: self._shifted})
        parallel = torch.equal(after[second], outputs[second])
        if not parallel:
            # the second always mixes positions here, because it reads the first one's output
            attention, mlp = first, second
        else:
            attention, mlp = (first, second) if self._mixes(first, outputs) else (second, first)
            if self._mixes(mlp, outputs):
                return None
        if not self._mixes(attention, outputs):
            return None
        return BlockParts(attention, mlp, parallel, self._down(mlp, outputs))

    def _addends(self, y: Tensor, outputs: dict[str, Tensor]) -> tuple[str, str] | None:
        """Find the outermost two modules, in the order they ran, with `x + a + b == y`."""
        x = self._x.flatten(0, 1)  # [tokens, d]
        y = y.reshape(x.shape)
        names = [name for name, output in outputs.items() if output.shape == x.shape]
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        for a, b in sorted(pairs, key=lambda pair: pair[0].count(".") + pair[1].count(".")):
            first, second = outputs[a], outputs[b]
            size = x.abs() + first.abs() + second.abs()
            allowed = ROUNDINGS * torch.finfo(torch.float32).eps * size
            if ((x + first + second - y).abs() <= allowed).all():
                return a, b
        return None

    def _mixes(self, name: str, outputs: dict[str, Tensor]) -> bool:
        """Whether the module's output at the last position depends on the input before it."""
        x = self._x.clone()
        x[:, -2] = self._shifted(x[:, -2])
        _, after = self._run(x)
        return not torch.equal(after[name][-1], outputs[name][-1])

    def _down(self, mlp: str, outputs: dict[str, Tensor]) -> str | None:
        """Find the last linear map that alone decides the MLP's output.

        With its output held fixed, the MLP's output must not depend on the block's input. The
        experts of a mixture fail this test, and so does a shared expert beside them.
        """
        modules = dict(self._block.named_modules())
        elsewhere = self._shifted(self._x)
        for name in reversed(outputs):
            if not _is_linear(modules[name]) or outputs[name].shape != outputs[mlp].shape:
                continue
            held = self._shifted(outputs[name])
            replace = {name: lambda output, held=held: held.view_as(output)}
            _, here = self._run(self._x, replace)
            _, there = self._run(elsewhere, replace)
            if torch.equal(here[mlp], there[mlp]):
                return name
        return None

    def _shifted(self, tensor: Tensor) -> Tensor:
        """Add noise of the tensor's own size to it."""
        noise = torch.randn(tensor.shape, generator=self._generator).to(tensor.device)
        return tensor + noise * tensor.abs().mean().clamp_min(1e-3)

    def _run(
        self, x: Tensor, replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the block; return its output `[1, tokens, d]`, and those of modules that ran once.

        Module outputs are `[tokens, width]`, in the order in which the modules ended. `replace`
        maps module names to functions that change an output before anything reads it.
        """
        outputs: dict[str, Tensor] = {}
        repeated: set[str] = set()

        def listen(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                tensor = first_tensor(output)
                if not isinstance(tensor, Tensor):
                    return None
                if replace and name in replace:
                    tensor = replace[name](tensor)
                    output = (tensor, *output[1:]) if isinstance(output, tuple) else tensor
                if name in outputs:
                    repeated.add(name)
                if tensor.ndim and tensor.numel() == PROBE_TOKENS * tensor.shape[-1]:
                    outputs[name] = tensor.reshape(PROBE_TOKENS, -1).clone()  # [tokens, width]
                return output

            return hook

        handles = [
            module.register_forward_hook(listen(name))
            for name, module in self._block.named_modules()
            if name
        ]
        args, kwargs = list(self._call.args), dict(self._call.kwargs)
        if isinstance(self._call.place, int):
            args[self._call.place] = x.clone()
        else:
            kwargs[self._call.place] = x.clone()
        try:
            with torch.no_grad():
                y = first_tensor(self._block(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
        return y, {name: output for name, output in outputs.items() if name not in repeated}


def _residual_place(
    args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...]
) -> int | str | None:
    """Find the first argument that is a floating-point tensor of this shape."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in named:
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape:
            return place
    return None


def _is_linear(module: nn.Module) -> bool:
    """True for a leaf with one matrix: `nn.Linear`, or the transposed `Conv1D` of GPT-2."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and not isinstance(module, nn.Embedding)
        and not any(module.children())
    )


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value
