"""Programs of the latents of feature tables: found, scored, summed up, written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from sae_harvest.common.atomic import writing
from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.locks import HeldError, lock
from sae_harvest.harvest.model.models import load_model, load_tokenizer
from sae_harvest.pipelines.evaluate.baselines import RANDOM, random_sae
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF, Figure
from sae_harvest.pipelines.evaluate.programs import n2g
from sae_harvest.pipelines.evaluate.programs.asking import ModelActivations
from sae_harvest.pipelines.evaluate.programs.finding import (
    Found,
    FoundPrograms,
    find_programs,
    sample,
)
from sae_harvest.pipelines.evaluate.programs.forms import patterns_of, texts_of
from sae_harvest.pipelines.evaluate.programs.sampled import SAMPLED, Sampled, score
from sae_harvest.pipelines.evaluate.programs.scores import Mean, Means
from sae_harvest.pipelines.evaluate.programs.scoring import KINDS, Group, programs
from sae_harvest.pipelines.evaluate.programs.source import ProgramSource, TablesSource
from sae_harvest.pipelines.evaluate.programs.table import rows_of
from sae_harvest.pipelines.features.reading.labels import write_labels
from sae_harvest.pipelines.features.tables.folder import PROGRAMS
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.pipelines.features.tables.writers import TableWriter
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations, model_of
from sae_harvest.train.sae.sae import SAE

N2G_LATENTS = 32  # latents with an N2G program if no number is given
LOCK, PARTIAL = ".programs.lock", "programs.partial"
OTHER, CONSTANT = "another latent's program", "constant"

OnProgress = Callable[[str, int, int], None]  # stage, latents done, latents in all


def write_programs(
    features: Path,
    *,
    n2g_latents: int = N2G_LATENTS,
    seed: int = 0,
    device: str = "cpu",
    moved: Locations = NOTHING_MOVED,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[Figure]:
    """Write `programs.parquet` beside the tables of an SAE; return the means over its latents.

    All latents get a token table and a trie of suffixes, learnt from the firings in the tables. A
    random sample of the latents that fire gets N2G programs, with exceptions and without, for which
    the model is asked. After an interruption, the same call goes on with the latents that are left.

    Args:
        features: folder of the tables.
        n2g_latents: size of the sample; 0 asks no model.
        seed: seed of the sample, of the examples of N2G and of the random SAE.
        device: device of model and SAE.
        moved: new places of store, SAE and model, if they have moved.
        on_progress: called with a stage, latents (or blocks) done, and their number.

    Returns:
        the means over latents with at least ten held-out firings, beside those of other latents'
        programs, of a constant program, and of the latents of a random SAE; the part is the kind.

    Raises:
        RunError: there are no tables, their store or SAE is missing, another process writes
            programs, or the file cannot be written.
        InputError: the tables are of a cache of delphi, or of neurons and N2G is wanted.
        SaeHarvestError: store, SAE or model cannot be read.
    """
    source = TablesSource.open(features, moved)
    if source.sae is None and n2g_latents:
        raise InputError(
            f"{features} holds tables of neurons, and N2G needs an SAE; give --n2g-latents 0."
        )
    with _alone(features):
        search = _Search(features, source, n2g_latents, seed, device, moved, on_progress)
        figures = _of_the_latents(search)
        if source.sae is not None:
            figures += _of_random_latents(search, source.sae)
        search.finish()
        write_labels(features)
    return figures


def _of_the_latents(search: _Search) -> list[Figure]:
    """Write the table; return the figures of the SAE and of programs that know nothing."""
    source, own = search.source, search.source.own
    text = TokenTexts(load_tokenizer(search.model)).one
    means = {kind: Means() for kind in (*KINDS, *SAMPLED)}
    asked = pa.concat_tables(
        rows_of(some.latents, kind, some.texts(text), some.thresholds, some.patterns, some.scores)
        for kind, some in search.sampled(SAE_ITSELF, own, source.sae, means).items()
    )
    asked_latents = asked["latent"].to_numpy()

    def part(group: Group) -> pa.Table:
        patterns = patterns_of(own.suffixes, group.tries)
        latents = group.tries.first + np.arange(len(group.tries))
        texts = texts_of(group.tries, patterns, text)
        return rows_of(latents, group.kind, texts, group.tries.threshold, patterns, group.scores)

    with TableWriter(search.features / f"{PROGRAMS}.parquet") as writer:
        for groups in programs(own.suffixes, own.blocks, means, progress=search.stage("learning")):
            first, n = groups[0].tries.first, len(groups[0].tries)
            here = (asked_latents >= first) & (asked_latents < first + n)
            table = pa.concat_tables([*map(part, groups), asked.filter(pa.array(here))])
            writer.add(table.sort_by([("latent", "ascending"), ("kind", "ascending")]))
    return [
        figure
        for kind, of_kind in means.items()
        for subject, mean in (
            (SAE_ITSELF, of_kind.program),
            (OTHER, of_kind.other),
            (CONSTANT, of_kind.constant),
        )
        for figure in mean_figures(mean, subject, kind)
    ]


def _of_random_latents(search: _Search, sae: SAE) -> list[Figure]:
    """Return the figures of the latents of a random SAE of the same k."""
    source, means = search.source, {kind: Means() for kind in (*KINDS, *SAMPLED)}
    generator = torch.Generator().manual_seed(search.seed)
    random = random_sae(sae, max(1, round(source.l0)), generator)
    with TemporaryDirectory(prefix="sae-programs-") as folder:
        progress = search.stage("encoding by a random SAE, blocks")
        encoded = source.encoded(random, Path(folder), search.device, progress)
        search.sampled(RANDOM, encoded, random, means)
        progress = search.stage("learning, random SAE")
        for _ in programs(encoded.suffixes, encoded.blocks, means, progress=progress):
            pass
    return [
        figure
        for kind, of_kind in means.items()
        for figure in mean_figures(of_kind.program, RANDOM, kind)
    ]


def mean_figures(mean: Mean, subject: str, kind: str) -> Iterator[Figure]:
    """Yield the figures of a mean over latents, for programs of one kind."""
    for name, value, low, high in mean.figures():
        yield Figure(f"program_{name}", subject, kind, value, low, high, mean.latents, "latents")


class _Search:
    """The search for N2G programs of a sample of latents, of the SAE and of a random one."""

    def __init__(
        self,
        features: Path,
        source: TablesSource,
        n_latents: int,
        seed: int,
        device: str,
        moved: Locations,
        on_progress: OnProgress,
    ) -> None:
        self.features, self.source, self.seed = features, source, seed
        self.device = choose_device(device)
        self.model = model_of(source.store, moved.models)
        self._n_latents, self._on_progress = n_latents, on_progress

    def stage(self, what: str) -> Callable[[int, int], None]:
        """Return a function that reports the progress of a stage."""
        return lambda done, total: self._on_progress(what, done, total)

    def sampled(
        self, name: str, source: ProgramSource, sae: SAE | None, means: dict[str, Means]
    ) -> dict[str, Sampled]:
        """Find and score the N2G programs of a sample of the latents of an SAE, by kind."""
        latents = sample(np.flatnonzero(source.fires), self._n_latents, self.seed).tolist()
        found: dict[int, Found] = {}
        if latents and sae is not None:
            settings = {
                "sae": sae.digest,
                "store": self.source.store.digest,
                "seed": self.seed,
                "examples": [n2g.TOP, n2g.RANDOM, n2g.COUNTEREXAMPLES],
                "longest": [n2g.LONGEST, n2g.LONGEST_EXCEPTION],
                "kept": n2g.KEPT,
            }
            found = find_programs(
                source.rows,
                latents,
                source.firings,
                lambda: self._ask(sae),
                FoundPrograms(self._folder / name, settings),
                self.seed,
                self.stage(f"asking the model, {name}"),
            )
        return {
            kind: score(
                source.rows,
                [(latent, one[number]) for latent, one in found.items()],
                source.firings,
                means[kind],
            )
            for number, kind in enumerate(SAMPLED)
        }

    def finish(self) -> None:
        """Remove what only an interrupted search needs."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self.features / PARTIAL

    def _ask(self, sae: SAE) -> tuple[n2g.Ask, int]:
        live = LiveModel(self.source.store, sae.to(self.device), *self._loaded)
        ask = ModelActivations(live)
        return ask, ask.padding

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, Any]:
        dtype: torch.dtype = getattr(torch, self.source.store.plan["compute_dtype"])
        return load_model(self.model, dtype, self.device), load_tokenizer(self.model)


@contextmanager
def _alone(features: Path) -> Iterator[None]:
    """Let one process at a time write programs of the tables in a folder."""
    path = features / LOCK
    with writing(path):
        try:
            with lock(path):
                yield
                path.unlink(missing_ok=True)
        except HeldError:
            raise RunError(
                f"Another process is writing programs into {features}; wait until it has ended."
            ) from None
