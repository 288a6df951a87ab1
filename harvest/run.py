"""From a request to a sealed store: plan, hand out shards, commit, seal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from harvest.ahead import Ahead
from harvest.config import HarvestConfig
from harvest.contexts import WINDOW_CONTEXTS, ShardInput, default_bos, iter_shards
from harvest.corpus import Corpus, FileCorpus, open_corpus
from harvest.encoding import end_of_text_id
from harvest.models import (
    ResolvedModel,
    load_config,
    load_tokenizer,
    model_fingerprint,
    pick_dtype,
    resolve_model,
    tokenizer_fingerprint,
)
from harvest.pool import Pool, open_pool
from harvest.sites import Site
from store import layout
from store.errors import InputError, StoreError
from store.layout import Plan, SitePlan
from store.writer import (
    check_folder,
    commit_shard,
    committed_shards,
    create_store,
    discard,
    read_plan_record,
    seal,
)

LIBRARIES = ("sae-harvest", "torch", "transformers", "tokenizers", "zarr", "pyarrow", "numpy")
SMALL_BYTES_PER_ROW = 16  # tokens, norms, tables and commit records, generously

Progress = Callable[[int, int], None]  # rows done in this run, rows still to do at its start


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with everything automatic decided, before any model is loaded."""

    config: HarvestConfig
    model: ResolvedModel
    tokenizer: Any
    corpus: Corpus
    fields: dict[str, Any]  # of the plan, except the widths of the sites

    def plan(self, widths: dict[str, int]) -> Plan:
        sites = tuple(SitePlan(name=s, width=widths[s]) for s in self.config.sites)
        return Plan(sites=sites, **self.fields)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did: digest of the sealed store, rows and seconds of this run's share."""

    plan: Plan
    digest: str
    rows_run: int
    seconds: float


def prepare(config: HarvestConfig, root: Path | None, device: str) -> Prepared:
    """Resolve model, tokenizer and corpus, and decide what is automatic.

    A store that exists already decides the compute dtype, so that a harvest can be continued
    on another processor.

    Raises:
        InputError: unknown model or corpus, layer out of range, contexts too long for the model.
    """
    model = resolve_model(config.model)
    model_config = load_config(model)
    sites = [Site.parse(name) for name in config.sites]
    for site in sites:
        site.check(model_config)
    if len(set(sites)) < len(sites):
        raise InputError(f"A site is named twice in {', '.join(config.sites)}.")
    longest = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and config.context_length > longest:
        raise InputError(
            f"{config.model} sees at most {longest} tokens at a time, got contexts of "
            f"{config.context_length}; use --context-length {longest} or less."
        )
    tokenizer = load_tokenizer(model)
    corpus = open_corpus(config.corpus)
    compute_dtype = config.compute_dtype
    if compute_dtype == "auto":
        existing = root is not None and (root / layout.PLAN_KEY).exists()
        if root is not None and existing:
            compute_dtype = read_plan_record(root)["plan"]["compute_dtype"]
        else:
            compute_dtype = pick_dtype(device)
    bos = default_bos(tokenizer) if config.bos == "auto" else config.bos
    length = config.context_length
    fields = {
        "model": model_fingerprint(model) | {"name": model_name(model)},
        "tokenizer": {
            "xxh3": tokenizer_fingerprint(tokenizer),
            "vocabulary": len(tokenizer),
            "end_of_text": end_of_text_id(tokenizer),
            "beginning_of_text": tokenizer.bos_token_id,
        },
        "corpus": config.corpus.model_dump(mode="json")
        | {"name": corpus_name(corpus), "fingerprint": corpus.fingerprint()},
        "context_length": length,
        "n_contexts": -(-config.tokens // length),
        "contexts_per_shard": max(1, config.shard_rows // length),
        "bos": bos,
        "seed": config.seed,
        "window_contexts": WINDOW_CONTEXTS,
        "dtype": config.dtype,
        "compute_dtype": compute_dtype,
        "batch_contexts": max(1, config.batch_tokens // length),
    }
    return Prepared(config, model, tokenizer, corpus, fields)


def run(
    config: HarvestConfig,
    root: Path,
    workers: int = 1,
    device: str = "auto",
    on_progress: Progress = lambda done, todo: None,
) -> Result:
    """Harvest into `root`, or continue what was begun there.

    Args:
        workers: Ray actors; 0 works in this process.
        device: auto, cpu or cuda.
        on_progress: called about twice a second.

    Raises:
        SaeHarvestError: any of its kinds; nothing half-written is ever taken for whole.
    """
    root = root.resolve()
    check_folder(root)
    device = pick_device(device)
    prepared = prepare(config, root, device)
    continued = (root / layout.PLAN_KEY).exists()
    if continued:
        there = Plan.model_validate(read_plan_record(root)["plan"])
        widths = {s.name: s.width for s in there.sites}
        # Another set of sites is another plan; which width it would have does not matter.
        wanted = prepared.plan({s: widths.get(s, 1) for s in config.sites})
        plan = create_store(root, wanted, versions())
        if len(committed_shards(root, plan)) == plan.n_shards:
            return Result(plan, seal(root, plan), 0, 0.0)
    try:
        with (
            closing(Ahead(shard_inputs(prepared))) as ahead,  # tokenizes while the workers start
            open_pool(
                workers, prepared.model, config.sites, prepared.fields["compute_dtype"], device
            ) as pool,
        ):
            plan = prepared.plan(pool.widths())
            check_disk(root, plan)
            waiting = iter(ahead)
            shards = chain([next(waiting)], waiting)  # a corpus too short shows before we create
            plan = create_store(root, plan, versions())
            start = time.perf_counter()
            rows = _harvest(root, plan, shards, pool, on_progress)
            seconds = time.perf_counter() - start
    except InputError:
        # What was asked cannot be done, and the remedy will be another plan: leave it the folder.
        if not continued and (root / layout.PLAN_KEY).exists() and not committed_shards(root, plan):
            discard(root)
        raise
    return Result(plan, seal(root, plan), rows, seconds)


def _harvest(
    root: Path,
    plan: Plan,
    shards: Iterable[ShardInput],
    pool: Pool,
    on_progress: Progress,
) -> int:
    """Work on every shard that has no commit; returns the rows done."""
    done = set(committed_shards(root, plan))
    todo = sum(_rows(plan, u) for u in range(plan.n_shards) if u not in done)
    waiting = (s for s in shards if s.shard not in done)
    in_flight, exhausted = 0, False
    while True:
        while not exhausted and in_flight < pool.capacity:
            shard = next(waiting, None)
            if shard is None:
                exhausted = True
                break
            pool.submit(root, plan, shard)
            in_flight += 1
        if not in_flight:
            return todo
        for record in pool.collect():
            commit_shard(root, record)
            in_flight -= 1
        on_progress(min(pool.rows_done(), todo), todo)


def shard_inputs(prepared: Prepared) -> Iterator[ShardInput]:
    """Every shard of the plan as token ids and tables, in order."""
    names = (
        "context_length",
        "bos",
        "seed",
        "window_contexts",
        "contexts_per_shard",
        "n_contexts",
    )
    arguments = {name: prepared.fields[name] for name in names}
    return iter_shards(prepared.corpus, prepared.tokenizer, **arguments)


def check_disk(root: Path, plan: Plan) -> None:
    """`StoreError` if the disk cannot hold what is still to be written."""
    done = len(committed_shards(root, plan)) if root.exists() else 0
    need = bytes_per_row(plan) * max(0, plan.n_rows - done * plan.shard_rows)
    folder = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StoreError(
            f"{root} needs {need / 1e9:,.2f} GB and the disk has {free / 1e9:,.2f} GB free; "
            "free some space, ask for fewer --tokens or use another --store."
        )


def bytes_per_row(plan: Plan) -> int:
    """Bytes of one row over all sites, side tables included (an upper estimate)."""
    return sum(s.width * plan.itemsize for s in plan.sites) + SMALL_BYTES_PER_ROW


def pick_device(device: str) -> str:
    """`auto` becomes cuda where there is one; `InputError` for a cuda that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable GPU; use --device cpu.")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the bytes, for provenance."""
    return {name: version(name) for name in LIBRARIES}


def model_name(model: ResolvedModel) -> str:
    """How the plan names the model: a path in full, so that it is found from any folder."""
    if model.kind == "directory":
        return model.path
    if model.name.endswith(".gguf"):
        return str(Path(model.name).expanduser().resolve())
    return model.name


def corpus_name(corpus: Corpus) -> str:
    """How the plan names the corpus: a path in full."""
    if isinstance(corpus, FileCorpus):
        return str(Path(corpus.name).expanduser().resolve())
    return corpus.name


def _rows(plan: Plan, shard: int) -> int:
    first, last = plan.shard_contexts(shard)
    return (last - first) * plan.context_length
