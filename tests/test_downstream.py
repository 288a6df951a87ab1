"""Downstream loss: what the model loses when a dictionary's output replaces its activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sae_harvest.common.errors import InputError, SaeHarvestError
from sae_harvest.harvest.model.models import load_model, resolve_model
from sae_harvest.harvest.model.sites import SITE_KINDS
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.evaluate import downstream
from sae_harvest.pipelines.evaluate.downstream import (
    controls,
    downstream_figures,
    downstream_loss,
    heldout_contexts,
    spliced_losses,
)
from sae_harvest.pipelines.evaluate.splicing import Splice
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule, heldout_documents
from sae_harvest.train.sae.sae import SAE
from tests.dictionaries import SITE, config_for, random_sae
from tests.hand_blocks import LAYER, block_by_hand
from tests.steer_cases import made_sae

D_IN = 32
EVERY_ROW = RowRule(max_norm_medians=None, heldout_fraction=0.4)
ORDINARY_ROWS = RowRule(max_norm_medians=1.2, heldout_fraction=0.4)


@pytest.fixture(scope="module")
def store(tiny_store):
    return ActivationStore.open(tiny_store)


@pytest.fixture(scope="module")
def model(store):
    return load_model(resolve_model(store.plan["model"]["name"]), torch.float32, "cpu")


def perfect(store, rule, **fields):
    """Latents +e_i and -e_i with k = d_in: every row is its own reconstruction."""
    rows = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    config = config_for(store, n_latents=2 * D_IN, k=D_IN, rule=rule, **fields)
    return SAE(config, rows.clone(), rows, torch.zeros(2 * D_IN), torch.zeros(D_IN))


def constant(rule, vector, site=SITE):
    """No latent ever fires: every reconstruction is b_dec."""
    sae = made_sae(len(vector), site, rule=rule)
    sae.b_enc[:] = -1e6
    sae.b_dec = vector.clone()
    return sae


def by_hand(model, tokens, kind, vector, mask):
    """Mean cross-entropy with the vector in place of the masked rows, in a block of our own."""

    def at(site, x):
        return torch.where(mask[..., None], vector, x) if site == kind else x

    with torch.no_grad(), block_by_hand(model, at):
        logits = model(tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def own_loss(model, tokens):
    with torch.no_grad():
        return model(tokens, labels=tokens).loss.item()


def contexts_of(store, sae, n):
    contexts = heldout_contexts(store, [sae], n)
    tokens = np.stack([store.tokens(c, c + 1)[0] for c in contexts])
    return contexts, torch.from_numpy(tokens.astype(np.int64))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_perfect_dictionary_loses_nothing(store, model, tmp_path, scale):
    fields = {} if scale == 1 else {"normalization": "scale", "input_scale": scale}
    sae = perfect(store, EVERY_ROW, **fields)
    sae.save(tmp_path)
    measured = downstream_loss(store.place, [tmp_path], 6)
    _, tokens = contexts_of(store, sae, 6)
    assert measured.contexts == 6
    assert measured.tokens == 6 * (store.context_length - 1)
    assert measured.replaced == 1
    assert measured.ce_model == pytest.approx(own_loss(model, tokens), rel=1e-5)
    assert measured.delta_ce == pytest.approx(0, abs=1e-5)
    assert measured.to_json()["delta_ce"] == measured.ce_sae - measured.ce_model


def test_a_constant_gives_the_loss_of_a_manual_hook(store, model, tmp_path):
    vector = torch.randn(D_IN, generator=torch.Generator().manual_seed(2))
    sae = constant(EVERY_ROW, vector)
    sae.save(tmp_path)
    measured = downstream_loss(store.place, [tmp_path], 5)
    _, tokens = contexts_of(store, sae, 5)
    every = torch.ones(tokens.shape, dtype=torch.bool)
    assert measured.ce_sae == pytest.approx(
        by_hand(model, tokens, "resid_post", vector, every), rel=1e-5
    )
    assert measured.delta_ce > 0.01


def test_only_rows_that_the_rule_reads_are_replaced(store, model, tmp_path):
    vector = torch.full((D_IN,), 2.0)
    sae = constant(ORDINARY_ROWS, vector)
    sae.save(tmp_path)
    measured = downstream_loss(store.place, [tmp_path], 7)
    contexts, tokens = contexts_of(store, sae, 7)
    keep = np.zeros((7, store.context_length), bool)
    length = store.context_length
    for n, context in enumerate(contexts):
        shard = context * length // store.shard_rows
        limit = 1.2 * store.norm_median(SITE, shard)
        keep[n] = store.norms(SITE, context * length, (context + 1) * length) <= limit
    assert 0.5 < keep.mean() < 1
    assert measured.replaced == keep.mean()
    mask = torch.from_numpy(keep)
    assert measured.ce_sae == pytest.approx(
        by_hand(model, tokens, "resid_post", vector, mask), rel=1e-5
    )
    every = torch.ones_like(mask)
    assert measured.ce_sae != pytest.approx(
        by_hand(model, tokens, "resid_post", vector, every), rel=1e-3
    )


def test_batches_and_progress_change_nothing(store, tmp_path, monkeypatch):
    random_sae(store, 64, 4, EVERY_ROW).save(tmp_path)
    whole = downstream_loss(store.place, [tmp_path], 7)
    monkeypatch.setattr(downstream, "BATCH_TOKENS", 2 * store.context_length)
    seen = []
    parts = downstream_loss(store.place, [tmp_path], 7, lambda *done: seen.append(done))
    assert parts.ce_sae == pytest.approx(whole.ce_sae, rel=1e-6)
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]
    monkeypatch.setattr(downstream, "BATCH_TOKENS", 1)
    assert downstream_loss(store.place, [tmp_path], 7).ce_sae == pytest.approx(
        whole.ce_sae, rel=1e-6
    )


def test_contexts_hold_held_out_documents_only(store):
    sae = random_sae(store, 16, 4, ORDINARY_ROWS)
    found = heldout_contexts(store, [sae], 10_000)
    hashes = np.concatenate([store.row_documents(s)[1] for s in range(store.n_shards)])
    whole = heldout_documents(hashes.reshape(store.n_contexts, -1), 0.4).all(axis=1)
    assert found.tolist() == np.flatnonzero(whole).tolist()
    assert 10 < len(found) < store.n_contexts / 2
    assert heldout_contexts(store, [sae], 3).tolist() == found[:3].tolist()


@pytest.fixture(scope="module")
def other_sites(tmp_path_factory, model_folder, corpus_file):
    """A store of one shard with every site of one block, and a BOS in front of contexts."""
    path = tmp_path_factory.mktemp("sites") / "store"
    config = HarvestConfig(
        model=str(model_folder),
        corpus=CorpusSpec(name=str(corpus_file)),
        sites=tuple(f"{kind}.{LAYER}" for kind in SITE_KINDS),
        tokens=2048,
        context_length=32,
        shard_rows=2048,
        compute_dtype="float32",
        bos="context",
    )
    run(config, path, Execution(workers=0, device="cpu"))
    return ActivationStore.open(path)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_every_site_is_replaced_and_bos_belongs_to_no_document(other_sites, model, tmp_path, kind):
    site = f"{kind}.{LAYER}"
    vector = torch.randn(other_sites.width(site), generator=torch.Generator().manual_seed(3))
    sae = constant(EVERY_ROW, vector, site)
    sae.save(tmp_path)
    measured = downstream_loss(other_sites.place, [tmp_path], 4)
    _, tokens = contexts_of(other_sites, sae, 4)
    assert (tokens[:, 0] == 0).all()
    assert measured.replaced == 1
    every = torch.ones(tokens.shape, dtype=torch.bool)
    assert measured.ce_sae == pytest.approx(by_hand(model, tokens, kind, vector, every), rel=1e-5)
    assert abs(measured.delta_ce) > 1e-3


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_an_output_plus_its_own_error_loses_nothing(other_sites, model, kind):
    """The control of sparse feature circuits: the SAE and what it leaves out make the model."""
    site = f"{kind}.{LAYER}"
    sae = made_sae(other_sites.width(site), site, rule=EVERY_ROW)
    splices = {"SAE": Splice([sae]), "control": Splice([sae], "control")}
    contexts = heldout_contexts(other_sites, [sae], 6)
    found = spliced_losses(model, other_sites, splices, contexts)
    _, ce_model, ce, kl = found["control"].means
    assert ce == pytest.approx(ce_model, abs=1e-5)
    assert kl == pytest.approx(0, abs=1e-5)
    _, ce_model, ce, kl = found["SAE"].means
    assert abs(ce - ce_model) > 1e-4
    assert kl > 1e-4


def log_probabilities(model, tokens, at=lambda kind, x: x):
    with torch.no_grad(), block_by_hand(model, at):
        return torch.log_softmax(model(tokens, use_cache=False).logits[:, :-1].double(), -1)


def test_divergence_and_positions_are_those_of_the_formulas(other_sites, model):
    vector = torch.randn(D_IN, generator=torch.Generator().manual_seed(5))
    sae = constant(EVERY_ROW, vector, f"mlp_out.{LAYER}")
    contexts, tokens = contexts_of(other_sites, sae, 5)
    [found] = spliced_losses(model, other_sites, {"SAE": Splice([sae])}, contexts).values()
    plain = log_probabilities(model, tokens)
    spliced = log_probabilities(
        model, tokens, lambda kind, x: vector.expand_as(x) if kind == "mlp_out" else x
    )
    divergence = (plain.exp() * (plain - spliced)).sum(-1)  # [contexts, length - 1]
    assert found.means[3] == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert np.allclose(found.by_position[:, 3], divergence.sum(0), rtol=1e-3, atol=1e-6)
    own = -spliced.gather(2, tokens[:, 1:, None])[..., 0]
    assert np.allclose(found.by_position[:, 2], own.sum(0), rtol=1e-5)
    assert (found.by_position[:, 0] == 5).all()
    assert np.allclose(found.by_position.sum(0), found.by_cluster.sum(0))
    documents = [other_sites.row_documents(s)[0] for s in range(other_sites.n_shards)]
    of_tokens = np.concatenate(documents).reshape(other_sites.n_contexts, -1)[contexts, 1:]
    clusters = (found.by_cluster[:, 0] > 0).sum()
    assert 1 < clusters <= len(np.unique(of_tokens))


def test_zeros_means_and_the_two_perfect_answers(store, model):
    """A perfect dictionary recovers all of the loss; one that says the mean, none of it."""
    mean = torch.from_numpy(store.statistics(SITE)["ordinary"].mean).float()
    sae = perfect(store, EVERY_ROW)
    contexts, tokens = contexts_of(store, sae, 8)
    splices = controls(store, [sae]) | {"SAE": Splice([sae])}
    splices["says the mean"] = Splice([constant(EVERY_ROW, mean)])
    losses = spliced_losses(model, store, splices, contexts)
    every = torch.ones(tokens.shape, dtype=torch.bool)
    for name, vector in {"zero": torch.zeros(D_IN), "mean": mean}.items():
        expected = by_hand(model, tokens, "resid_post", vector, every)
        assert losses[name].means[2] == pytest.approx(expected, rel=1e-5)
    found = {(f.metric, f.subject): f for f in downstream_figures(losses)}
    assert found["delta_ce", "SAE"].value == pytest.approx(0, abs=1e-5)
    assert found["recovered_zero", "SAE"].value == pytest.approx(1, abs=1e-4)
    assert found["recovered_mean", "SAE"].value == pytest.approx(1, abs=1e-4)
    assert found["recovered_mean", "says the mean"].value == pytest.approx(0, abs=1e-6)
    ablated = found["delta_ce", "mean"]
    assert found["delta_ce", "says the mean"].value == pytest.approx(ablated.value, rel=1e-6)
    assert ablated.low < ablated.value < ablated.high
    assert ablated.count == 8 * (store.context_length - 1)
    ce_model, ce, zero = (losses[n].means[c] for n, c in (("zero", 1), ("mean", 2), ("zero", 2)))
    by_formula = (zero - ce) / (zero - ce_model)
    recovered = next(
        f
        for f in downstream_figures(losses | {"again": losses["mean"]})
        if (f.metric, f.subject) == ("recovered_zero", "again")
    )
    assert recovered.value == pytest.approx(by_formula, rel=1e-9)


def test_a_transcoder_replaces_its_target_by_what_it_says_of_its_input(other_sites, model):
    config = {"site": f"resid_pre.{LAYER}", "target_site": f"resid_post.{LAYER}", "d_out": D_IN}
    rows = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    sae_config = config_for(other_sites, n_latents=64, k=D_IN, rule=EVERY_ROW, **config)
    zeros = torch.zeros(D_IN)
    copies = SAE(sae_config, rows.clone(), rows, torch.zeros(64), zeros, b_in=zeros.clone())
    contexts, tokens = contexts_of(other_sites, copies, 5)
    [found] = spliced_losses(model, other_sites, {"T": Splice([copies])}, contexts).values()
    entered = []

    def skip_the_block(kind, x):
        if kind == "resid_pre":
            entered[:] = [x]
        return entered[0] if kind == "resid_post" else x

    expected = log_probabilities(model, tokens, skip_the_block)
    ce = -expected.gather(2, tokens[:, 1:, None]).mean().item()
    assert found.means[2] == pytest.approx(ce, rel=1e-5)
    assert found.means[2] - found.means[1] > 1e-4


def test_several_dictionaries_replace_their_sites_together(other_sites, model, tmp_path):
    generator = torch.Generator().manual_seed(6)
    vectors = {kind: torch.randn(D_IN, generator=generator) for kind in ("attn_out", "mlp_out")}
    saes = [constant(EVERY_ROW, v, f"{kind}.{LAYER}") for kind, v in vectors.items()]
    for sae in saes:
        sae.save(tmp_path / sae.config.site)
    measured = downstream_loss(other_sites.place, [tmp_path / sae.config.site for sae in saes], 5)
    _, tokens = contexts_of(other_sites, saes[0], 5)
    expected = log_probabilities(
        model, tokens, lambda kind, x: vectors[kind].expand_as(x) if kind in vectors else x
    )
    ce = -expected.gather(2, tokens[:, 1:, None]).mean().item()
    assert measured.ce_sae == pytest.approx(ce, rel=1e-5)


def test_outlier_rows_are_replaced_on_request_only(store, model):
    sae = constant(ORDINARY_ROWS, torch.full((D_IN,), 2.0))
    contexts, tokens = contexts_of(store, sae, 6)
    found = spliced_losses(model, store, {"all": Splice([sae], every_row=True)}, contexts)
    every = torch.ones(tokens.shape, dtype=torch.bool)
    expected = by_hand(model, tokens, "resid_post", sae.b_dec, every)
    assert found["all"].means[2] == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", SITE_KINDS)
def test_a_gpu_measures_what_the_processor_does(other_sites, tmp_path, kind):
    site = f"{kind}.{LAYER}"
    made_sae(other_sites.width(site), site, rule=EVERY_ROW).save(tmp_path)
    there = downstream_loss(other_sites.place, [tmp_path], 4, device="cuda")
    here = downstream_loss(other_sites.place, [tmp_path], 4, device="cpu")
    assert there.ce_model == pytest.approx(here.ce_model, rel=1e-3)
    assert there.ce_sae == pytest.approx(here.ce_sae, rel=1e-2)


def test_what_cannot_be_measured_is_refused_in_a_sentence(store, other_sites, tmp_path):
    widths = {"d_in": D_IN, "d_out": D_IN, "target_site": "resid_pre.1", "rule": EVERY_ROW}
    made_sae(site="resid_post.1", **widths).save(tmp_path / "backwards")
    with pytest.raises(InputError, match=r"predicts resid_pre\.1 from resid_post\.1, which the"):
        downstream_loss(other_sites.place, [tmp_path / "backwards"], 4)
    random_sae(store, 16, 4, EVERY_ROW).save(tmp_path / "one")
    with pytest.raises(InputError, match=r"Two SAEs replace resid_post\.1; give one SAE"):
        downstream_loss(store.place, [tmp_path / "one", tmp_path / "one"], 4)
    none_held_out = RowRule(heldout_fraction=0)
    random_sae(store, 16, 4, none_held_out).save(tmp_path / "all")
    with pytest.raises(InputError, match="no context cut from held-out documents only"):
        downstream_loss(store.place, [tmp_path / "all"], 4)
    with pytest.raises(SaeHarvestError):
        downstream_loss(tmp_path, [tmp_path / "all"], 4)
    with pytest.raises(InputError, match="no trained SAE"):
        downstream_loss(store.place, [tmp_path / "nothing"], 4)
    random_sae(store, 16, 4, EVERY_ROW, d_in=31).save(tmp_path / "narrow")
    with pytest.raises(SaeHarvestError, match="31"):
        downstream_loss(store.place, [tmp_path / "narrow"], 4)


def test_a_gpu_that_is_not_there_is_refused(store, tmp_path, monkeypatch):
    random_sae(store, 16, 4, EVERY_ROW).save(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no usable GPU"):
        downstream_loss(store.place, [tmp_path], 4, device="cuda")
