"""Ablations on a tiny model, against a slow computation of its own."""

from __future__ import annotations

import shutil

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.harvest.model.models import load_model, load_tokenizer, resolve_model
from sae_harvest.harvest.model.sites import SITE_KINDS, Site, locate
from sae_harvest.pipelines.evaluate.ablation import passes, table
from sae_harvest.pipelines.evaluate.ablation.changes import (
    ABLATE_CONTEXT,
    ABLATE_ROW,
    Change,
    ContextFirings,
    ablation,
)
from sae_harvest.pipelines.evaluate.ablation.figures import RANDOM_DIRECTION, ablation_figures
from sae_harvest.pipelines.evaluate.ablation.passes import changed_logits
from sae_harvest.pipelines.evaluate.ablation.sample import AblationConfig, drawn_rows
from sae_harvest.pipelines.evaluate.ablation.sparsity import ablation_effects
from sae_harvest.pipelines.evaluate.downstream import heldout_contexts
from sae_harvest.pipelines.evaluate.intervals import clusters_of
from sae_harvest.pipelines.evaluate.splicing import located_sites
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from tests.dictionaries import SITE, random_sae
from tests.hand_blocks import LAYER, block_by_hand
from tests.steer_cases import made_sae

RULE = RowRule(max_norm_medians=1.2, heldout_fraction=0.4)
CONFIG = AblationConfig(n_rows=5, n_latents=2, n_tokens=6, seed=3)
T = CONFIG.n_tokens


@pytest.fixture(scope="module")
def store(tiny_store):
    return ActivationStore.open(tiny_store)


@pytest.fixture(scope="module")
def model(store):
    """In float64, so that results can be compared to 1e-6 whatever the order of sums."""
    return load_model(resolve_model(store.plan["model"]["name"]), torch.float64, "cpu")


@pytest.fixture(scope="module")
def texts(store):
    return TokenTexts(load_tokenizer(resolve_model(store.plan["model"]["name"])))


@pytest.fixture(scope="module")
def dictionaries(store):
    return {"SAE": random_sae(store, 48, 6, RULE), "channels": random_sae(store, 20, 4, RULE, 1)}


@pytest.fixture(scope="module")
def effects(store, model, texts, dictionaries, tmp_path_factory):
    out = tmp_path_factory.mktemp("effects")
    return ablation_effects(store, model, texts, dictionaries, out, CONFIG)


def slow_logits(model, tokens, kind, changed):
    """Logits of a whole context, with vectors {position: vector} added in a block of our own."""

    def at(site, x):
        x = x.clone()
        if site == kind:
            for position, vector in changed.items():
                x[0, position] += vector
        return x

    with torch.no_grad(), block_by_hand(model, at):
        return model(tokens[None], use_cache=False).logits[0]


def slow_effect(plain, changed, following):
    """Numpy, in float64."""
    before, after = (x.double().numpy() for x in (plain, changed))
    moved = after - before
    moved -= np.median(moved, axis=1, keepdims=True)

    def log_probabilities(x):
        return (
            x
            - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
            - x.max(1, keepdims=True)
        )

    before, after = log_probabilities(before), log_probabilities(after)
    each = np.arange(len(following))
    return {
        "kl": (np.exp(before) * (before - after)).sum(1).mean(),
        "delta_ce": (before - after)[each, following].mean(),
        "l1": np.abs(moved).sum(),
        "l2": np.sqrt(np.square(moved).sum()),
        "top": int(moved.mean(0).argmax()),
        "bottom": int(moved.mean(0).argmin()),
    }


def dense(store, sae, context):
    """Activations of every latent on every row of a context; none on rows that are not read."""
    first = context * store.context_length
    x = torch.from_numpy(store.read(SITE, first, first + store.context_length)).float()
    shard = first // store.shard_rows
    limit = RULE.max_norm_medians * store.norm_median(SITE, shard)
    read = store.norms(SITE, first, first + store.context_length) <= limit
    return sae.encode_dense(x).numpy() * read[:, None]


def test_the_table_is_what_a_slow_computation_of_its_own_gives(store, model, dictionaries, effects):
    pairs = 0
    for row in effects.to_pylist():
        if row["subject"] == RANDOM_DIRECTION:
            continue
        sae = dictionaries[row["subject"]]
        context, position = divmod(row["row"], store.context_length)
        z = dense(store, sae, context)[:, row["latent"]]
        assert row["activation"] == pytest.approx(z[position])
        where = [position] if row["operation"] == ABLATE_ROW else np.flatnonzero(z).tolist()
        changed = {p: -z[p] * sae.W_dec[row["latent"]] for p in where}
        tokens = torch.from_numpy(store.tokens(context, context + 1)[0].astype(np.int64))
        plain = slow_logits(model, tokens, "resid_post", {})
        other = slow_logits(model, tokens, "resid_post", changed)
        here = slice(position, position + T)
        following = tokens[position + 1 : position + T + 1].numpy()
        expected = slow_effect(plain[here], other[here], following)
        for name in ("kl", "delta_ce", "l1", "l2"):
            assert row[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-12), name
        assert row["up_ids"][0] == expected["top"]
        assert row["down_ids"][0] == expected["bottom"]
        pairs += len(where) > 1
    assert pairs  # the two conventions differ somewhere


def test_the_sample_is_stated_and_drawn_from_held_out_rows(store, dictionaries, effects):
    assert effects.num_rows == 5 * 2 * 2 * 3  # rows, latents, operations, subjects
    rows = np.unique(effects["row"].to_numpy())
    assert rows.tolist() == drawn_rows(store, dictionaries["SAE"], CONFIG).tolist()
    assert (rows % store.context_length < store.context_length - T).all()
    whole = heldout_contexts(store, [dictionaries["SAE"]], 5)
    assert set(rows // store.context_length) <= set(whole.tolist())
    for row in effects.to_pylist():
        assert row["tokens"] == T
        assert row["dose"] == 0
        shard, inside = divmod(row["row"], store.shard_rows)
        assert row["document"] == store.row_documents(shard)[0][inside]
    other = drawn_rows(store, dictionaries["SAE"], CONFIG.model_copy(update={"seed": 4}))
    assert other.tolist() != rows.tolist()


def test_a_random_direction_has_the_norm_and_the_positions_of_the_ablation(
    store, model, texts, dictionaries, effects
):
    mine = effects.filter(np.array(effects["subject"].to_pylist()) == RANDOM_DIRECTION)
    sae = effects.filter(np.array(effects["subject"].to_pylist()) == "SAE")
    for name in ("operation", "latent", "row", "activation"):
        assert mine[name].to_pylist() == sae[name].to_pylist()
    assert not np.allclose(mine["l2"].to_numpy(), sae["l2"].to_numpy(), rtol=1e-3)


@pytest.mark.parametrize("normalization", ["none", "scale", "unit_norm", "layer_norm"])
def test_an_ablation_subtracts_the_contribution_in_the_units_of_the_model(normalization):
    fields = {"normalization": normalization}
    sae = made_sae(16, **fields | ({"input_scale": 2.5} if normalization == "scale" else {}))
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)) * 3
    is_read = torch.ones(9, dtype=torch.bool)
    is_read[2] = False
    firings = ContextFirings.of(sae, x, is_read)
    assert not len(firings.active(2)[0])
    indices, values = sae.encode(x)
    for latent in firings.active(5)[0].tolist():
        change = ablation(sae, firings, latent, 5, ABLATE_CONTEXT, 9)
        without = values.masked_fill(indices == latent, 0.0)
        expected = sae.decode(indices, without, x) - sae.decode(indices, values, x)
        expected[2] = 0
        got = torch.zeros_like(expected).index_add_(0, change.position, change.vector)
        assert torch.allclose(got, expected, atol=1e-5)
        one = ablation(sae, firings, latent, 5, ABLATE_ROW, 9)
        assert one.position.tolist() == [5]
        assert torch.allclose(one.vector[0], expected[5], atol=1e-5)


def test_batches_change_nothing(store, model, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.from_numpy(store.tokens(0, 1)[0].astype(np.int64))
    site = Site.parse(SITE)
    located = located_sites(model, [random_sae(store, 8, 2, RULE)])
    starts = [0, 3, 3, 9, 20, 26, 26, 26, 11]
    changes = [
        Change(torch.arange(s, 28), torch.randn(28 - s, 32, generator=generator)) for s in starts
    ]

    def logits():
        found = changed_logits(model, located, site, tokens, 6, changes)
        return {number: torch.stack([a, b]) for number, a, b in found}

    whole = logits()
    assert sorted(whole) == list(range(len(changes)))
    for name, value in {"BATCH_LOGITS": 1, "BATCH_TOKENS": 64}.items():
        with monkeypatch.context() as patch:
            patch.setattr(passes, name, value)
            for number, found in logits().items():
                assert torch.allclose(found, whole[number], rtol=1e-9, atol=1e-9)
    for number, change in enumerate(changes):
        vectors = dict(zip(change.position.tolist(), change.vector, strict=True))
        slow = slow_logits(model, tokens, "resid_post", vectors)[-6:]
        assert torch.allclose(whole[number][1], slow, rtol=1e-9, atol=1e-9)


FLOATS = ["kl", "delta_ce", "l1", "l2", "up_logits", "down_logits"]


def flat(effects, name):
    column = effects[name].combine_chunks()
    return (column.values if hasattr(column, "values") else column).to_numpy()


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_every_site_changes_as_in_a_block_computed_line_by_line(store, model, kind):
    site = Site.parse(f"{kind}.{LAYER}")
    width = 128 if kind == "mlp_act" else 32
    generator = torch.Generator().manual_seed(3)
    tokens = torch.from_numpy(store.tokens(1, 2)[0].astype(np.int64))
    changes = [Change(torch.tensor(at), torch.randn(len(at), width, generator=generator))
               for at in ([20], [4, 21], [0, 7, 25])]  # fmt: skip
    found = changed_logits(model, locate(model, [site]), site, tokens, 12, changes)
    for number, plain, changed in found:
        vectors = dict(zip(changes[number].position.tolist(), changes[number].vector, strict=True))
        for logits, expected in ((plain, {}), (changed, vectors)):
            slow = slow_logits(model, tokens, kind, expected)[-12:]
            assert torch.allclose(logits, slow, rtol=1e-9, atol=1e-9)


def test_a_transcoder_is_ablated_at_the_site_that_it_predicts():
    fields = {"normalization": "scale", "input_scale": 2.5, "output_scale": 3.0, "d_out": 12}
    sae = made_sae(16, "mlp_out.1", target_site="mlp_out.2", **fields)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) * 3
    firings = ContextFirings.of(sae, x, torch.ones(6, dtype=torch.bool))
    indices, values = sae.encode(x)
    latent = int(firings.active(3)[0][0])
    change = ablation(sae, firings, latent, 3, ABLATE_ROW, 6)
    without = values.masked_fill(indices == latent, 0.0)
    expected = sae.decode(indices, without, x) - sae.decode(indices, values, x)
    assert torch.allclose(change.vector[0], expected[3], atol=1e-5)


def test_an_interrupted_run_continues_and_does_not_repeat_what_is_done(
    store, model, texts, dictionaries, effects, tmp_path, monkeypatch
):
    written, write = [], table.Parts.write

    def killed(self, number, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, rows)

    with monkeypatch.context() as patch:
        patch.setattr(table.Parts, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            ablation_effects(store, model, texts, dictionaries, tmp_path, CONFIG)
    assert not (tmp_path / "effects.parquet").exists()
    other = CONFIG.model_copy(update={"seed": 9})
    with pytest.raises(RunError, match=r"another sample \(differing: config.seed: 3 → 9\)"):
        ablation_effects(store, model, texts, dictionaries, tmp_path, other)
    seen = []

    def note(self, number, rows):
        seen.append(number)
        write(self, number, rows)

    monkeypatch.setattr(table.Parts, "write", note)
    told = []
    found = ablation_effects(
        store, model, texts, dictionaries, tmp_path, CONFIG, lambda *done: told.append(done)
    )
    assert (written, seen) == ([0, 1], [2, 3, 4])
    assert told == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert found.drop_columns(FLOATS).equals(effects.drop_columns(FLOATS))
    for name in FLOATS:  # sums of the same numbers at other places in memory may differ in a bit
        assert flat(found, name) == pytest.approx(flat(effects, name), rel=1e-6, abs=1e-9)
    assert not (tmp_path / "effects").exists()
    again = ablation_effects(store, model, texts, dictionaries, tmp_path, CONFIG)
    assert again.equals(found)
    assert seen == [2, 3, 4]
    with pytest.raises(RunError, match="another sample"):
        ablation_effects(store, model, texts, dictionaries, tmp_path, other)
    shutil.copy(tmp_path / "effects.parquet", tmp_path / "cut.parquet")
    (tmp_path / "effects.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="is missing or damaged"):
        ablation_effects(store, model, texts, dictionaries, tmp_path, CONFIG)


def test_sparsity_is_a_group_by_over_the_table(store, effects, tmp_path):
    pq.write_table(effects, tmp_path / "effects.parquet")
    found = duckdb.sql(
        "SELECT subject, operation, avg((l1 / l2) ** 2 / (vocabulary * tokens)) AS sparsity, "
        f"count(*) AS firings FROM '{tmp_path}/effects.parquet' WHERE l2 > 0 "
        "GROUP BY subject, operation ORDER BY subject, operation"
    ).fetchall()
    figures = [f for f in ablation_figures(effects, store) if f.metric == "ablation_sparsity"]
    assert len(found) == 6
    figures.sort(key=lambda figure: (figure.subject, figure.part))
    for row, figure in zip(found, figures, strict=True):
        assert row[:2] == (figure.subject, figure.part)
        assert row[2] == pytest.approx(figure.value, rel=1e-12)
        assert row[3] == figure.count
        assert 0 < figure.low < figure.value < figure.high <= 1


def test_the_difference_from_random_directions_is_taken_pair_by_pair(store, effects):
    rows = {(r["subject"], r["operation"], r["latent"], r["row"]): r for r in effects.to_pylist()}
    for figure in ablation_figures(effects, store):
        if figure.metric != "ablation_sparsity_difference":
            continue
        differences = []
        for (subject, operation, *where), row in rows.items():
            if (subject, operation) == ("SAE", figure.part):
                other = rows[RANDOM_DIRECTION, operation, *where]
                mine, theirs = ((r["l1"] / r["l2"]) ** 2 for r in (row, other))
                differences.append((mine - theirs) / (row["vocabulary"] * row["tokens"]))
        assert figure.value == pytest.approx(np.mean(differences))
        assert figure.count == len(differences) == 10
        assert figure.low < figure.value < figure.high


def test_intervals_draw_documents(store, effects):
    """All effects of one document are in one cluster."""
    figure = next(f for f in ablation_figures(effects, store) if f.metric == "ablation_kl")
    mine = [
        r
        for r in effects.to_pylist()
        if (r["subject"], r["operation"]) == (figure.subject, figure.part)
    ]
    hashes = [
        store.row_documents(r["row"] // store.shard_rows)[1][r["row"] % store.shard_rows]
        for r in mine
    ]
    assert figure.value == pytest.approx(np.mean([r["kl"] for r in mine]))
    assert 1 < len(set(clusters_of(np.array(hashes)).tolist())) <= 5
    one = effects.filter(effects["row"].to_numpy() == effects["row"][0].as_py())
    assert all(f.low is None for f in ablation_figures(one, store))


def test_what_cannot_be_sampled_is_refused_in_a_sentence(store):
    sae = random_sae(store, 8, 2, RULE)
    with pytest.raises(InputError, match=r"have 32 tokens, so none has 32 tokens and one after"):
        drawn_rows(store, sae, AblationConfig(n_tokens=32))
    none = random_sae(store, 8, 2, RULE.model_copy(update={"heldout_fraction": 0.0}))
    with pytest.raises(InputError, match="held-out documents only"):
        drawn_rows(store, none, CONFIG)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_effects_of_the_processor(store, texts, dictionaries, effects, tmp_path):
    resolved = resolve_model(store.plan["model"]["name"])
    there = load_model(resolved, torch.float64, "cuda")
    on_gpu = {name: sae.to("cuda") for name, sae in dictionaries.items()}
    found = ablation_effects(store, there, texts, on_gpu, tmp_path, CONFIG)
    for name in ("row", "latent"):
        assert found[name].equals(effects[name])
    for name in ("kl", "l1", "l2"):
        assert np.allclose(found[name].to_numpy(), effects[name].to_numpy(), rtol=1e-3)
