"""Pairs of latents of two SAEs by class, with contexts in which they disagree, from a diff."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.paths import exact_file
from sae_harvest.pipelines.evaluate.matching.classes import CLASSES
from sae_harvest.pipelines.evaluate.matching.table import (
    DISAGREEMENTS,
    MATCHES,
    SCHEMAS,
    read_matches_record,
)
from sae_harvest.pipelines.viewer.latent import compact
from sae_harvest.pipelines.viewer.tables import Tables, plain

PAGE = 20  # pairs
SENTENCES = {
    "same": "Each latent fires on most rows on which the other fires.",
    "split": "Several latents of B share the rows of one latent of A.",
    "merged": "Several latents of A share the rows of one latent of B.",
    "absorbed": "The narrower latent fires where its parent should fire and does not.",
    "died": "No latent of B, and no set of them, has most rows of this latent of A.",
    "born": "No latent of A, and no set of them, has most rows of this latent of B.",
}
# the order of the pairs of a class: columns, with a minus for falling values
ORDER = {
    "same": ("-jaccard",),
    "split": ("latent_a", "-gain"),
    "merged": ("latent_b", "-gain"),
    "absorbed": ("-parent_silent",),
    "died": ("-a_only",),
    "born": ("-b_only",),
}
SHOWN = (
    "latent_a", "latent_b", "both_fire", "a_only", "b_only", "jaccard", "decoder_cosine", "gain",
    "set_coverage", "set_precision", "child", "parent", "parent_silent",
    "parent_cosine",
)  # fmt: skip


class Matches:
    """The folder that `sae-features diff` wrote, for two SAEs that are shown."""

    def __init__(self, folder: Path, ours: Tables, theirs: Tables) -> None:
        """Open the folder.

        Raises:
            RunError: it holds no matches, damaged ones, or those of other tables.
        """
        self._folder, self._ours, self._theirs = folder, ours, theirs
        self._record = read_matches_record(folder)
        for name, tables in (("a", ours), ("b", theirs)):
            for key in ("sae_digest", "store_digest", "site"):
                if self._record[name].get(key) != tables.run[key]:
                    raise RunError(
                        f"{folder} holds matches of other tables than {tables.features} "
                        f"(another {key}); run `sae-features diff` with the tables that are "
                        "shown, in the same order."
                    )
        self._table = self._read(MATCHES, None)
        names = np.array(self._table["class"].to_pylist())
        self._places = {name: self._ordered(name, names) for name in CLASSES}
        self._pair = self._read(DISAGREEMENTS, None, ["pair"])["pair"].to_numpy()

    def overview(self) -> dict[str, Any]:
        """Return the number of common rows, and for each class its pairs and latents."""
        latents = self._record["latents"]
        return {
            "rows": self._record["rows"],
            "page": PAGE,
            "classes": [
                {
                    "name": name,
                    "says": SENTENCES[name],
                    "pairs": len(self._places[name]),
                    "a": latents["a"].get(name),
                    "b": latents["b"].get(name),
                }
                for name in CLASSES
            ],
        }

    def page(self, name: str, offset: int) -> dict[str, Any]:
        """Return `PAGE` pairs of a class from `offset` on, with labels and contexts.

        Raises:
            InputError: there is no such class.
            RunError: a table is damaged.
        """
        if name not in self._places:
            raise InputError(f"There is no class {name!r:.20}; they are {', '.join(CLASSES)}.")
        places = self._places[name][offset : offset + PAGE]
        pairs = self._table.take(pa.array(places)).select(list(SHOWN)).to_pylist()
        contexts = self._contexts(places)
        ours = self._labels(self._ours, pairs, "latent_a")
        theirs = self._labels(self._theirs, pairs, "latent_b")
        titles = self._ours.titles([c["document"] for some in contexts.values() for c in some])
        rows = [
            {key: plain(value) for key, value in pair.items()}
            | {"ours": ours.get(pair["latent_a"]), "theirs": theirs.get(pair["latent_b"])}
            | {"contexts": contexts.get(place, [])}
            for pair, place in zip(pairs, places.tolist(), strict=True)
        ]
        documents = {str(number): title for number, title in titles.items()}
        return {
            "total": len(self._places[name]),
            "offset": offset,
            "rows": rows,
            "documents": documents,
        }

    def _ordered(self, name: str, names: npt.NDArray[np.str_]) -> npt.NDArray[np.int64]:
        """Return the places of a class's pairs in the order in which they are shown."""
        places = np.flatnonzero(names == name)
        keys: list[npt.NDArray[Any]] = [places]
        for column in reversed(ORDER[name]):
            values = self._table[column.removeprefix("-")].to_numpy()[places]
            keys.append(-values if column.startswith("-") else values)
        ordered: npt.NDArray[np.int64] = places[np.lexsort(keys)]
        return ordered

    def _contexts(self, places: npt.NDArray[np.int64]) -> dict[int, list[dict[str, Any]]]:
        """Return the contexts of pairs, as the pages show them, by the place of the pair."""
        wanted = np.flatnonzero(np.isin(self._pair, places))
        found: dict[int, list[dict[str, Any]]] = {}
        for row in self._read(DISAGREEMENTS, wanted).to_pylist():
            place = row["position"] - row["window_start"]
            self._check(row, place)
            fires = "b" if row["kind"] == "B only" else "a"
            if row["kind"] == "parent silent":
                fires = row["child"].lower()
            activations = row[f"activations_{fires}"]
            context = {
                "fires": fires,
                "stratum": row["kind"],
                "rank": row["rank"],
                "activation": plain(activations[place]),
                **{key: row[key] for key in ("row", "document", "position", "text")},
                "place": place,
                "token_ends": row["token_ends"],
                "activations": activations,
            }
            found.setdefault(row["pair"], []).append(compact(context))
        return found

    def _check(self, row: dict[str, Any], place: int) -> None:
        """Raise `RunError` if the parts of a context do not fit together."""
        ends, length = row["token_ends"], len(row["token_ids"])
        lists = (ends, row["activations_a"], row["activations_b"])
        if any(len(values) != length for values in lists) or not 0 <= place < length:
            raise RunError(
                f"{self._folder} is damaged (a context of pair {row['pair']} does not fit its "
                "text); run `sae-features diff` again into another folder."
            )

    def _labels(
        self, tables: Tables, pairs: list[dict[str, Any]], key: str
    ) -> dict[int, dict[str, Any]]:
        return tables.labels([pair[key] for pair in pairs if pair[key] is not None])

    def _read(
        self,
        name: str,
        rows: npt.NDArray[np.int64] | None,
        columns: list[str] | None = None,
    ) -> pa.Table:
        """Read rows of a table by number, all if None; only the row groups that hold them."""
        path = self._folder / f"{name}.parquet"
        try:
            with exact_file(path) as opened, pq.ParquetFile(opened) as file:
                if not file.schema_arrow.equals(SCHEMAS[name]):
                    raise RunError(
                        f"{path} is no table of {name}: it has other columns; run `sae-features "
                        "diff` again into another folder."
                    )
                if rows is None:
                    return file.read(columns=columns)
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                starts = np.concatenate([[0], np.cumsum(sizes)])
                parts = [file.schema_arrow.empty_table()]
                for group in np.unique(np.searchsorted(starts, rows, side="right") - 1).tolist():
                    low, high = starts[group], starts[group + 1]
                    some = rows[(rows >= low) & (rows < high)] - low
                    parts.append(file.read_row_group(group).take(pa.array(some)))
                return pa.concat_tables(parts)
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"{path} is missing or damaged ({str(error).splitlines()[0]}); run "
                "`sae-features diff` again into another folder."
            ) from error
