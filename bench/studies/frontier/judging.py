"""All figures of some dictionaries of one site: rows, model, programs, probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from sae_harvest.harvest.model.models import load_model, load_tokenizer
from sae_harvest.harvest.tokens.encoding import end_of_text_id
from sae_harvest.pipelines.evaluate.downstream import (
    controls,
    downstream_figures,
    heldout_contexts,
    spliced_losses,
)
from sae_harvest.pipelines.evaluate.figures import Figure
from sae_harvest.pipelines.evaluate.probing.examples import store_rows
from sae_harvest.pipelines.evaluate.probing.losses import score_constant
from sae_harvest.pipelines.evaluate.probing.measure import (
    CONSTANT,
    Measured,
    Settings,
    add_single_latents,
    labellings_of,
)
from sae_harvest.pipelines.evaluate.probing.probe import ProbeConfig, encoded, find_examples
from sae_harvest.pipelines.evaluate.probing.summary import figures_of
from sae_harvest.pipelines.evaluate.probing.table import ALL, TEST, TRAIN
from sae_harvest.pipelines.evaluate.programs.asking import ModelActivations
from sae_harvest.pipelines.evaluate.programs.finding import FoundPrograms, find_programs, sample
from sae_harvest.pipelines.evaluate.programs.run import mean_figures
from sae_harvest.pipelines.evaluate.programs.sampled import N2G, score
from sae_harvest.pipelines.evaluate.programs.scores import Means
from sae_harvest.pipelines.evaluate.programs.scoring import NGRAMS, programs
from sae_harvest.pipelines.evaluate.programs.source import TablesSource
from sae_harvest.pipelines.evaluate.reconstruction import HeldoutRows, reconstruction
from sae_harvest.pipelines.evaluate.splicing import Splice
from sae_harvest.pipelines.features.encoding.sources import SourceSpec, StoreSource
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.source import NOTHING_MOVED
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE

PART = "without outliers"
PROBES = ProbeConfig(n_best=1)
Progress = Callable[[str, int, int], None]  # stage, amount done, amount in all


class Judge:
    """Measures dictionaries of one store, one site and one rule."""

    def __init__(
        self,
        features: Path,
        texts: ActivationStore,
        first: Path,
        contexts: int,
        n2g_latents: int,
    ) -> None:
        """Read what is the same for all dictionaries.

        Args:
            features: tables of one dictionary over the store.
            texts: the store of labelled texts.
            first: folder of a dictionary of the same site and rule.
            contexts: held-out contexts on which the model runs.
            n2g_latents: latents of each dictionary that get an N2G program.
        """
        self._source = TablesSource.open(features, NOTHING_MOVED)
        self.store = self._source.store
        sae = SAE.load(first)
        self._held_out = HeldoutRows.of(self.store, sae.config, sae.config.rule, 1 << 20)
        self._contexts = heldout_contexts(self.store, [sae], contexts)
        self._texts = StoreSource(SourceSpec(texts.place, str(first), None, None, "cpu"), None)
        dtype: torch.dtype = getattr(torch, self.store.plan["compute_dtype"])
        self._model = load_model(self._texts.model, dtype, "cpu")
        self._tokenizer = load_tokenizer(self._texts.model)
        rows = store_rows(self._texts, end_of_text_id(self._tokenizer), PROBES.most_rows)
        self._n_rows = len(rows)
        texts_of = TokenTexts(self._tokenizer)
        self._examples = find_examples(self._texts, rows, texts_of, [], PROBES)[0]
        self._n2g_latents = n2g_latents
        self._progress: Progress = lambda stage, done, total: None

    def figures(self, saes: Mapping[str, SAE], progress: Progress) -> list[Figure]:
        """Measure dictionaries; the subject of a figure is a dictionary's name.

        The model's loss is measured for all of them at once.

        Args:
            saes: dictionaries by name.
            progress: called with a stage, the amount done, the amount in all.
        """
        self._progress = progress
        found = [*self._of_rows(saes), *self._of_model(saes)]
        for name, sae in saes.items():
            found += [*self._of_programs(name, sae), *self._of_probes(name, sae)]
        return found

    def _of_rows(self, saes: Mapping[str, SAE]) -> Iterator[Figure]:
        progress = self._stage("reconstruction")
        measured = reconstruction(saes, self.store, self._held_out, progress)
        for name in saes:
            yield from measured[name, PART].figures(name, PART)

    def _of_model(self, saes: Mapping[str, SAE]) -> Iterator[Figure]:
        splices = {name: Splice([sae]) for name, sae in saes.items()}
        known = controls(self.store, list(saes.values())[:1])
        given = self._model, self.store, splices | known, self._contexts
        for figure in downstream_figures(spliced_losses(*given, self._stage("loss"))):
            if figure.subject in saes:
                yield figure

    def _of_programs(self, name: str, sae: SAE) -> Iterator[Figure]:
        with TemporaryDirectory(prefix="frontier-") as folder:
            own = self._source.encoded(sae, Path(folder), "cpu", self._stage(f"encoding, {name}"))
            dead = float((~own.fires).mean())
            yield Figure(
                "dead_share", name, "all rows", dead, None, None, self.store.n_rows, "rows"
            )
            means = {NGRAMS: Means(), N2G: Means()}
            progress = self._stage(f"n-grams, {name}")
            for _ in programs(own.suffixes, own.blocks, means, [NGRAMS], progress):
                pass
            latents = sample(np.flatnonzero(own.fires), self._n2g_latents, 0).tolist()
            found = find_programs(
                own.rows, latents, own.firings, lambda: self._ask(sae),
                FoundPrograms(Path(folder) / "n2g", {}), 0, self._stage(f"N2G, {name}"),
            )  # fmt: skip
            plain = [(latent, one[0]) for latent, one in found.items()]
            score(own.rows, plain, own.firings, means[N2G])
        for kind, of_kind in means.items():
            yield from mean_figures(of_kind.program, name, kind)

    def _ask(self, sae: SAE) -> tuple[ModelActivations, int]:
        ask = ModelActivations(LiveModel(self.store, sae, self._model, self._tokenizer))
        return ask, ask.padding

    def _of_probes(self, name: str, sae: SAE) -> Iterator[Figure]:
        settings, none = Settings(PROBES.pooling, 1, 0), np.empty(0, np.int64)
        measured = []
        with TemporaryDirectory(prefix="frontier-") as folder:
            firings = encoded(self._texts, sae, self._n_rows, Path(folder), self._progress)
            for examples in self._examples:
                one, given = Measured(examples, {}, [], []), labellings_of(examples, examples)
                for scored, fitted in ((ALL, ALL), (TEST, TRAIN)):
                    constant = score_constant(examples, given[fitted], given[scored])
                    one.losses[CONSTANT, scored] = constant
                add_single_latents(
                    one, name, firings, examples, given, none, settings, self._progress
                )
                measured.append(one)
        for figure in figures_of(measured):
            if figure.subject == name:
                yield figure

    def _stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(name, done, total)
