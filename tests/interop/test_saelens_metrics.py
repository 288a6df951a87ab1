"""SAELens's own evaluation of our exported SAEs, on the same tokens of the same model.

docs/metrics.md says where the definitions differ; the tests at the end show it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_harvest.harvest.model.models import load_model, resolve_model
from sae_harvest.pipelines.evaluate.downstream import (
    SplicedLoss,
    controls,
    downstream_figures,
    spliced_losses,
)
from sae_harvest.pipelines.evaluate.intervals import clusters_of
from sae_harvest.pipelines.evaluate.reconstruction import HeldoutRows, reconstruction
from sae_harvest.pipelines.evaluate.splicing import Splice
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.formats import format_named
from sae_harvest.train.sae.sae import SAE
from tests.dictionaries import random_sae
from tests.interop.exchange import SCRIPTS, python_of

pytestmark = pytest.mark.slow  # imports that package

EVERY_ROW = RowRule(max_norm_medians=None)
CONTEXTS = np.arange(40)
TOLERANCE = 1e-3
CASES = ("topk", "layer_norm", "scale", "jumprelu")
# their name → our figure of the same definition; `ours` adds the last three
SAME = {
    "explained_variance_legacy": "explained_variance_legacy",
    "cossim": "cosine",
    "l0": "l0",
    "ce_loss_with_sae": "ce",
    "ce_loss_score": "recovered_zero",
    "kl_of_predicted_tokens": "kl",
    "explained_variance": "1 - fvu",
    "ce_loss_without_sae": "ce of the model",
    "ce_loss_with_ablation": "ce with zeros",
}


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> ActivationStore:
    return ActivationStore.open(tiny_store)


@pytest.fixture(scope="module")
def saes(store: ActivationStore) -> dict[str, SAE]:
    """Random directions around the mean of the rows, as each encoder reads them."""
    topk = random_sae(store, 96, 8, EVERY_ROW)
    layer_norm = random_sae(store, 96, 8, EVERY_ROW, normalization="layer_norm")
    layer_norm.b_dec.zero_()
    scale = random_sae(store, 96, 4, EVERY_ROW, normalization="scale", input_scale=2.5)
    scale.b_dec.div_(2.5)
    config = topk.config.model_copy(update={"activation": "jumprelu", "k": None})
    jumprelu = SAE(config, **topk.tensors(), threshold=torch.full((96,), 1.5))
    return {"topk": topk, "layer_norm": layer_norm, "scale": scale, "jumprelu": jumprelu}


@pytest.fixture(scope="module")
def theirs(
    store: ActivationStore,
    saes: dict[str, SAE],
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, dict[str, float]]]:
    python, work = python_of("saelens"), tmp_path_factory.mktemp("saelens_metrics")
    shutil.copytree(model_folder, work / "model")
    tokens = store.tokens(0, len(CONTEXTS)).astype(np.int64)
    save_file({"tokens": torch.from_numpy(tokens)}, work / "tokens.safetensors")
    for name, sae in saes.items():
        (work / "ours" / name).mkdir(parents=True)
        format_named("saelens").write(sae, work / "ours" / name / "sae")
    command = [str(python), str(SCRIPTS / "run_saelens_metrics.py"), str(work)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return {name: json.loads((work / "ours" / name / "metrics.json").read_text()) for name in saes}


@pytest.fixture(scope="module")
def ours(store: ActivationStore, saes: dict[str, SAE]) -> dict[str, dict[str, float]]:
    """Our figures of all rows of the same contexts, by SAE."""
    rows = np.arange(len(CONTEXTS) * store.context_length)
    hashes = [store.row_documents(shard)[1] for shard in range(store.n_shards)]
    held_out = HeldoutRows(
        rows,
        np.zeros(len(rows), np.bool_),
        clusters_of(np.concatenate(hashes)[rows]),
        rows % store.context_length,
    )
    part = "with outliers"
    found: dict[str, dict[str, float]] = {}
    model = load_model(resolve_model(store.plan["model"]["name"]), torch.float32, "cpu")
    for name, sae in saes.items():
        sums = reconstruction({"SAE": sae}, store, held_out)["SAE", part]
        figures = list(sums.figures("SAE", part))
        losses: dict[str, SplicedLoss] = spliced_losses(
            model, store, controls(store, [sae]) | {"SAE": Splice([sae])}, CONTEXTS
        )
        figures += [f for f in downstream_figures(losses) if f.subject == "SAE"]
        found[name] = {figure.metric: figure.value for figure in figures}  # type: ignore[misc]
        found[name] |= {
            "1 - fvu": 1 - found[name]["fvu"],
            "ce of the model": losses["SAE"].means[1],
            "ce with zeros": losses["zero"].means[2],
        }
    return found


@pytest.mark.parametrize("name", CASES)
def test_figures_of_the_same_definition_agree(theirs, ours, name):
    found, expected = theirs[name]["one batch"], ours[name]
    for their_name, our_name in SAME.items():
        assert found[their_name] == pytest.approx(expected[our_name], abs=TOLERANCE), our_name
    assert found["mse"] == pytest.approx(expected["mse"], rel=TOLERANCE)
    assert 0.1 < expected["fvu"] < 1.5
    assert expected["kl"] > 0.1


@pytest.mark.parametrize("name", CASES)
def test_the_legacy_explained_variance_depends_on_the_batches(theirs, name):
    one, four = theirs[name]["one batch"], theirs[name]["four batches"]
    assert one["explained_variance"] == pytest.approx(four["explained_variance"], abs=1e-6)
    assert abs(one["explained_variance_legacy"] - four["explained_variance_legacy"]) > 1e-5


@pytest.mark.parametrize("name", CASES)
def test_their_divergence_has_one_position_more(theirs, ours, name):
    assert theirs[name]["one batch"]["kl_div_with_sae"] != pytest.approx(ours[name]["kl"], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_they_leave_special_tokens_out_by_default(theirs, name):
    everything, default = theirs[name]["one batch"], theirs[name]["without special tokens"]
    assert everything["explained_variance"] != default["explained_variance"]
    assert everything["ce_loss_without_sae"] != default["ce_loss_without_sae"]
