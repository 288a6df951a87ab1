"""A cache of latents in delphi's format, from firings and the store's tokens.

    OUT/latents/HOOKPOINT/0_1023.safetensors    some latents, the last one included
        locations     uint16 or uint32 [firings, 3]: context, position, latent - the first one
        tokens        int32 [contexts, context length]
        activations   float16, or float32 where that would overflow [firings]
    OUT/latents/HOOKPOINT/config.json           delphi's CacheConfig, with the model's name

A file's firings are sorted by row, then latent, as in delphi's own files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.safetensors_stream import LENGTH_BYTES, dtype_name, make_header
from sae_harvest.harvest.model.models import ResolvedModel, resolve_model
from sae_harvest.pipelines.exports.hookpoints import hookpoint
from sae_harvest.pipelines.exports.tables import Tables
from sae_harvest.pipelines.source import Locations, store_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.run.files import write_json

FOLDER = "latents"
SPLIT_FIRINGS = 1 << 24  # firings of a file; delphi needs 28 bytes of memory for each
LEAST = 1e-5  # delphi keeps only activations above this
MAX_FLOAT16 = 65504.0
SHORT = 1 << 16
HEADER_BYTES = 512
CONTEXTS = 4096  # contexts whose tokens are in memory at a time


def write(
    all_tables: Sequence[Tables],
    latents: Sequence[Sequence[range]],
    out: Path,
    name: str | None,
    on_block: Callable[[], None],
    moved: Locations,
) -> None:
    """Write a hookpoint for each of the tables.

    Args:
        name: name of the hookpoint; None finds it in the model.
        moved: new places of the store and its model.

    Raises:
        InputError: none of the latents fires, or the site has no hookpoint.
        RunError: the store is missing, or it is another store.
    """
    for tables, some in zip(all_tables, latents, strict=True):
        store = store_of(tables.features, tables.run, moved.stores)
        planned = store.plan["model"]
        if moved.models:
            model = resolve_model(moved.models[0])
        else:
            model = resolve_model(planned["name"], planned["revision"])
        folder = out / FOLDER / (name or hookpoint(model, tables.site))
        if folder.exists():
            raise InputError(
                f"Two of the tables are for {folder.name}, but delphi has one per hookpoint; "
                "export one of them."
            )
        folder.mkdir(parents=True)
        _write_hookpoint(tables, store, model, some, folder, on_block)


def _write_hookpoint(
    tables: Tables,
    store: ActivationStore,
    model: ResolvedModel,
    latents: Sequence[range],
    folder: Path,
    on_block: Callable[[], None],
) -> None:
    chosen = np.zeros(tables.n_latents, np.bool_)
    for some in latents:
        chosen[some.start : some.stop] = True
    facts = tables.read("latents", columns=["n_fire", "max"])
    n_fire = np.where(chosen, facts["n_fire"].to_numpy(), 0)
    if not n_fire.any():
        raise InputError("None of these latents fires, so that delphi's cache would be empty.")
    highest = np.nan_to_num(facts["max"].to_numpy().astype(np.float64))[chosen].max()
    kind = np.dtype(np.float16 if highest <= MAX_FLOAT16 else np.float32)
    spans = splits(n_fire, latents[0].start, latents[-1].stop)
    length = store.context_length
    with ExitStack() as stack:
        files = [
            stack.enter_context(_Split(folder, first, last, length, store.n_contexts, kind))
            for first, last in spans
        ]
        for table in tables.firings():
            latent, row, value = (table[c].to_numpy() for c in ("latent", "row", "value"))
            if len(row) and not 0 <= row.min() <= row.max() < store.n_rows:
                raise RunError(
                    f"{tables.features} has firings on rows that are not in {store.place}; "
                    "build the tables again."
                )
            kept = chosen[latent] & (value > LEAST)
            latent, row, value = latent[kept], row[kept], value[kept]
            edges = np.searchsorted(latent, [first for first, _ in spans] + [spans[-1][1] + 1])
            for split, low, high in zip(files, edges[:-1], edges[1:], strict=True):
                order = low + np.argsort(row[low:high], kind="stable")
                split.add(latent[order], row[order], value[order])
            on_block()
        for split in files:
            split.finish(store)
    write_json(
        folder / "config.json",
        {
            "dataset_repo": store.place,
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": "",
            "cache_ctx_len": length,
            "n_tokens": store.n_rows,
            "n_splits": len(spans),
            "model_name": model.path,
        },
    )


def splits(n_fire: npt.NDArray[np.int64], first: int, end: int) -> list[tuple[int, int]]:
    """Split the latents [first, end) into ranges with few enough firings; ends are included."""
    spans, start, firings = [], first, 0
    for latent in range(first, end):
        if firings and firings + n_fire[latent] > SPLIT_FIRINGS:
            spans.append((start, latent - 1))
            start, firings = latent, 0
        firings += int(n_fire[latent])
    return [*spans, (start, end - 1)]


class _Split:
    """Writes a file: locations directly, activations into a second file until all are there."""

    def __init__(
        self, folder: Path, first: int, last: int, length: int, contexts: int, kind: np.dtype[Any]
    ) -> None:
        self._first, self._length, self._kind = first, length, kind
        self._n = 0
        numbers = max(contexts, length, last - first + 1)
        self._integer = np.dtype(np.uint16 if numbers <= SHORT else np.uint32)
        self._path = folder / f"{first}_{last}.safetensors"
        self._aside = folder / f"{first}_{last}.activations"

    def __enter__(self) -> _Split:
        self._file = self._path.open("wb")
        self._file.write(b" " * (LENGTH_BYTES + HEADER_BYTES))
        self._values = self._aside.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._values.close()
        self._aside.unlink()

    def add(
        self,
        latent: npt.NDArray[np.int32],
        row: npt.NDArray[np.int64],
        value: npt.NDArray[np.float32],
    ) -> None:
        context, position = np.divmod(row, self._length)
        locations = np.stack([context, position, latent - self._first], axis=1)
        self._file.write(locations.astype(self._integer).tobytes())
        self._values.write(value.astype(self._kind).tobytes())
        self._n += len(row)

    def finish(self, store: ActivationStore) -> None:
        """Write tokens, activations, and the header with their numbers."""
        for first in range(0, store.n_contexts, CONTEXTS):
            last = min(first + CONTEXTS, store.n_contexts)
            self._file.write(store.tokens(first, last).astype(np.int32).tobytes())
        self._values.seek(0)
        shutil.copyfileobj(self._values, self._file)
        tensors = {
            "locations": (dtype_name(self._integer), (self._n, 3)),
            "tokens": ("I32", (store.n_contexts, store.context_length)),
            "activations": (dtype_name(self._kind), (self._n,)),
        }
        self._file.seek(0)
        self._file.write(make_header(tensors, json_bytes=HEADER_BYTES).data)
