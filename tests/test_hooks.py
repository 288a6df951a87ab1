"""Edits put exactly what they return in a site's place, in any family, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_harvest.harvest.model.hooks import SiteTap, edited
from sae_harvest.harvest.model.sites import Site, locate
from tests.families import (
    BATCH,
    CONTEXT,
    FAMILIES,
    LAYERS,
    WIDTH,
    build,
    by_hand,
    n_hooks,
    offered,
    sites,
    token_ids,
)

LAYER = 1
IDS = token_ids()
# tuples and tensors, a middle and none
EDITED = ["gpt2", "llama", "gpt_neox"]
CASES = [(name, site) for name in EDITED for site in offered(name) if site.layer == LAYER]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: build(FAMILIES[name].config()) for name in EDITED}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


def noise(like: Tensor, seed: int = 5) -> Tensor:
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * like.float().std()).to(like.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "site"), CASES)
def test_what_was_written_is_read(name: str, site: Site, dtype: torch.dtype) -> None:
    model = build(FAMILIES[name].config()).to(dtype)
    before = Site("resid_pre", LAYER)
    tap = SiteTap(model, [site] if site == before else [site, before])
    plain = tap(IDS)
    written = noise(plain[str(site)])
    with edited(locate(model, [site]), {site: lambda x: written}):
        read = tap(IDS)[str(site)]
    assert not torch.equal(written, plain[str(site)])
    if site.kind == "resid_mid":  # a sum, and two roundings: of the difference, and of the sum
        size = plain[str(before)].abs() + written.abs()
        assert ((read - written).abs() <= 2 * torch.finfo(dtype).eps * size).all()
    else:
        assert torch.equal(read, written)
    assert torch.equal(tap(IDS)[str(site)], plain[str(site)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EDITED)
def test_what_was_read_and_is_written_back_leaves_the_logits_to_the_bit(
    name: str, dtype: torch.dtype
) -> None:
    model = build(FAMILIES[name].config()).to(dtype)
    wanted = logits(model)
    read = SiteTap(model, offered(name))(IDS)
    located = locate(model, offered(name))
    back = {site: lambda x, site=site: read[str(site)].clone() for site in offered(name)}
    for site in offered(name):
        with edited(located, {site: back[site]}):
            assert torch.equal(logits(model), wanted), site
    with edited(located, back):
        assert torch.equal(logits(model), wanted)


@contextmanager
def added_by_hand(model: PreTrainedModel, name: str, kind: str, vector: Tensor) -> Any:
    """The model with the `forward` of one module replaced by one that adds a vector."""
    family = FAMILIES[name]
    block = model.get_submodule(family.blocks)[LAYER]
    part = {"attn_out": "attention", "resid_mid": "attention", "mlp_out": "mlp", "mlp_act": "down"}
    module = block.get_submodule(getattr(family, part[kind])) if kind in part else block
    plain: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kind in ("resid_pre", "mlp_act"):
            return plain(args[0] + vector, *args[1:], **kwargs)
        output = plain(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] + vector, *output[1:])
        return output + vector

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@pytest.mark.parametrize(("name", "site"), CASES)
def test_an_added_vector_is_that_of_a_module_changed_by_hand(
    name: str, site: Site, models: dict[str, PreTrainedModel]
) -> None:
    model = models[name]
    plain = logits(model)
    vector = torch.linspace(-1, 1, SiteTap(model, [site]).widths[str(site)])
    with added_by_hand(model, name, site.kind, vector):
        wanted = logits(model)
    with edited(locate(model, [site]), {site: lambda x: x + vector}):
        got = logits(model)
    if site.kind == "resid_mid":  # attention + vector, against (x + attention + vector) - x
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, wanted)
    assert (wanted - plain).abs().max() > 0.1
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_every_family_can_be_edited(name: str) -> None:
    """What is added at a site reaches the next block as the site's part of the sum does."""
    model = build(FAMILIES[name].config())
    plain = by_hand(name, model, IDS)
    mlp, there = f"mlp_out.{LAYER}", f"resid_pre.{LAYER + 1}"
    tap = SiteTap(model, sites(mlp, there))
    for site in [s for s in offered(name) if s.layer == LAYER]:
        activations = plain[str(site)]
        shift = torch.linspace(-1, 1, activations.shape[-1])
        shapes: list[Any] = []

        def add(x: Tensor, shift: Tensor = shift, shapes: list[Any] = shapes) -> Tensor:
            shapes.append(x.shape)
            return x + shift

        with edited(locate(model, [site]), {site: add}):
            seen = tap(IDS)
        assert shapes == [activations.shape]
        assert (seen[there] - plain[there]).abs().max() > 0.01
        if site.kind in ("resid_post", "mlp_out"):
            torch.testing.assert_close(seen[there], plain[there] + shift, rtol=1e-4, atol=1e-4)
        if site.kind in ("attn_out", "resid_mid"):
            wanted = plain[there] - plain[mlp] + shift
            torch.testing.assert_close(seen[there] - seen[mlp], wanted, rtol=1e-4, atol=1e-4)
    for site_name, tensor in by_hand(name, model, IDS).items():
        assert torch.equal(tensor, plain[site_name])


@pytest.mark.parametrize("name", EDITED)
def test_one_site_of_each_layer_is_edited_in_one_pass(
    name: str, models: dict[str, PreTrainedModel]
) -> None:
    model = models[name]
    chosen = sites("mlp_out.0", "attn_out.1", "resid_post.2")
    assert [site.layer for site in chosen] == list(range(LAYERS))
    tap = SiteTap(model, chosen)
    written = {site: noise(tap(IDS)[str(site)], seed) for seed, site in enumerate(chosen)}
    edits = {site: lambda x, site=site: written[site] for site in reversed(chosen)}
    with edited(locate(model, chosen), edits):
        for site, read in zip(chosen, tap(IDS).values(), strict=True):
            assert torch.equal(read, written[site])


def test_the_middle_is_edited_after_attention_whichever_is_named_first(
    models: dict[str, PreTrainedModel],
) -> None:
    model = models["llama"]
    attention, middle, pre = sites("attn_out.1", "resid_mid.1", "resid_pre.1")
    plain = SiteTap(model, [pre, attention])(IDS)
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    for edits in (
        {attention: torch.zeros_like, middle: look},
        {middle: look, attention: torch.zeros_like},
    ):
        with edited(locate(model, [attention, middle]), edits):
            logits(model)
    assert torch.equal(seen[0], plain["resid_pre.1"])
    assert torch.equal(seen[0], seen[1])


def test_edits_within_edits_see_what_the_outer_ones_wrote(
    models: dict[str, PreTrainedModel],
) -> None:
    [site] = sites("resid_post.0")
    located, tap = locate(models["gpt2"], [site]), SiteTap(models["gpt2"], [site])
    plain = tap(IDS)["resid_post.0"]
    with edited(located, {site: lambda x: x + 2}), edited(located, {site: lambda x: x * 4}):
        assert torch.equal(tap(IDS)["resid_post.0"], (plain + 2) * 4)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "mlp_act"])
@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda x: x[:, 1:], rf"float32 \[{BATCH}, {CONTEXT - 1}, \d+\] on cpu"),
        (lambda x: x.flatten(0, 1), rf"float32 \[{BATCH * CONTEXT}, \d+\] on cpu"),
        (lambda x: x.double(), rf"float64 \[{BATCH}, {CONTEXT}, \d+\] on cpu"),
        (lambda x: x.to("meta"), rf"float32 \[{BATCH}, {CONTEXT}, \d+\] on meta"),
        (lambda x: None, "NoneType"),
    ],
)
def test_an_edit_that_returns_something_else_is_refused(
    kind: str,
    returned: Callable[[Tensor], Any],
    said: str,
    models: dict[str, PreTrainedModel],
) -> None:
    model, site = models["gpt2"], Site(kind, LAYER)
    before = n_hooks(model)
    message = rf"the edit of {kind}\.1 returned (torch\.)?{said}, expected torch\.float32 \[2, 12"
    with (
        pytest.raises(ValueError, match=message),
        edited(locate(model, [site]), {site: returned}),
    ):
        logits(model)
    assert n_hooks(model) == before


def test_hooks_go_however_the_block_ends(models: dict[str, PreTrainedModel]) -> None:
    model = models["gpt2"]
    wanted = dict.fromkeys(offered("gpt2"), torch.zeros_like)
    located, before, plain = locate(model, offered("gpt2")), n_hooks(model), logits(model)

    def fail(error: type[BaseException]) -> None:
        with edited(located, wanted):
            assert n_hooks(model) > before
            raise error

    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            fail(error)
        assert n_hooks(model) == before
    with pytest.raises(KeyError), edited({}, wanted):
        pass
    assert n_hooks(model) == before
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out", "resid_mid", "resid_post"])
@pytest.mark.parametrize("container", [tuple, list, None])
def test_modules_return_the_type_they_returned(kind: str, container: type | None) -> None:
    """Llama's modules, made to return other containers with something beside the tensor."""
    model, site = build(FAMILIES["llama"].config()), Site(kind, LAYER)
    plain, block = logits(model), model.model.layers[LAYER]
    module = {"mlp_out": block.mlp, "resid_post": block}.get(kind, block.self_attn)
    located, beside, seen = locate(model, [site]), object(), []

    def wrap(module: nn.Module, args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        return tensor if container is None else container((tensor, beside))

    def unwrap(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(output)
        tensor = output if container is None else output[0]
        return (tensor, None) if module is block.self_attn else tensor

    wrapping = module.register_forward_hook(wrap)
    with edited(located, {site: lambda x: x + 1}):
        unwrapping = module.register_forward_hook(unwrap)
        changed = logits(model)
    wrapping.remove()
    unwrapping.remove()
    [output] = seen
    assert type(output) is (container or Tensor)
    if container is not None:
        assert len(output) == 2
        assert output[1] is beside
    with edited(located, {site: lambda x: x + 1}):
        assert torch.equal(changed, logits(model))
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize(("name", "site"), CASES)
def test_with_a_cache_an_edit_is_given_the_new_positions(
    name: str, site: Site, models: dict[str, PreTrainedModel]
) -> None:
    model, shapes = models[name], []

    def look(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    with edited(locate(model, [site]), {site: look}):
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    width = WIDTH if site.kind != "mlp_act" else 48
    assert shapes == [(BATCH, CONTEXT, width), (BATCH, 1, width), (BATCH, 1, width)]
