"""As many neurons as GPT-2 XL has, of a model with random weights: memory of their tables.

python -m bench.neurons STORE FOLDER      the tables of every layer: memory as JSON, by layer
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.inputs import gpt2_model, write_long_news
from bench.measurement import Measurement, peak_bytes
from sae_harvest.common.console import output
from sae_harvest.common.memory import keep_memory
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.store.reader import ActivationStore

LAYERS, NEURONS, ROWS = 48, 6_400, 4_096


def measure(folder: Path) -> list[Measurement]:
    """neurons_memory: the peak after all layers over the peak after two.

    Not over the first one's: from the second one on, the process holds what the one before left.
    """
    model = gpt2_model(folder / "narrow", n_layer=LAYERS, n_embd=64, n_head=4, n_inner=NEURONS)
    corpus, store = folder / "neurons.jsonl", folder / "neurons"
    write_long_news(corpus, ROWS)
    config = HarvestConfig(
        model=str(model),
        corpus=CorpusSpec(name=str(corpus)),
        sites=tuple(f"mlp_act.{layer}" for layer in range(LAYERS)),
        tokens=ROWS,
    )
    run(config, store, Execution(workers=0))
    command = [sys.executable, "-m", "bench.neurons", store, folder / "tables"]
    arguments = [str(part) for part in command]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(store)
    layers: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
    peaks = [layer["peak"] / 1e6 for layer in layers]
    after = ", ".join(f"{peaks[layer]:,.0f}" for layer in (0, 1, -1))
    output().print(f"peak after one, two and all {LAYERS} layers: {after} MB")
    for name in ("neurons", "firings", "seconds"):
        output().print(f"{name}: {sum(layer[name] for layer in layers):,.0f}")
    return [
        Measurement(
            "neurons_memory", peaks[-1], peaks[1], "MB", 1.05, 1.10,
            higher_is_better=False,
        )
    ]  # fmt: skip


def tables_of_all(place: str, folder: str) -> list[dict[str, Any]]:
    """Builds the tables of each site, one after the other, and leaves none.

    In a process that keeps its memory, as the command's does.
    """
    keep_memory()
    found = []
    for site in ActivationStore.open(place).sites:
        built = build(place, "identity", Path(folder), FeatureConfig(), site=site)
        shutil.rmtree(folder)
        found.append(
            {
                "neurons": built.run["n_latents"],
                "firings": built.run["n_firings"],
                "seconds": built.seconds,
                "peak": peak_bytes(),
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(tables_of_all(*sys.argv[1:])))
