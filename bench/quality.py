"""Reconstruction and dead latents of dictionaries that peers and we train on the same rows.

    python -m bench.quality STORE FOLDER                          everything
    python -m bench.quality STORE FOLDER --who ours --seeds 0 1   some of it

One store, the same rows in the same order, the same n_latents, k and number of steps; each peer
trains by its own recipe, in its own interpreter (`bench/peers/`), and one judge reads all the
results. FOLDER keeps rows, weights and figures (`quality.json`); what is there is not done again.

    fvu             squared error over variance on held-out documents, rows without outliers
    silent          share of latents that fire in none of those rows
    silent_trained  share that fire in none of the last SILENT_ROWS rows trained on
    dead            share that fire in neither
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.table import Table

from sae_harvest.common.console import output
from sae_harvest.store.loading.loader import ShuffledLoader
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig, TrainConfig
from sae_harvest.train.evaluate import Fvu
from sae_harvest.train.run.trainer import train
from sae_harvest.train.sae.sae import SAE

N_LATENTS, K, BATCH_ROWS, STEPS = 4608, 32, 4096, 354
SILENT_ROWS = 128 * BATCH_ROWS
SEEDS = (0, 1, 2)
PEERS = Path(__file__).parents[1] / ".venv-peers"
RECIPES = {
    "ours": ("default",),
    "sparsify": ("default", "adam"),
    "saelens": ("default", "scaled"),
    "dictionary_learning": ("default", "scaled"),
}
MAX_MISREADING = 1e-3  # of a peer's weights: error against its own reconstruction, relative


class Judge:
    """The rows that all are trained on, and the one measure of what comes out."""

    def __init__(self, place: str, folder: Path, steps: int = STEPS) -> None:
        self.place, self.folder, self.steps = place, folder, steps
        self.store = store = ActivationStore.open(place)
        self.site = store.site(None)
        self.rule = RowRule()
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, seed: int) -> None:
        """Writes rows.npy and order-SEED.npy (see `bench/peers/training_rows.py`)."""
        selected = np.flatnonzero(self.store.selected(self.site, self.rule))  # [rows]
        if not (self.folder / "rows.npy").exists():
            self._write_rows(selected)
        path = self.folder / f"order-{seed}.npy"
        if path.exists() and len(np.load(path, mmap_mode="r")) == self.steps:
            return
        loader = ShuffledLoader(self.store, self.site, BATCH_ROWS, seed=seed, rule=self.rule)
        try:
            rows = [loader.next_batch().rows.copy() for _ in range(self.steps)]
        finally:
            loader.close()
        np.save(path, np.searchsorted(selected, np.stack(rows)))  # [steps, batch_rows]

    def _write_rows(self, selected: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        unfinished = self.folder / "rows.tmp"
        shape = (len(selected), self.store.width(self.site))
        rows = np.lib.format.open_memmap(unfinished, "w+", self.store.dtype, shape)
        step = self.store.chunk_rows(self.site)
        for start in range(0, self.store.n_rows, step):
            stop = min(start + step, self.store.n_rows)
            first, last = np.searchsorted(selected, (start, stop))
            chunk = self.store.read(self.site, start, stop)
            rows[first:last] = chunk[selected[first:last] - start]
        rows.flush()
        unfinished.rename(self.folder / "rows.npy")

    def batch(self, seed: int, step: int) -> torch.Tensor:
        """What every run of that seed is given at that step: float32 [batch_rows, d_in]."""
        rows = np.load(self.folder / "rows.npy", mmap_mode="r")
        order = np.load(self.folder / f"order-{seed}.npy", mmap_mode="r")
        return torch.from_numpy(rows[order[step]].astype(np.float32))

    def read_peer(self, path: Path, k: int) -> tuple[SAE, dict[str, float]]:
        """A peer's weights as a dictionary of ours, and its seconds a step.

        Raises:
            SystemExit: it does not reconstruct as the peer itself does.
        """
        with np.load(path) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        seconds = {name: float(tensors.pop(name)) for name in ("cpu", "wall")}
        x, expected = tensors.pop("check_x"), tensors.pop("check_x_hat")
        n_latents, d_in = tensors["W_enc"].shape
        config = SAEConfig(d_in=d_in, n_latents=n_latents, k=k, site=self.site, rule=self.rule)
        sae = SAE(config, **{name: tensor.contiguous() for name, tensor in tensors.items()})
        spread = float((expected - expected.mean(0)).norm())
        error = float((sae.decode(*sae.encode(x)) - expected).norm()) / spread
        if error > MAX_MISREADING:
            raise SystemExit(f"{path} is read wrongly: relative error {error:.2g}")
        return sae, seconds

    def figures(self, sae: SAE, seed: int) -> dict[str, float]:
        """fvu, l0, silent, silent_trained and dead."""
        fvu, active = Fvu(sae.config.d_in), 0
        fired = torch.zeros(2, sae.config.n_latents, dtype=torch.bool)
        for x in self._held_out():
            indices, values = sae.encode(x)
            fvu.update(x.numpy(), sae.decode(indices, values).numpy())
            active += int((values > 0).sum())
            fired[0, indices[values > 0].long()] = True
        for step in range(max(0, self.steps - SILENT_ROWS // BATCH_ROWS), self.steps):
            indices, values = sae.encode(self.batch(seed, step))
            fired[1, indices[values > 0].long()] = True
        silent, silent_trained = (~fired).double().mean(1).tolist()
        dead = float((~fired.any(0)).double().mean())
        assert fvu.value is not None  # real rows vary
        return {
            "fvu": fvu.value,
            "l0": active / fvu.rows,
            "silent": silent,
            "silent_trained": silent_trained,
            "dead": dead,
        }

    def _held_out(self) -> Iterator[torch.Tensor]:
        """Held-out rows without outliers, float32 [some, d_in]."""
        rule = self.rule.model_copy(update={"split": "heldout"})
        selected = self.store.selected(self.site, rule)
        step = self.store.chunk_rows(self.site)
        for start in range(0, self.store.n_rows, step):
            stop = min(start + step, self.store.n_rows)
            x = self.store.read(self.site, start, stop)[selected[start:stop]]
            if len(x):
                yield torch.from_numpy(x.astype(np.float32))


def train_peer(judge: Judge, who: str, recipe: str, seed: int) -> tuple[SAE, dict[str, float]]:
    """Runs bench/peers/WHO_train.py; the dictionary, and CPU and wall seconds a step."""
    out = judge.folder / f"{who}-{recipe}-{seed}.npz"
    script = Path(__file__).parent / "peers" / f"{who}_train.py"
    settings = [judge.folder, N_LATENTS, K, seed, recipe, out]
    command = [PEERS / who / "bin" / "python", script, *settings]
    if not out.exists() and subprocess.run([str(part) for part in command]).returncode:
        raise SystemExit(f"{script} failed, see above")
    return judge.read_peer(out, K)


def train_ours(judge: Judge, seed: int) -> tuple[SAE, dict[str, float]]:
    """Our own trainer with its defaults, loader, checkpoints and evaluation included."""
    out = judge.folder / f"ours-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(
        n_latents=N_LATENTS, k=K, tokens=judge.steps * BATCH_ROWS, batch_rows=BATCH_ROWS, seed=seed
    )
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    train(config, judge.place, out, device="cpu")
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return SAE.load(out), {"cpu": cpu / judge.steps, "wall": wall / judge.steps}


def measure(judge: Judge, who: str, recipe: str, seed: int) -> dict[str, float]:
    """Figures of one run, from FOLDER/quality.json if it was measured before."""
    path = judge.folder / "quality.json"
    name = f"{who}/{recipe}/{seed}"
    known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        judge.prepare(seed)
        if who == "ours":
            sae, seconds = train_ours(judge, seed)
        else:
            sae, seconds = train_peer(judge, who, recipe, seed)
        figures = judge.figures(sae, seed) | seconds
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {name: figures}, indent=2) + "\n")
        output().print(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        return figures
    return known[name]


def table(runs: dict[tuple[str, str], list[dict[str, float]]]) -> Table:
    """One line per trainer and recipe: each seed's FVU, and means."""
    columns = ("trainer", "recipe", "FVU by seed", "FVU", "dead", "silent", "CPU s")
    result = Table(*columns, box=None)
    for (who, recipe), figures in runs.items():
        averages = {key: mean(f[key] for f in figures) for key in figures[0]}
        result.add_row(
            who,
            recipe,
            " ".join(f"{f['fvu']:.4f}" for f in figures),
            f"{averages['fvu']:.4f}",
            f"{averages['dead']:.2%}",
            f"{averages['silent']:.2%}",
            f"{averages['cpu']:.2f}",
        )
    return result


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality")
    parser.add_argument("store", help="sealed store with one site")
    parser.add_argument("folder", type=Path, help="where rows, weights and figures are kept")
    parser.add_argument("--who", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--recipe", nargs="+", help="only these recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args(arguments)
    judge = Judge(chosen.store, chosen.folder, chosen.steps)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for who, seed in product(chosen.who, chosen.seeds):
        for recipe in RECIPES[who]:
            if not chosen.recipe or recipe in chosen.recipe:
                runs.setdefault((who, recipe), []).append(measure(judge, who, recipe, seed))
    output().print(table(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
