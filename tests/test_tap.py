"""The tap reads exactly what the model computes, whatever the family, and no more than it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.hooks import SiteTap
from tests.families import (
    FAMILIES,
    NEURONS,
    SEQUENTIAL,
    WIDTH,
    build,
    by_hand,
    n_hooks,
    offered,
    relative_error,
    sites,
    token_ids,
)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: build(family.config()) for name, family in FAMILIES.items()}


@pytest.fixture
def ids() -> Tensor:
    return token_ids()


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_equal_the_models_own(
    name: str, models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    model = models[name]
    wanted = by_hand(name, model, ids)
    tap = SiteTap(model, offered(name))
    got = tap(ids)
    assert list(got) == [str(site) for site in offered(name)]
    for site, tensor in got.items():
        assert relative_error(tensor, wanted[site]) <= 1e-5, site
        assert tap.widths[site] == tensor.shape[-1]
    assert tap.widths["resid_post.0"] == WIDTH
    assert tap.widths["mlp_act.0"] == (4 * WIDTH if name == "bloom" else NEURONS)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_site_alone_equals_the_same_site_among_many(
    name: str, models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    tap = SiteTap(models[name], offered(name))
    together = tap(ids)
    for site in [s for s in offered(name) if s.layer == 1]:
        tap = SiteTap(models[name], [site])
        assert torch.equal(tap(ids)[str(site)], together[str(site)])


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_blocks_add_attention_and_mlp_to_the_residual_stream(
    name: str, models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    wanted = sites("resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1")
    tap = SiteTap(models[name], wanted)
    pre, attention, middle, mlp, post = tap(ids).values()
    torch.testing.assert_close(middle, pre + attention)
    torch.testing.assert_close(post, middle + mlp)
    assert attention.norm() > 0.01 * pre.norm()
    assert mlp.norm() > 0.01 * pre.norm()


@pytest.fixture
def count_calls() -> Iterator[Callable[[nn.Module], list[int]]]:
    handles = []

    def count(module: nn.Module) -> list[int]:
        calls = [0]

        def hook(*_: Any) -> None:
            calls[0] += 1

        handles.append(module.register_forward_pre_hook(hook))
        return calls

    yield count
    for handle in handles:
        handle.remove()


def test_nothing_runs_after_the_last_site(
    models: dict[str, PreTrainedModel], ids: Tensor, count_calls: Callable[[nn.Module], list[int]]
) -> None:
    model = models["llama"]
    layers = model.model.layers
    counted = [*layers, model.model.norm, model.lm_head]
    tap = SiteTap(model, sites("resid_post.1", "resid_pre.0"))
    calls = [count_calls(module) for module in counted]
    tap(ids)
    assert [c[0] for c in calls] == [1, 1, 0, 0, 0]
    tap = SiteTap(model, sites("resid_post.2"))
    calls = [count_calls(module) for module in counted]
    tap(ids)
    assert [c[0] for c in calls] == [1, 1, 1, 0, 0]
    attention = SiteTap(model, sites("attn_out.1"))
    mlp = count_calls(layers[1].mlp)
    attention(ids)
    assert mlp == [0]


def test_a_tap_leaves_the_model_and_other_taps_alone(
    models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    model = models["llama"]
    wanted, logits = by_hand("llama", model, ids), model(ids).logits
    early, late = SiteTap(model, sites("resid_mid.0")), SiteTap(model, sites("mlp_act.2"))
    for tap, site in ((late, "mlp_act.2"), (early, "resid_mid.0"), (late, "mlp_act.2")):
        assert torch.equal(tap(ids)[site], wanted[site])
        assert torch.equal(model(ids).logits, logits)


def test_hooks_are_on_the_model_during_a_pass_only(
    models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    model = models["gpt2"]
    before, logits = n_hooks(model), model(ids).logits
    seen: list[int] = []
    tap = SiteTap(model, offered("gpt2"), lambda: seen.append(n_hooks(model)))
    assert n_hooks(model) == before
    assert min(seen) > before
    tap(ids)
    assert n_hooks(model) == before
    torch.testing.assert_close(model(ids).logits, logits)
    with pytest.raises(InputError):
        SiteTap(model, sites("resid_post.0", "mlp_act.99"))
    assert n_hooks(model) == before


def test_an_exception_before_a_block_ends_the_pass_and_takes_the_hooks_off(
    models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    model = models["gpt2"]
    before, blocks = n_hooks(model), [0]

    def third() -> None:
        blocks[0] += 1
        if blocks[0] == 6:  # 3 of the pass that measures widths, 2 of this one
            raise InterruptedError

    tap = SiteTap(model, sites("resid_mid.2"), third)
    with pytest.raises(InterruptedError):
        tap(ids)
    assert blocks == [6]
    assert n_hooks(model) == before
    assert torch.equal(tap(ids)["resid_mid.2"], by_hand("gpt2", model, ids)["resid_mid.2"])


def test_a_tensor_changed_in_place_later_is_copied(ids: Tensor) -> None:
    """A block that adds to its input in place must not reach what was captured before."""

    class InPlaceLayer(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            attention, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states), **kwargs
            )
            hidden_states += attention
            hidden_states += self.mlp(self.post_attention_layernorm(hidden_states))
            return hidden_states

    model = build(FAMILIES["llama"].config())
    wanted = by_hand("llama", model, ids)
    for layer in model.model.layers:
        layer.__class__ = InPlaceLayer
    tap = SiteTap(model, offered("llama"))
    got = tap(ids)
    for site, tensor in got.items():
        assert relative_error(tensor, wanted[site]) <= 1e-5, site


def test_rows_do_not_depend_on_the_rest_of_the_batch(
    models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    tap = SiteTap(models["qwen3"], offered("qwen3"))
    both, second = tap(ids), tap(ids[1:].to(torch.int32))
    for site in both:
        torch.testing.assert_close(second[site][0], both[site][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma2", "gpt_neox"])
def test_bfloat16_models_are_tapped_in_their_own_dtype(name: str, ids: Tensor) -> None:
    model = build(FAMILIES[name].config()).to(torch.bfloat16)
    wanted = by_hand(name, model, ids)
    tap = SiteTap(model, offered(name))
    got = tap(ids)
    for site, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted[site]), site


def test_sites_are_given_once_each(models: dict[str, PreTrainedModel]) -> None:
    for wanted in ([], sites("resid_post.1", "resid_post.1")):
        with pytest.raises(InputError, match="once each"):
            SiteTap(models["gpt2"], wanted)
