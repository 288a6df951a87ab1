"""A feature build, tables and all, against encoding the same rows; its memory; delphi's cache.

Encoding alone is reading the rows and `SAE.encode` of one batch after another, each with all
threads. The build encodes several batches at once, which leaves less waiting.

python -m bench.feature_pass STORE SAE OUT      builds once: seconds, rows, peak memory as JSON
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.inputs import gpt2_model, write_long_news
from bench.measurement import Measurement, peak_bytes, seconds
from sae_harvest.common.console import output
from sae_harvest.common.memory import keep_memory
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.encoding.encode import batches
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.sae.sae import SAE

SMALL, LARGE = 1 << 18, 1 << 21  # rows
WIDTH, N_LATENTS, K = 768, 24_576, 32
RULE = RowRule(split="all")
PEER = Path(__file__).parents[1] / ".venv-peers" / "delphi" / "bin" / "python"
PEER_SCRIPT = Path(__file__).parent / "peers" / "delphi_cache.py"
PEER_ROWS = 16_384
SITE = "resid_post.0"


def measure(folder: Path) -> list[Measurement]:
    """feature_pass, feature_memory and feature_vs_delphi, on stores made in `folder`."""
    model = gpt2_model(folder / "one-block", n_layer=1, n_embd=WIDTH, n_head=12)
    corpus = folder / "corpus.jsonl"
    write_long_news(corpus, LARGE)
    found = {}
    for rows in (SMALL, LARGE):
        config = HarvestConfig(
            model=str(model), corpus=CorpusSpec(name=str(corpus)), sites=(SITE,), tokens=rows
        )
        store = folder / f"rows-{rows}"
        run(config, store, Execution(workers=0))
        found[rows] = _measure(store, folder)
        if rows == SMALL:
            peer = _peer(store, folder)
        shutil.rmtree(store)
    corpus.unlink()
    small, large = found[SMALL], found[LARGE]
    for rows, one in found.items():
        output().print(
            f"{rows:,} rows: encoding {one['encoding']:.1f} s, the whole build "
            f"{one['seconds']:.1f} s ({one['seconds'] / one['encoding']:.2f}), "
            f"{one['peak'] / 1e6:,.0f} MB at most"
        )
    rate = large["rows"] / large["seconds"]
    measured = [
        Measurement(
            "feature_pass", large["seconds"], large["encoding"], "s", 1.05, 1.25,
            higher_is_better=False,
        ),
        Measurement(
            "feature_memory", large["peak"] / 1e6, small["peak"] / 1e6, "MB", 1.05, 1.10,
            higher_is_better=False,
        ),
    ]  # fmt: skip
    if peer is None:
        output().print(f"feature_vs_delphi is left out: there is no {PEER}; run `make peers`.")
        return measured
    return [
        *measured,
        Measurement("feature_vs_delphi", rate, peer, "tokens/s", 4, 2, higher_is_better=True),
    ]


def _measure(store: Path, folder: Path) -> dict[str, float]:
    """Seconds of encoding alone and of a build, rows read, and the build's peak memory."""
    sae, out = folder / "random-sae", folder / "features"
    random_sae(ActivationStore.open(store)).save(sae)
    command = [sys.executable, "-m", "bench.feature_pass", store, sae, out]
    arguments = [str(part) for part in command]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def _peer(store: Path, folder: Path) -> float | None:
    """delphi's tokens a second; None where it is not installed."""
    if not PEER.exists():
        return None
    rows = ActivationStore.open(store).read(SITE, 0, PEER_ROWS).astype(np.float32)
    np.save(folder / "rows.npy", rows)
    settings = [folder / "rows.npy", N_LATENTS, K, folder / "delphi"]
    command = [str(part) for part in (PEER, PEER_SCRIPT, *settings)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed.splitlines()[-1])


def random_sae(store: ActivationStore, n_latents: int = N_LATENTS) -> SAE:
    """Unit rows in random directions, centred on the store's mean: every latent fires a little."""
    site = store.sites[0]
    width, ordinary = store.width(site), store.statistics(site)["ordinary"]
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(n_latents, width, generator=generator), dim=1)
    config = SAEConfig(
        d_in=width,
        n_latents=n_latents,
        k=K,
        site=site,
        normalization="scale",
        input_scale=float(np.sqrt(ordinary.variance.mean())),
    )
    b_dec = torch.from_numpy(ordinary.mean).float() / config.input_scale
    return SAE(config, rows, rows.clone(), torch.zeros(n_latents), b_dec)


def encode_all(store: ActivationStore, sae: SAE, batch_rows: int, last: int) -> None:
    """Encodes the rows of the shards before row `last` that the rule reads, and keeps nothing."""
    site = store.sites[0]
    read, chunk_rows = partial(store.read, site), store.chunk_rows(site)
    for shard in range(store.n_shards):
        first, _ = store.shard_span(shard)
        if first >= last:
            return
        selected = store.selected_in_shard(site, RULE, shard)
        for _, x in batches(read, selected, first, chunk_rows, batch_rows):
            sae.encode(torch.from_numpy(x))


def once(place: str, sae_path: str, out: str) -> dict[str, Any]:
    """Encoding alone, before and after the build; in a process that keeps its memory, as the
    command's does."""
    keep_memory()
    store, sae, config = ActivationStore.open(place), SAE.load(sae_path), FeatureConfig()
    encode_all(store, sae, config.batch_rows, 1)  # loads compiled code

    def encoding() -> float:
        return seconds(lambda: encode_all(store, sae, config.batch_rows, store.n_rows))

    before = encoding()
    built = build(place, sae_path, Path(out), config)
    return {
        "encoding": (before + encoding()) / 2,  # a machine's speed changes over minutes
        "seconds": built.seconds,
        "rows": built.run["n_rows"],
        "peak": peak_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(once(*sys.argv[1:])))
