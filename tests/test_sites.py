"""The tap reads exactly what the model computes, whatever the family, and no more than it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.sites import SITE_KINDS, Site, SiteTap

LAYERS, WIDTH, NEURONS, VOCABULARY = 3, 32, 48, 97
BATCH, CONTEXT = 2, 12


@dataclass(frozen=True)
class Family:
    """How to build a small model of a family, and where its own code computes the sites."""

    config: Callable[[], Any]
    blocks: str
    attention: str
    mlp: str
    down: str
    parallel: bool = False


def _llama_like(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


_GROUPED = {"num_key_value_heads": 2}
_LLAMA_PLACES = ("model.layers", "self_attn", "mlp", "mlp.down_proj")
_NEOX_PLACES = ("gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h")
FAMILIES = {
    "gpt2": Family(
        lambda: transformers.GPT2Config(
            n_embd=WIDTH,
            n_inner=NEURONS,
            n_layer=LAYERS,
            n_head=4,
            vocab_size=VOCABULARY,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "transformer.h",
        "attn",
        "mlp",
        "mlp.c_proj",
    ),
    "llama": Family(_llama_like("LlamaConfig", **_GROUPED), *_LLAMA_PLACES),
    "qwen2": Family(_llama_like("Qwen2Config", **_GROUPED), *_LLAMA_PLACES),
    "qwen3": Family(_llama_like("Qwen3Config", head_dim=8, **_GROUPED), *_LLAMA_PLACES),
    "mistral": Family(_llama_like("MistralConfig", sliding_window=4, **_GROUPED), *_LLAMA_PLACES),
    "gpt_neox": Family(
        _llama_like("GPTNeoXConfig", use_parallel_residual=True), *_NEOX_PLACES, parallel=True
    ),
    "gpt_neox_sequential": Family(
        _llama_like("GPTNeoXConfig", use_parallel_residual=False), *_NEOX_PLACES
    ),
    "phi": Family(
        _llama_like("PhiConfig"), "model.layers", "self_attn", "mlp", "mlp.fc2", parallel=True
    ),
    "gemma2": Family(
        _llama_like("Gemma2Config", head_dim=8, query_pre_attn_scalar=8, **_GROUPED),
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "mlp.down_proj",
    ),
    "opt": Family(
        lambda: transformers.OPTConfig(
            hidden_size=WIDTH,
            ffn_dim=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            word_embed_proj_dim=WIDTH,
        ),
        "model.decoder.layers",
        "self_attn",
        "fc2",
        "fc2",
    ),
    "bloom": Family(
        lambda: transformers.BloomConfig(
            hidden_size=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY
        ),
        "transformer.h",
        "self_attention.dense",  # the attention module adds the residual itself
        "mlp.dense_4h_to_h",
        "mlp.dense_4h_to_h",
    ),
}
SEQUENTIAL = [name for name, family in FAMILIES.items() if not family.parallel]
PARALLEL = [name for name, family in FAMILIES.items() if family.parallel]


def build(config: Any) -> PreTrainedModel:
    """A model with weights large enough that every part of it changes the activations."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=0.3).add_(float(name.endswith("weight")))
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: build(family.config()) for name, family in FAMILIES.items()}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(
        3, VOCABULARY, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(1)
    )


def sites(*names: str) -> list[Site]:
    return [Site.parse(name) for name in names]


def offered(name: str) -> list[Site]:
    kinds = [k for k in SITE_KINDS if k != "resid_mid" or not FAMILIES[name].parallel]
    return [Site(kind, layer) for layer in range(LAYERS) for kind in kinds]


def by_hand(name: str, model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Every site of the model, from hooks on the modules that the family's code names."""
    family = FAMILIES[name]
    seen: dict[str, Tensor] = {}
    handles: list[Any] = []

    def first(value: Any) -> Tensor:
        return (value[0] if isinstance(value, tuple) else value).clone().view(BATCH, CONTEXT, -1)

    def output_of(module: nn.Module, site: str) -> None:
        hook = lambda m, i, o: seen.__setitem__(site, first(o))  # noqa: E731
        handles.append(module.register_forward_hook(hook))

    def input_of(module: nn.Module, site: str) -> None:
        hook = lambda m, args: seen.__setitem__(site, first(args[0]))  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook))

    for layer, block in enumerate(model.get_submodule(family.blocks)):
        output_of(block, f"resid_post.{layer}")
        output_of(block.get_submodule(family.attention), f"attn_out.{layer}")
        output_of(block.get_submodule(family.mlp), f"mlp_out.{layer}")
        input_of(block.get_submodule(family.down), f"mlp_act.{layer}")
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(LAYERS):
        seen[f"resid_pre.{layer}"] = hidden[layer]
        seen[f"resid_mid.{layer}"] = hidden[layer] + seen[f"attn_out.{layer}"]
        if layer:  # the model's own account; its last entry is after the final norm
            torch.testing.assert_close(seen[f"resid_post.{layer - 1}"], hidden[layer])
    return seen


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_equal_the_models_own(
    name: str, models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    model = models[name]
    wanted = by_hand(name, model, ids)
    with SiteTap(model, offered(name)) as tap:
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
    with SiteTap(models[name], offered(name)) as tap:
        together = tap(ids)
    for site in [s for s in offered(name) if s.layer == 1]:
        with SiteTap(models[name], [site]) as tap:
            assert torch.equal(tap(ids)[str(site)], together[str(site)])


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_blocks_add_attention_and_mlp_to_the_residual_stream(
    name: str, models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    wanted = sites("resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1")
    with SiteTap(models[name], wanted) as tap:
        pre, attention, middle, mlp, post = tap(ids).values()
    torch.testing.assert_close(middle, pre + attention)
    torch.testing.assert_close(post, middle + mlp)
    assert attention.norm() > 0.01 * pre.norm()
    assert mlp.norm() > 0.01 * pre.norm()


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_blocks_have_no_middle(name: str, models: dict[str, PreTrainedModel]) -> None:
    for wanted in (["resid_mid.1"], ["attn_out.1", "resid_mid.1"]):
        with pytest.raises(InputError, match=r"resid_mid\.1 .* in parallel"):
            SiteTap(models[name], sites(*wanted))


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
    with SiteTap(model, sites("resid_post.1", "resid_pre.0")) as tap:
        calls = [count_calls(module) for module in counted]
        tap(ids)
        assert [c[0] for c in calls] == [1, 1, 0, 0, 0]
    with SiteTap(model, sites("resid_post.2")) as tap:
        calls = [count_calls(module) for module in counted]
        tap(ids)
        assert [c[0] for c in calls] == [1, 1, 1, 0, 0]
    with SiteTap(model, sites("attn_out.1")) as attention:
        mlp = count_calls(layers[1].mlp)
        attention(ids)
    assert mlp == [0]


def test_an_open_tap_leaves_the_model_and_other_taps_alone(
    models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    model = models["llama"]
    wanted, logits = by_hand("llama", model, ids), model(ids).logits
    with SiteTap(model, sites("resid_mid.0")) as early, SiteTap(model, sites("mlp_act.2")) as late:
        for tap, site in ((late, "mlp_act.2"), (early, "resid_mid.0"), (late, "mlp_act.2")):
            assert torch.equal(tap(ids)[site], wanted[site])
            assert torch.equal(model(ids).logits, logits)


def test_closing_takes_every_hook_off(models: dict[str, PreTrainedModel], ids: Tensor) -> None:
    model = models["gpt2"]

    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        )

    before, logits = hooks(), model(ids).logits
    with SiteTap(model, offered("gpt2")):
        assert hooks() > before
    assert hooks() == before
    torch.testing.assert_close(model(ids).logits, logits)
    with pytest.raises(InputError):
        SiteTap(model, sites("resid_post.0", "mlp_act.99"))
    assert hooks() == before


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
    with SiteTap(model, offered("llama")) as tap:
        got = tap(ids)
    for site, tensor in got.items():
        assert relative_error(tensor, wanted[site]) <= 1e-5, site


def test_rows_do_not_depend_on_the_rest_of_the_batch(
    models: dict[str, PreTrainedModel], ids: Tensor
) -> None:
    with SiteTap(models["qwen3"], offered("qwen3")) as tap:
        both, second = tap(ids), tap(ids[1:].to(torch.int32))
    for site in both:
        torch.testing.assert_close(second[site][0], both[site][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma2", "gpt_neox"])
def test_bfloat16_models_are_tapped_in_their_own_dtype(name: str, ids: Tensor) -> None:
    model = build(FAMILIES[name].config()).to(torch.bfloat16)
    wanted = by_hand(name, model, ids)
    with SiteTap(model, offered(name)) as tap:
        got = tap(ids)
    for site, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted[site]), site


def test_a_massive_residual_does_not_hide_the_parts(ids: Tensor) -> None:
    """Real models carry activations of thousands at some positions."""
    model = build(FAMILIES["llama"].config())
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5] = 4096.0
    wanted = by_hand("llama", model, ids)
    with SiteTap(model, offered("llama")) as tap:
        for site, tensor in tap(ids).items():
            assert relative_error(tensor, wanted[site]) <= 1e-5, site


def test_norms_after_the_addition_offer_only_the_residual_stream(ids: Tensor) -> None:
    config = FAMILIES["opt"].config()
    config.do_layer_norm_before = False
    model = build(config)
    with pytest.raises(InputError, match=r"mlp_out\.0 isn't offered by this opt model"):
        SiteTap(model, sites("mlp_out.0"))
    with SiteTap(model, sites("resid_post.2")) as tap:
        hidden = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(tap(ids)["resid_post.2"], hidden[3])


def test_a_mixture_of_experts_has_an_mlp_but_no_neurons(ids: Tensor) -> None:
    model = build(_llama_like("MixtralConfig", num_local_experts=4, **_GROUPED)())
    with SiteTap(model, sites("resid_mid.1", "mlp_out.1", "resid_post.1")) as tap:
        middle, mlp, post = tap(ids).values()
    torch.testing.assert_close(middle + mlp, post)
    for wanted in (["mlp_act.1"], ["mlp_out.1", "mlp_act.1"]):
        with pytest.raises(InputError, match=r"mlp_act\.1 isn't offered by this mixtral model"):
            SiteTap(model, sites(*wanted))


@pytest.mark.parametrize(("layers", "streams"), [(4, 5), (1, 2), (3, 3)])
def test_projections_beside_the_blocks_are_not_taken_for_them(layers: int, streams: int) -> None:
    """Gemma 3n carries several streams at once, and has one projection less than streams."""
    config = transformers.Gemma3nTextConfig(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=layers,
        altup_num_inputs=streams,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=None,
        layer_types=["full_attention"] * layers,
    )
    with pytest.raises(InputError, match="The blocks of this gemma3n_text model were not found"):
        SiteTap(build(config), sites("resid_post.0"))


@pytest.mark.parametrize("chained", [True, False])
def test_a_larger_list_of_as_many_modules_is_not_taken_for_the_blocks(
    chained: bool, ids: Tensor
) -> None:
    class Embedding(nn.Module):
        """Adds to every embedding what a list of as many modules as blocks makes of it."""

        def __init__(self, plain: nn.Module) -> None:
            super().__init__()
            self.plain = plain
            self.others = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, 999), nn.Linear(999, WIDTH)) for _ in range(LAYERS)
            )

        def forward(self, ids: Tensor) -> Tensor:
            embedded = x = self.plain(ids)
            for other in self.others:
                x = other(x if chained else embedded)
            return embedded + x

    model = build(FAMILIES["llama"].config())
    model.model.embed_tokens = Embedding(model.model.embed_tokens)
    wanted = by_hand("llama", model, ids)
    with SiteTap(model, sites("resid_post.1", "mlp_act.1")) as tap:
        for site, tensor in tap(ids).items():
            assert relative_error(tensor, wanted[site]) <= 1e-5, site


def test_layer_out_of_range_names_the_range(models: dict[str, PreTrainedModel]) -> None:
    message = r"resid_post\.3 is out of range: the model has 3 layers.*resid_post\.0 to .*\.2"
    with pytest.raises(InputError, match=message):
        SiteTap(models["gpt2"], sites("resid_post.3"))
    with pytest.raises(InputError, match=message):
        Site("resid_post", 3).check(models["gpt2"].config)
    Site("resid_post", 2).check(models["gpt2"].config)


def test_sites_are_given_once_each(models: dict[str, PreTrainedModel]) -> None:
    for wanted in ([], sites("resid_post.1", "resid_post.1")):
        with pytest.raises(InputError, match="once each"):
            SiteTap(models["gpt2"], wanted)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_site_names_survive_a_round_trip(kind: str) -> None:
    assert Site.parse(f"{kind}.12") == Site(kind, 12)
    assert str(Site(kind, 12)) == f"{kind}.12"


@pytest.mark.parametrize(
    "text", ["", "resid_post", "resid_post.", "resid_post.-1", "post.3", "resid_post.1.2", "8"]
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not a site: expected KIND\.LAYER"):
        Site.parse(text)
