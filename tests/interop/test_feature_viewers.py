"""What the packages of OpenAI and circuit-tracer make of exported latents, in their own classes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.export_cases import as_float32, built, contexts_of, exported
from tests.feature_cases import DEAD, SAE_LATENTS, read_table, tokens_of
from tests.interop.exchange import SCRIPTS, python_of

pytestmark = pytest.mark.slow  # imports those packages


@pytest.fixture(scope="module")
def features(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python_of("viewers")  # skips, before anything is made
    return built(tiny_store, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def work(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python, work = python_of("viewers"), tmp_path_factory.mktemp("viewers")
    exported(features, "openai", work / "openai")
    exported(features, "circuit-tracer", work / "circuit")
    command = [str(python), str(SCRIPTS / "run_viewers.py"), str(work)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return work


def test_neuron_explainer_loads_our_records(features: Path, work: Path) -> None:
    found = json.loads((work / "neurons.json").read_text())
    assert set(found) == {str(i) for i in range(SAE_LATENTS) if i != DEAD}
    for facts in read_table(features, "latents"):
        if facts["dead"]:
            continue
        said = found[str(facts["latent"])]
        assert as_float32([said["max_activation"], said["of_train"]]) == [facts["max"]] * 2
        assert said["mean"] == pytest.approx(facts["mean"] * facts["density"])
    top = contexts_of(features, 5)["top"][0]
    assert found["5"]["tokens"] == tokens_of(top)


def test_circuit_tracer_takes_our_features(features: Path, work: Path) -> None:
    found = json.loads((work / "features.json").read_text())
    assert set(found) == {f"1/{i}" for i in range(SAE_LATENTS)}
    for facts in read_table(features, "latents"):
        said = found[f"1/{facts['latent']}"]
        assert said["activation_frequency"] == facts["density"]
        assert as_float32([said["act_max"]]) == [facts["max"]]
        assert sum(said["histogram"]) == facts["n_fire"]
