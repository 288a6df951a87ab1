"""Caches of latents to delphi and back: its loader reads ours, our reader reads its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from sae_harvest.pipelines.exports import delphi
from sae_harvest.pipelines.features.encoding.delphi_cache import DelphiCache
from sae_harvest.store.reader import ActivationStore
from tests.export_cases import built, exported
from tests.feature_cases import read_table
from tests.interop.exchange import SCRIPTS, python_of

pytestmark = pytest.mark.slow  # imports that package
CHOSEN = (3, 20, 21)  # as in the script


def made_latents() -> torch.Tensor:
    """[10, 6, 70]: many zeros, negative ones, some too small for delphi."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(10, 6, 70, generator=generator)
    a[torch.rand(a.shape, generator=generator) < 0.8] = 0
    a[0, 0, :7] = 1e-6
    return a


@pytest.fixture(scope="module")
def features(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python_of("delphi")  # skips, before anything is made
    return built(tiny_store, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def work(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python, work = python_of("delphi"), tmp_path_factory.mktemp("delphi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delphi, "SPLIT_FIRINGS", 20_000)
        exported(features, "delphi", work / "out")
    assert len(list((work / "out" / "latents" / "h.1").glob("*.safetensors"))) > 1
    tokens = torch.arange(60).reshape(10, 6)
    save_file({"activations": made_latents(), "tokens": tokens}, work / "dense.safetensors")
    command = [str(python), str(SCRIPTS / "run_delphi.py"), str(work)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return work


@pytest.fixture(scope="module")
def read(work: Path) -> dict[str, np.ndarray]:
    return load_file(work / "read.safetensors")


@pytest.mark.parametrize("which", ["all", "some"])
def test_its_loader_yields_our_firings(
    features: Path, read: dict[str, np.ndarray], which: str
) -> None:
    length = read["tokens"].shape[1]
    found = {}
    for (context, position, latent), value in zip(
        read[f"{which}.locations"].tolist(), read[f"{which}.activations"].tolist(), strict=True
    ):
        found[context * length + position, latent] = value
    assert found == {
        (f["row"], f["latent"]): float(np.float16(f["value"]))
        for f in read_table(features, "firings/*")
        if which == "all" or f["latent"] in CHOSEN
    }


def test_its_loader_has_the_stores_tokens(tiny_store: Path, read: dict[str, np.ndarray]) -> None:
    store = ActivationStore.open(tiny_store)
    np.testing.assert_array_equal(read["tokens"], store.tokens(0, store.n_contexts))


def test_its_records_are_of_our_latents(
    features: Path, tiny_store: Path, read: dict[str, np.ndarray]
) -> None:
    latents = {row["latent"]: row for row in read_table(features, "latents")}
    n_rows = ActivationStore.open(tiny_store).n_rows
    assert len(read["explained"]) > 30
    for latent, frequency, largest in zip(
        read["explained"].tolist(), read["frequency"], read["largest"], strict=True
    ):
        assert frequency == pytest.approx(latents[latent]["n_fire"] / n_rows)
        assert float(largest) == float(np.float16(latents[latent]["max"]))


def test_we_read_the_cache_it_writes(work: Path) -> None:
    cache = DelphiCache(work / "theirs" / "layers.3")
    assert (cache.n_latents, cache.context_length, cache.model_name) == (70, 6, "a-model")
    np.testing.assert_array_equal(cache.tokens, np.arange(60).reshape(10, 6))
    dense = np.zeros((60, 70), np.float32)
    for first in range(0, 10, 3):
        block = cache.firings(first, min(first + 3, 10))
        latent = np.repeat(np.arange(70), np.diff(block.starts))
        dense[block.first_row + block.row, latent] = block.value
    expected = made_latents().reshape(60, 70).numpy()
    expected[expected < 1e-5] = 0
    np.testing.assert_array_equal(dense, expected.astype(np.float16).astype(np.float32))
