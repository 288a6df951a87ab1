"""The files that Neuronpedia imports: a folder per source, with its database's rows as JSON Lines.

    OUT/MODEL/LAYER-NAME/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
    OUT/MODEL/LAYER-NAME/features/batch-0.jsonl.gz, activations/…, explanations/…

Each record has those columns of its table that we know; the database fills in defaults.
All records of a table have the same keys, because the importer takes them from the first line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.exports.files import write_lines
from sae_harvest.pipelines.exports.tables import (
    BARS,
    Context,
    Latent,
    Tables,
    fiftieths,
    heights,
    shortest,
)
from sae_harvest.pipelines.features.tables.folder import DECILES

LONGEST = 80  # letters of a name, which becomes the name of a folder
BATCH = 256  # latents per file
BATCHES = 900  # files of a kind: the importer lists only 1,000 files
CREATOR = "clkht01d40000jv08hvalcvly"  # the user that a new database of Neuronpedia has
CREATOR_NAME = "sae-harvest"


def write(
    all_tables: Sequence[Tables],
    latents: Sequence[Sequence[range]],
    out: Path,
    name: str | None,
    on_latent: Callable[[], None],
) -> None:
    """Write a source for each of the tables."""
    for tables, some in zip(all_tables, latents, strict=True):
        source = NeuronpediaRows(tables, name)
        folder = out / source.model / source.source
        if folder.exists():
            raise InputError(
                f"Two of the tables would have the name {source.model}/{source.source}; "
                "export one of them."
            )
        folder.mkdir(parents=True)
        for table, line in source.metadata().items():
            write_lines(folder / f"{table}.jsonl", [line])
        each = max(BATCH, -(-tables.n_latents // BATCHES))
        described = tables.described(some, fiftieths)
        for number in count():
            records: dict[str, list[dict[str, Any]]] = {}
            for latent in islice(described, each):
                for kind, rows in source.records(latent).items():
                    records.setdefault(kind, []).extend(rows)
                on_latent()
            if not records:
                break
            for kind, rows in records.items():
                if rows:
                    (folder / kind).mkdir(exist_ok=True)
                    write_lines(folder / kind / f"batch-{number}.jsonl.gz", rows)


class NeuronpediaRows:
    """Rows of Neuronpedia's tables for one SAE."""

    def __init__(self, tables: Tables, name: str | None) -> None:
        run = tables.run
        self.model = slug(Path(run["model"]).name)
        self.set = slug(name or Path(run["sae"]).name)
        self.source = f"{tables.site.layer}-{self.set}"
        self._tables = tables
        self._explanations = tables.explanations()
        self._place = {"modelId": self.model, "layer": self.source}

    def metadata(self) -> dict[str, dict[str, Any]]:
        """Return the one line of each of the four small files."""
        run = self._tables.run
        about = f"{run['n_latents']} latents of {run['site']}"
        creator = {"creatorName": CREATOR_NAME, "creatorId": CREATOR}
        public = {"visibility": "PUBLIC"}
        return {
            "release": {"name": self.set, "description": about, "urls": [], **creator, **public},
            "model": {
                "id": self.model,
                "displayNameShort": self.model,
                "displayName": self.model,
                "creatorId": CREATOR,
                "layers": 0,  # Neuronpedia keeps its own number for a model that it knows
                "neuronsPerLayer": 0,
                "owner": "",
                **public,
            },
            "sourceset": {
                "modelId": self.model,
                "name": self.set,
                "description": about,
                "urls": [],
                "releaseName": self.set,
                **creator,
                **public,
            },
            "source": {
                "id": self.source,
                "modelId": self.model,
                "setName": self.set,
                "creatorId": CREATOR,
                "hasDashboards": True,
                "inferenceEnabled": False,
                "num_prompts": self._n_contexts(),
                "num_tokens_in_prompt": run["context_length"],
                **public,
            },
        }

    def records(self, latent: Latent) -> dict[str, list[dict[str, Any]]]:
        """Return rows by the folder in which they belong."""
        return {
            "features": [self.feature(latent)],
            "activations": self.activations(latent),
            "explanations": self.explanations(latent.number),
        }

    def feature(self, latent: Latent) -> dict[str, Any]:
        """Make a row of the table Neuron."""
        facts = latent.facts
        highest = latent.highest
        middles = [round((bar + 0.5) * highest / BARS, 6) for bar in range(BARS)]
        return self._place | {
            "index": str(latent.number),
            "sourceSetName": self.set,
            "creatorId": CREATOR,
            "maxActApprox": highest,
            "hasVector": False,
            "topkCosSimIndices": [other for other, _ in latent.alike],
            "topkCosSimValues": [cosine for _, cosine in latent.alike],
            "pos_str": facts["top_logit_tokens"] or [],
            "pos_values": shortest(facts["top_logits"] or []),
            "neg_str": facts["bottom_logit_tokens"] or [],
            "neg_values": shortest(facts["bottom_logits"] or []),
            "frac_nonzero": facts["density"],
            "freq_hist_data_bar_heights": [] if facts["dead"] else heights(latent),
            "freq_hist_data_bar_values": [] if facts["dead"] else middles,
        }

    def activations(self, latent: Latent) -> list[dict[str, Any]]:
        """Make rows of the table Activation: top contexts, then intervals from the highest down."""
        found = [
            self._activation(latent, "top", context, (-1.0, latent.highest, -1.0))
            for context in latent.contexts.get("top", [])
        ]
        for tenth in range(DECILES, 0, -1):
            low, high, n_fire = latent.deciles[tenth - 1]
            interval = (low, high, n_fire / max(self._tables.run["n_rows"], 1))
            stratum = f"decile_{tenth}"
            found += [
                self._activation(latent, stratum, context, interval)
                for context in latent.contexts.get(stratum, [])
            ]
        return found

    def explanations(self, latent: int) -> list[dict[str, Any]]:
        """Make rows of the table Explanation."""
        return [
            self._place
            | {
                "id": self._id("explanation", latent, number),
                "index": str(latent),
                "description": text,
                "authorId": CREATOR,
            }
            for number, text in enumerate(self._explanations.get(latent, []))
        ]

    def _activation(
        self, latent: Latent, stratum: str, context: Context, interval: tuple[float, float, float]
    ) -> dict[str, Any]:
        values = context.activations
        highest = max(values)
        return self._place | {
            "id": self._id(stratum, latent.number, context.row),
            "index": str(latent.number),
            "tokens": context.tokens,
            "values": values,
            "maxValue": highest,
            "maxValueTokenIndex": values.index(highest),
            "minValue": min(values),
            "creatorId": CREATOR,
            "binMin": interval[0],
            "binMax": interval[1],
            "binContains": interval[2],
            "qualifyingTokenIndex": context.place,
        }

    def _id(self, *what: object) -> str:
        """Make an id with Neuronpedia's length and letters; the same input gives the same id."""
        run = self._tables.run
        key = (run["store_digest"], run["sae_digest"], self.model, self.source, *what)
        return "c" + xxhash.xxh3_128_hexdigest(repr(key).encode())[:24]

    def _n_contexts(self) -> int | None:
        """Return the number of contexts of the store, computed from a latent that fires."""
        table = self._tables.read("latents", columns=["n_contexts", "context_density"])
        fires = table.filter(pc.greater(table["n_contexts"], 0)).slice(0, 1)
        if not len(fires):
            return None
        return round(fires["n_contexts"][0].as_py() / fires["context_density"][0].as_py())


def slug(name: str) -> str:
    """Convert a name to the letters that Neuronpedia's ids may have."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower())[:LONGEST].strip("-") or "unnamed"
