"""A feature build: rows encoded once, block by block, then counted latent by latent into tables.

OUT/building.json       the request, during the build
OUT/firings/*.parquet   the firings of one block each; an interrupted build continues with them
OUT/rows/*.npy          tokens and documents by row, during the build
OUT/*.parquet, run.json the tables, and last their ancestry
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_harvest.common.device import choose_device
from sae_harvest.common.differences import differences
from sae_harvest.common.errors import RunError
from sae_harvest.common.locks import LOCK_FILE, claimed
from sae_harvest.harvest.model.models import load_tokenizer
from sae_harvest.pipelines.features.building import tasks as jobs
from sae_harvest.pipelines.features.building.background import aside
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.building.pool import Pool, open_pool
from sae_harvest.pipelines.features.building.tasks import Job, Work, held
from sae_harvest.pipelines.features.counting.candidates import TokenRows
from sae_harvest.pipelines.features.counting.lens import logit_lens
from sae_harvest.pipelines.features.counting.neighbours import counted_rows, counted_share
from sae_harvest.pipelines.features.counting.profile import ChosenRows, Profile, latents_at_once
from sae_harvest.pipelines.features.encoding.sources import SourceSpec, open_source
from sae_harvest.pipelines.features.tables import rows
from sae_harvest.pipelines.features.tables import writers as tables
from sae_harvest.pipelines.features.tables.contexts import AT_ONCE, WantedContexts, wanted_rows
from sae_harvest.pipelines.features.tables.folder import (
    BUILDING_FILE,
    DELPHI,
    FORMAT,
    IDENTITY,
    RUN_FILE,
    check_tables,
    read_record,
    read_run,
)
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.pipelines.source import relative_places
from sae_harvest.store.objects import LocalObjects
from sae_harvest.train.run.files import write_json

BLOOM = {"ndv": tables.ROW_GROUP, "fpp": 0.01}
FOLLOWED = 2  # neighbours of each kind whose rows are candidates for hard negatives
# Field of the ancestry → the option of `sae-features build` that decides it.
OPTIONS = {
    "site": "--site",
    "model": "--model",
    "config.n_top": "--top",
    "config.n_random": "--random",
    "config.n_decile": "--decile",
    "config.n_inactive": "--silent",
    "config.n_hard": "--silent",
    "config.window_tokens": "--window",
    "config.seed": "--seed",
}
MOVED = ("store", "sae", "relative", "code")  # may differ between a build and its continuation

OnProgress = Callable[[str, int, int], None]  # stage, amount done, amount in all


@dataclass(frozen=True, slots=True)
class Built:
    """The result of a build."""

    run: dict[str, Any]
    """Ancestry of the tables, as in run.json."""
    seconds: float | None
    """Wall time; None if the tables existed already."""


def build(
    place: str | Path,
    sae_path: Path | str,
    out: Path,
    config: FeatureConfig,
    *,
    site: str | None = None,
    model: str | None = None,
    workers: int = 0,
    address: str | None = None,
    device: str = "auto",
    on_progress: OnProgress = lambda what, done, total: None,
) -> Built:
    """Write the tables of every latent of an SAE into `out`, if it does not hold them yet.

    After an interruption at any moment, the same call continues with the blocks encoded so far.

    Args:
        sae_path: `identity` for the neurons of a site; `delphi` if `place` is a cache of delphi.
        site: site of the neurons, if the store has several, or of a cache; an SAE records its own.
        model: model of a cache that does not name it.
        workers: Ray workers, 0 for none; all of them must be able to read `out` and the store.
        address: address of a Ray cluster; None starts a Ray of our own.

    Raises:
        RunError: the SAE does not fit the store, or `out` holds something else or can't be written.
        SaeHarvestError: the store or the SAE cannot be read.
    """
    sae, device = str(sae_path), choose_device(device)
    if sae not in (IDENTITY, DELPHI):
        sae = str(Path(sae).resolve())
    given = SourceSpec(str(place), sae, site, model, device)
    source = open_source(given)
    dictionary = source.dictionary
    asked: dict[str, Any] = {
        "tables": FORMAT,
        "store": source.place,
        "store_digest": source.digest,
        "sae": sae,
        "sae_digest": dictionary.digest,
        "relative": relative_places(out, source.place, sae),
        "site": dictionary.site,
        "model": source.model_name,
        "n_latents": dictionary.n_latents,
        "context_length": source.context_length,
        "rows": dictionary.rule.describe(),
        "config": config.model_dump(mode="json"),
        "code": version("sae-harvest"),
    }
    if existing := read_run(out):
        _require_same(out, existing, asked)
        check_tables(out)
        for name in (BUILDING_FILE, LOCK_FILE):  # killed just before
            (out / name).unlink(missing_ok=True)
        return Built(existing, None)
    given = replace(given, store=source.place)  # an absolute path
    job = Job(given, source.digest, dictionary.digest, str(out.absolute()), config)
    work = Work(job, source)
    work.texts = TokenTexts(load_tokenizer(source.model))  # raises before anything is written
    start = time.perf_counter()
    with held(work), writing(out), taken(out, asked):
        if existing := read_run(out):  # another process was faster
            _require_same(out, existing, asked)
            return Built(existing, None)
        with open_pool(workers, address, device == "cuda") as pool:
            run = asked | _make(work, pool, on_progress)
        _remove_leftovers(out)  # of workers that were killed
        write_json(out / RUN_FILE, run)
    return Built(run, time.perf_counter() - start)


@contextmanager
def taken(out: Path, asked: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for this build alone; make it if it is missing.

    Raises:
        RunError: it holds another build or other files, or another process builds in it.
    """
    building = read_record(out / BUILDING_FILE)
    if building is not None:
        _require_same(out, building, asked)
    foreign = f"{out} holds files that are not tables; choose another --out."
    busy = f"{out} is being built by another process; wait for it."
    with claimed(out, BUILDING_FILE, foreign, busy):
        if not (out / RUN_FILE).exists():
            _remove_leftovers(out)
            write_json(out / BUILDING_FILE, asked)
        yield
        for name in (BUILDING_FILE, LOCK_FILE):
            (out / name).unlink(missing_ok=True)


def _remove_leftovers(out: Path) -> None:
    for key in (objects := LocalObjects(out)).leftovers():
        objects.remove(key)


def _require_same(out: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    compared = {name: value for name, value in asked.items() if name not in MOVED}
    if differing := differences(there, compared, OPTIONS):
        raise RunError(
            f"{out} holds tables of another build (differing: {'; '.join(differing)}); "
            "choose another --out or remove it."
        )


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Report an OSError raised in this block as a failure to write `out`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Cannot write the tables into {out}: {error.strerror or error}; "
            "choose another --out or make room there."
        ) from error


def _make(work: Work, pool: Pool, on_progress: OnProgress) -> dict[str, Any]:
    """Make all tables; return the contents of run.json."""
    out = work.out
    with ThreadPoolExecutor(1, "rows") as thread:
        writing_rows = thread.submit(rows.write_rows, work.source.rows(), work.source.n_rows, out)
        _encode(work, pool, on_progress)
    n_read = writing_rows.result()
    kept, n_firings, tokens = _profile(work, pool, n_read, on_progress)
    share = counted_share(n_firings, n_read)
    with aside() as call:
        call(_write_tokens, work, tokens)
        others = _compare(work, pool, share, on_progress)
    _show(work, pool, kept, others, on_progress)
    with tables.TableWriter(out / "documents.parquet") as writer:
        writer.add(work.source.documents())
    cofire_rows = 0
    for block in range(len(work.blocks)):
        first, last = work.blocks.span(block)
        counted = counted_rows(first, last, work.source.context_length, share)
        cofire_rows += int(work.rows.read(np.arange(first, last)[counted]).sum())
    shutil.rmtree(out / rows.FOLDER)
    return {"n_rows": n_read, "n_firings": n_firings, "cofire_rows": cofire_rows}


def _encode(work: Work, pool: Pool, on_progress: OnProgress) -> None:
    """Encode the blocks that have no file yet."""
    missing = work.blocks.missing()
    done = len(work.blocks) - len(missing)
    on_progress("encoding", done, len(work.blocks))
    for _ in pool.spread(jobs.encode_block, ((work.job, block) for block in missing)):
        done += 1
        on_progress("encoding", done, len(work.blocks))


def _profile(
    work: Work, pool: Pool, n_read: int, on_progress: OnProgress
) -> tuple[list[ChosenRows], int, list[pa.Table]]:
    """Write the tables latents and histograms.

    Returns:
        The rows chosen as examples; the number of firings; parts of the table of tokens.
    """
    out, config, source, texts = work.out, work.job.config, work.source, work.texts
    dictionary, lens, weights = work.dictionary, None, work.dictionary.weights
    if (W_dec := dictionary.W_dec) is not None:
        lens = logit_lens(source.model, dictionary.writes_to, W_dec, config.n_logits, len(texts))
        weights = weights | {"W_dec": W_dec.numpy()}
    spans = _spans(dictionary.n_latents, latents_at_once(work.blocks, len(texts)), pool)
    kept, n_firings, tokens = [], 0, list[pa.Table]()
    n_contexts = source.n_rows // source.context_length
    latents = tables.TableWriter(out / "latents.parquet")
    histograms = tables.TableWriter(out / "histograms.parquet")

    def write(found: Profile) -> None:
        latents.add(tables.latents_table(found, n_read, n_contexts, weights, lens, texts))
        histograms.add(tables.histograms_table(found))
        tokens.append(tables.tokens_part(found, config))
        on_progress("counting", found.first + len(found.n_fire), dictionary.n_latents)

    with latents, histograms, aside() as call:
        for found in pool.map(jobs.profile_latents, ((work.job, *span) for span in spans)):
            call(write, found)
            kept.append(found.kept)
            n_firings += int(found.n_fire.sum())
    return kept, n_firings, tokens


def _write_tokens(work: Work, parts: list[pa.Table]) -> None:
    # the table is not sorted by text, but queries filter by it
    bloom = {"text": BLOOM}
    with tables.TableWriter(work.out / "tokens.parquet", bloom_filter_options=bloom) as writer:
        for table in tables.tokens_tables(parts, work.texts):
            writer.add(table)


def _compare(
    work: Work, pool: Pool, share: float, on_progress: OnProgress
) -> npt.NDArray[np.int64]:
    """Write neighbours; return the nearest few of each latent [n_latents, at most 2 FOLLOWED]."""
    nearest = []
    n_latents = work.dictionary.n_latents
    spans = _spans(n_latents, n_latents, pool)
    with tables.TableWriter(work.out / "neighbours.parquet") as writer:
        for near in pool.map(jobs.neighbours_of_latents, ((work.job, share, *s) for s in spans)):
            writer.add(tables.neighbours_table(near))
            nearest.append(np.hstack([near.alike[:, :FOLLOWED], near.along[:, :FOLLOWED]]))
            on_progress("comparing", near.first + len(near.alike), n_latents)
    return np.concatenate(nearest)


def _show(
    work: Work,
    pool: Pool,
    kept: list[ChosenRows],
    others: npt.NDArray[np.int64],
    on_progress: OnProgress,
) -> None:
    """contexts."""
    job, n_rows = work.job, work.source.n_rows
    drawn = np.concatenate([np.where(k.random.used, k.random.row, -1) for k in kept])
    token_rows = TokenRows(work.rows, job.config.seed)

    def pieces() -> Iterator[tuple[Job, WantedContexts, int, int]]:
        for part in kept:
            end = part.first + len(part.tokens)
            for first in range(part.first, end, AT_ONCE):
                last = min(first + AT_ONCE, end)
                wanted = wanted_rows(
                    part, others, drawn, token_rows, n_rows, job.config, first, last
                )
                yield job, wanted, first, last

    shown = pool.map(jobs.contexts_of_latents, pieces())
    path = work.out / "contexts.parquet"
    # compressing one part takes as long as making the next, so both run at once
    with tables.TableWriter(path, **tables.CONTEXTS_ENCODING) as writer, aside() as call:
        for table in shown:
            call(writer.add, table)
            if len(table):
                on_progress("showing", table["latent"][-1].as_py() + 1, work.dictionary.n_latents)


def _spans(n: int, most: int, pool: Pool) -> list[tuple[int, int]]:
    """Divide the latents into pieces of at most `most`, at least one for every worker."""
    each = max(1, min(most, -(-n // pool.workers)))
    return [(first, min(first + each, n)) for first in range(0, n, each)]
