"""Programs of all latents, learnt and scored, against reading their firings once.

Both use the stored firings of an SAE of random directions over 2^18 rows of real text, with the
threads that numba has. Programs are the token tables and the tries of n-grams, without N2G; their
scores have intervals and the programs of other latents beside them. The limit decodes all firings.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from statistics import median

from bench.feature_pass import SITE, SMALL, WIDTH, random_sae
from bench.inputs import gpt2_model, write_long_news
from bench.measurement import Measurement, seconds
from sae_harvest.common.console import output
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.evaluate.programs.firings import split_firings
from sae_harvest.pipelines.evaluate.programs.learning import learn
from sae_harvest.pipelines.evaluate.programs.scores import Means
from sae_harvest.pipelines.evaluate.programs.scoring import KINDS, programs
from sae_harvest.pipelines.evaluate.programs.source import ProgramSource, TablesSource
from sae_harvest.pipelines.evaluate.programs.suffixes import Suffixes
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.source import NOTHING_MOVED
from sae_harvest.store.reader import ActivationStore

REPEATS = 3


def measure(folder: Path) -> list[Measurement]:
    """programs, on a store made in `folder`."""
    model = gpt2_model(folder / "one-block", n_layer=1, n_embd=WIDTH, n_head=12)
    corpus, store = folder / "corpus.jsonl", folder / "store-of-programs"
    write_long_news(corpus, SMALL)
    spec = CorpusSpec(name=str(corpus))
    config = HarvestConfig(model=str(model), corpus=spec, sites=(SITE,), tokens=SMALL)
    run(config, store, Execution(workers=0))
    sae, features = folder / "sae-of-programs", folder / "features-of-programs"
    random_sae(ActivationStore.open(store)).save(sae)
    build(store, sae, features, FeatureConfig())
    found = times(features)
    shutil.rmtree(features)
    shutil.rmtree(store)
    corpus.unlink()
    return [found]


def times(features: Path) -> Measurement:
    """Measure over the tables in a folder; all code is compiled before."""
    own = TablesSource.open(features, NOTHING_MOVED).own
    first = split_firings(own.rows, own.blocks, 0, 1)[0]
    for back in KINDS.values():
        learn(own.suffixes, 0, first, back)

    def read() -> None:
        for _ in own.blocks.all():
            pass

    reading = median(seconds(read) for _ in range(REPEATS))
    parts = {
        "patterns": seconds(lambda: Suffixes.of(own.rows)),
        "firings": seconds(lambda: split_firings(own.rows, own.blocks, 0, own.blocks.n_latents)),
    }
    train = split_firings(own.rows, own.blocks, 0, own.blocks.n_latents)[0]
    parts["learning"] = sum(
        seconds(partial(learn, own.suffixes, 0, train, back)) for back in KINDS.values()
    )
    _all(own)  # compiles what is left
    whole = parts["patterns"] + seconds(lambda: _all(own))
    for name, part in parts.items():
        output().print(f"{name}: {part:.2f} s in one thread")
    return Measurement(
        "programs", whole, reading, "s", 3, 10, higher_is_better=False,
        parts={name: part / whole for name, part in parts.items()},
    )  # fmt: skip


def _all(own: ProgramSource) -> None:
    for _ in programs(own.suffixes, own.blocks, {kind: Means() for kind in KINDS}):
        pass
