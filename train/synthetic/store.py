"""A synthetic store and its ground truth, written shard by shard; the same command continues.

OUT/store           the store, with the one site `synthetic`; each context is a document
OUT/ground_truth    see `truth`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from sae_harvest.common.errors import InputError, NotAStoreError, PlanMismatchError
from sae_harvest.store.commits import commit_shard, committed_shards
from sae_harvest.store.layout import Plan, SitePlan
from sae_harvest.store.objects import LocalObjects, require_space
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.records import digest_of
from sae_harvest.store.seals import seal
from sae_harvest.store.tables import DOCUMENT_SCHEMA, PIECE_SCHEMA
from sae_harvest.store.writer import Shard, create_store, write_shard
from sae_harvest.train.synthetic.config import CONTEXT_LENGTH, SyntheticConfig
from sae_harvest.train.synthetic.sampling import Sampler
from sae_harvest.train.synthetic.truth import Features, Firings

STORE, GROUND_TRUTH = "store", "ground_truth"
SITE = "synthetic"
CONTEXTS_PER_SHARD = 64
DTYPE = "float16"
FIRING_BYTES = 8  # of a file of firings, about


@dataclass(frozen=True, eq=False)
class Synthetic:
    """A finished synthetic store, open, with what is true of it."""

    store: ActivationStore
    """The store."""

    features: Features
    """The true features."""

    folder: Path
    """Folder of the ground truth."""

    @classmethod
    def open(cls, out: Path) -> Synthetic:
        """Open what `make` wrote.

        Raises:
            InputError: the folder holds no ground truth, or that of another store.
            RunError: a file of the ground truth is missing or damaged.
            StoreError: there is no finished store in it.
        """
        store = ActivationStore.open(out / STORE)
        folder = out / GROUND_TRUTH
        features = Features.load(folder)
        shape = len(features), store.width(store.sites[0])
        if store.plan["corpus"]["name"] != SITE or features.directions.shape != shape:
            raise InputError(
                f"{folder} is not the ground truth of {store.place}; give the --out folder of "
                "`train-sae synthetic`."
            )
        return cls(store, features, folder)

    def firings(self, shard: int) -> Firings:
        """Read the true firings of a shard. Raise `RunError` if the file is damaged."""
        return Firings.load(self.folder, shard)


def make(
    config: SyntheticConfig,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Synthetic:
    """Write a store of known features, or the rest of it after an interruption.

    Args:
        config: the features and the rows.
        out: folder to write.
        progress: called with rows done and rows to do.

    Returns:
        The store with its ground truth.

    Raises:
        PlanMismatchError: the folder holds a synthetic store of other settings.
        NotAStoreError: the store's folder holds something else.
        StoreError: the disk is too small or a file cannot be written.
        RunError: a file of the ground truth cannot be written.
    """
    plan, objects = plan_of(config), LocalObjects(out / STORE)
    rows = config.n_contexts * CONTEXT_LENGTH
    n_shards = -(-config.n_contexts // CONTEXTS_PER_SHARD)
    try:
        made_with = {name: version(name) for name in ("sae-harvest", "numpy")}
        create_store(objects, plan, made_with)
    except (NotAStoreError, PlanMismatchError) as error:
        raise type(error)(str(error).replace("--store", "--out")) from None
    done = set(committed_shards(objects))
    left = 1 - len(done) / n_shards
    need = left * rows * (2 * config.width + FIRING_BYTES * config.l0)
    require_space(objects, need, "or ask for fewer --rows")
    features = Features.of(config)
    features.save(out / GROUND_TRUTH)
    sampler = Sampler(config, features)
    for number in range(n_shards):
        first = number * CONTEXTS_PER_SHARD
        last = min(first + CONTEXTS_PER_SHARD, config.n_contexts)
        if number not in done:
            x, firings = sampler.contexts(first, last)
            firings.save(out / GROUND_TRUTH, number)
            commit_shard(objects, write_shard(objects, plan, _shard(config, number, x, firings)))
        progress(last * CONTEXT_LENGTH, rows)
    seal(objects, plan, n_shards)
    return Synthetic.open(out)


def plan_of(config: SyntheticConfig) -> Plan:
    """Return the plan of a synthetic store; the settings are its corpus."""
    settings = config.model_dump(mode="json")
    return Plan(
        model={"name": SITE, "weights": "none"},
        tokenizer={},
        corpus={"name": SITE, "fingerprint": digest_of(settings)} | settings,
        sites=(SitePlan(name=SITE, width=config.width),),
        context_length=CONTEXT_LENGTH,
        contexts_per_shard=CONTEXTS_PER_SHARD,
        packing="concat",
        bos="none",
        seed=config.seed,
        window_contexts=1,
        document_text=False,
        dtype=DTYPE,
        compute_dtype="float32",
        batch_contexts=1,
    )


def _shard(
    config: SyntheticConfig, number: int, x: npt.NDArray[np.float32], firings: Firings
) -> Shard:
    """Return a shard. The token of a row is the feature with the largest magnitude, plus 1."""
    first = number * CONTEXTS_PER_SHARD
    count = len(x) // CONTEXT_LENGTH
    contexts = np.arange(first, first + count)
    names = [f"synthetic {config.seed} {context}" for context in contexts.tolist()]
    hashes = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in names], np.uint64)
    pieces = {
        "context": contexts,
        "start": np.zeros(count),
        "stop": np.full(count, CONTEXT_LENGTH),
        "document": contexts,
        "document_hash": hashes,
        "first_token": np.zeros(count),
        "char_start": np.zeros(count),
        "char_end": [len(name) for name in names],
    }
    documents = {
        "document": contexts,
        "id": names,
        "source": [SITE] * count,
        "title": [None] * count,
        "url": [None] * count,
        "text_hash": hashes,
        "n_chars": [len(name) for name in names],
        "n_tokens": np.full(count, CONTEXT_LENGTH),
    }
    return Shard(
        number,
        _strongest(firings, first * CONTEXT_LENGTH, len(x)).reshape(-1, CONTEXT_LENGTH),
        pa.table(pieces, PIECE_SCHEMA),
        pa.table(documents, DOCUMENT_SCHEMA),
        {SITE: x.astype(DTYPE)},
        {SITE: np.linalg.norm(x, axis=1)},
        {"context": first},
    )


def _strongest(firings: Firings, first_row: int, rows: int) -> npt.NDArray[np.int32]:
    """Return 1 + the feature with the largest magnitude of each row, int32 [rows]; 0: none."""
    order = np.argsort(firings.magnitude, kind="stable")  # the largest is written last
    found = np.zeros(rows, np.int32)
    found[firings.row[order] - first_row] = firings.feature[order] + 1
    return found
