"""Sites: their names, and which of them a model offers, whatever its modules are called."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.hooks import SiteTap
from sae_harvest.harvest.model.sites import SITE_KINDS, Site
from tests.families import (
    FAMILIES,
    GROUPED,
    LAYERS,
    NEURONS,
    PARALLEL,
    VOCABULARY,
    WIDTH,
    build,
    by_hand,
    llama_like,
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


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_blocks_have_no_middle(name: str, models: dict[str, PreTrainedModel]) -> None:
    for wanted in (["resid_mid.1"], ["attn_out.1", "resid_mid.1"]):
        with pytest.raises(InputError, match=r"resid_mid\.1 .* in parallel"):
            SiteTap(models[name], sites(*wanted))


def test_a_massive_residual_does_not_hide_the_parts(ids: Tensor) -> None:
    """Real models carry activations of thousands at some positions."""
    model = build(FAMILIES["llama"].config())
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5] = 4096.0
    wanted = by_hand("llama", model, ids)
    tap = SiteTap(model, offered("llama"))
    for site, tensor in tap(ids).items():
        assert relative_error(tensor, wanted[site]) <= 1e-5, site


def test_norms_after_the_addition_offer_only_the_residual_stream(ids: Tensor) -> None:
    config = FAMILIES["opt"].config()
    config.do_layer_norm_before = False
    model = build(config)
    with pytest.raises(InputError, match=r"mlp_out\.0 isn't offered by this opt model"):
        SiteTap(model, sites("mlp_out.0"))
    tap = SiteTap(model, sites("resid_post.2"))
    hidden = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tap(ids)["resid_post.2"], hidden[3])


def test_a_mixture_of_experts_has_an_mlp_but_no_neurons(ids: Tensor) -> None:
    model = build(llama_like("MixtralConfig", num_local_experts=4, **GROUPED)())
    tap = SiteTap(model, sites("resid_mid.1", "mlp_out.1", "resid_post.1"))
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
    tap = SiteTap(model, sites("resid_post.1", "mlp_act.1"))
    for site, tensor in tap(ids).items():
        assert relative_error(tensor, wanted[site]) <= 1e-5, site


def test_layer_out_of_range_names_the_range(models: dict[str, PreTrainedModel]) -> None:
    message = r"resid_post\.3 is out of range: the model has 3 layers.*resid_post\.0 to .*\.2"
    with pytest.raises(InputError, match=message):
        SiteTap(models["gpt2"], sites("resid_post.3"))
    with pytest.raises(InputError, match=message):
        Site("resid_post", 3).check(models["gpt2"].config)
    Site("resid_post", 2).check(models["gpt2"].config)


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
