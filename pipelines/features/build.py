"""The feature pass: one sparse run over a store, every latent at once, then the tables."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from harvest.models import load_tokenizer
from pipelines.features import tables
from pipelines.features.accumulate import Accumulator
from pipelines.features.config import FeatureConfig
from pipelines.features.folder import FORMAT, RUN_FILE, check_tables, read_run
from pipelines.features.lens import logit_lens
from pipelines.features.neighbours import decoder_neighbours
from pipelines.features.texts import TokenTexts
from pipelines.source import model_of
from store.errors import RunError
from store.objects import make_folder
from store.reader import ActivationStore
from store.rules import RowRule
from train.sae import SAE

Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True, slots=True)
class Built:
    """Ancestry of the tables, as in run.json; `seconds` is None if they were there already."""

    run: dict[str, Any]
    seconds: float | None


def build(
    place: str | Path,
    sae_path: Path,
    out: Path,
    config: FeatureConfig,
    on_progress: Progress = lambda done, total: None,
) -> Built:
    """Write the tables of every latent of an SAE into `out`, or find them there already.

    The tables are made in a temporary folder beside `out` and renamed whole.

    Raises:
        RunError: the SAE does not fit the store, or `out` holds something else or can't be written.
        SaeHarvestError: the store or the SAE cannot be read.
    """
    store, sae = ActivationStore.open(place), SAE.load(sae_path)
    site = check_fit(store, sae, sae_path)
    rule = sae.config.rule.model_copy(update={"split": "all"})
    run: dict[str, Any] = {
        "tables": FORMAT,
        "store": store.place,
        "store_digest": store.digest,
        "sae": str(sae_path.resolve()),
        "sae_digest": sae.digest,
        "site": site,
        "model": store.plan["model"]["name"],
        "n_latents": sae.config.n_latents,
        "rows": rule.describe(),
        "config": config.model_dump(mode="json"),
        "code": version("sae-harvest"),
    }
    if existing := read_run(out):
        moved = ("store", "sae", "code")
        differing = [k for k in run if k not in moved and existing.get(k) != run[k]]
        if differing:
            raise RunError(
                f"{out} holds tables of another build (differing: {', '.join(differing)}); "
                "choose another --out or remove it."
            )
        check_tables(out)
        return Built(existing, None)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} holds something else than tables; choose another --out.")
    start = time.perf_counter()
    final = out.resolve()
    temporary = final.with_name(f".{final.name}.tmp")
    with writing(out):  # before the long pass, to know that it can be done
        make_folder(final.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        made, run["n_rows"] = make_tables(store, site, sae, rule, config, on_progress)
        with writing(out):
            for name, table in made.items():
                tables.write_table(temporary, name, table)
            (temporary / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
            temporary.replace(final)  # takes the place of an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Built(run, time.perf_counter() - start)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """What goes wrong within is about writing `out`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Cannot write the tables into {out}: {error.strerror or error}; "
            "choose another --out or make room there."
        ) from error


def make_tables(
    store: ActivationStore,
    site: str,
    sae: SAE,
    rule: RowRule,
    config: FeatureConfig,
    on_progress: Progress,
) -> tuple[dict[str, pa.Table], int]:
    """The tables by name, and how many rows were read for them."""
    model = model_of(store)
    texts = TokenTexts(load_tokenizer(model))
    neighbours, cosines = decoder_neighbours(sae.W_dec, config.n_neighbours)
    counts = Accumulator(sae.config.n_latents, store.context_length, neighbours, config)
    accumulate(store, site, sae, rule, config, counts, on_progress)
    written = sae.config.target_site or site  # where decoder rows live
    lens = logit_lens(model, written, sae.W_dec, config.n_logits, len(texts))
    weights = {name: getattr(sae, name).numpy() for name in ("W_enc", "W_dec", "b_enc")}
    made = {
        "latents": tables.latents_table(counts, store.n_contexts, weights, lens, texts, config),
        "contexts": tables.contexts_table(store, counts, texts),
        "histograms": tables.histograms_table(counts),
        "neighbours": tables.neighbours_table(counts, cosines),
        "tokens": tables.tokens_table(counts, texts),
        "documents": tables.documents_table(store),
    }
    return made, counts.n_rows


def accumulate(
    store: ActivationStore,
    site: str,
    sae: SAE,
    rule: RowRule,
    config: FeatureConfig,
    counts: Accumulator,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Encode every selected row of the store, shard by shard, and count."""
    for shard in range(store.n_shards):
        first, last = store.shard_span(shard)
        selected = np.flatnonzero(store.selected_in_shard(site, rule, shard))
        x = store.read(site, first, last)
        batches = []
        for low in range(0, len(selected), config.batch_rows):
            here = selected[low : low + config.batch_rows]
            found, value = sae.encode(torch.from_numpy(x[here]).float())
            batches.append((found.numpy(), value.numpy()))
            on_progress(first + int(here[-1]), store.n_rows)
        indices, values = stacked(batches)
        length = store.context_length
        tokens = store.tokens(first // length, last // length).reshape(-1)
        documents, _ = store.row_documents(shard)
        counts.add(first, selected, indices, values, tokens, documents)
        on_progress(last, store.n_rows)


def stacked(
    batches: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Indices and values of batches [rows, w], each with its own w, as one [all rows, widest w].

    Values of 0 fill narrower ones up.
    """
    rows = sum(len(values) for _, values in batches)
    width = max((values.shape[1] for _, values in batches), default=1)
    indices, values = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    first = 0
    for found, value in batches:
        here = slice(first, first + len(found)), slice(0, found.shape[1])
        indices[here], values[here] = found, value
        first += len(found)
    return indices, values


def check_fit(store: ActivationStore, sae: SAE, sae_path: Path) -> str:
    """The site of the store that the SAE was trained on; `RunError` if it cannot be."""
    site = sae.config.site
    if site not in store.sites:
        raise RunError(
            f"The SAE in {sae_path} was trained on {site}; {store.place} holds "
            f"{', '.join(store.sites)}. Harvest that site, or use the SAE's own store."
        )
    if store.width(site) != sae.config.d_in:
        raise RunError(
            f"The SAE in {sae_path} takes {sae.config.d_in} numbers a row; {site} in "
            f"{store.place} is {store.width(site)} wide. Use the store of the same model."
        )
    weights = store.plan["model"]["weights"]
    if sae.config.model_weights not in ("", weights):
        raise RunError(
            f"The SAE in {sae_path} was trained on {sae.config.model} with other weights "
            f"({sae.config.model_weights}) than {store.place} was harvested from ({weights}). "
            "Use a store of the same model."
        )
    return site
