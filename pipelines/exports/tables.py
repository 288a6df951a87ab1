"""Reading of tables for exports: some latents at a time, for any number of latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae_harvest.common.errors import RunError
from sae_harvest.common.paths import exact_file
from sae_harvest.harvest.model.sites import Site
from sae_harvest.pipelines.exports.selection import pieces
from sae_harvest.pipelines.features.counting import kernels
from sae_harvest.pipelines.features.counting.profile import decile_edges
from sae_harvest.pipelines.features.tables.checks import (
    check_columns,
    check_context,
    check_histogram,
    check_latent,
    require_tables,
    require_whole,
)
from sae_harvest.pipelines.features.tables.folder import EXPLANATIONS, FIRINGS, firing_files
from sae_harvest.pipelines.features.tables.texts import pieces as texts_of_tokens
from sae_harvest.pipelines.features.tables.writers import quantiles

HISTOGRAM_COLUMNS = ("latent", "bin", "low", "high", "count")
MAX_BAR = 2**32
BARS = 50  # bars of a histogram, for formats with a fixed number
AT_ONCE = 128  # latents whose contexts are in memory at a time
COUNTED = 8192  # latents whose bars are in memory; each group needs a pass over the firings
PERCENTS = 100
CONTEXT_COLUMNS = (
    "latent", "stratum", "activation", "row", "document", "position", "window_start",
    "token_ids", "token_ends", "activations", "text",
)  # fmt: skip

Widths = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Context:
    """An example of a latent."""

    activation: float
    """Activation on the row."""
    row: int
    """Number of the row."""
    document: int
    """Number of the document."""
    place: int
    """Place of the row among the tokens of the window."""
    token_ids: list[int]
    """Ids of the window's tokens."""
    tokens: list[str]
    """Texts of the window's tokens."""
    activations: list[float]
    """Activations on the window's tokens."""


@dataclass(frozen=True, slots=True)
class Latent:
    """One latent's data from the tables."""

    number: int
    """Number of the latent."""
    facts: dict[str, Any]
    """Its row of the table latents."""
    contexts: dict[str, list[Context]]
    """Examples by stratum."""
    bars: dict[int, int]
    """Number of firings with activations in (b - 1, b] bar widths, by b."""
    percentiles: list[float]
    """100 quantiles, from 1 to 100 %."""
    deciles: list[tuple[float, float, int]]
    """Lower edge, upper edge and firings of each tenth of its activations."""
    alike: list[tuple[int, float]]
    """Other latents with their decoder cosines, nearest first."""

    @property
    def highest(self) -> float:
        """Its highest activation, 0 if it never fires."""
        return 0.0 if self.facts["dead"] else shortest([self.facts["max"]])[0]


class Tables:
    """The finished tables of a folder.

    Raises:
        RunError: the folder holds no tables, or one is missing.
    """

    def __init__(self, features: Path) -> None:
        self.features = features
        self.run = require_tables(features)
        self.n_latents: int = self.run["n_latents"]
        self.site = Site.parse(self.run["site"])

    def read(self, name: str, latents: range | None = None, **options: Any) -> pa.Table:
        """Read a table's rows, or those of some latents; `RunError` if it is damaged."""
        return self._read(self.features / f"{name}.parquet", latents, **options)

    def explanations(self) -> dict[int, list[str]]:
        """Read explanations by latent; empty if the folder has no table of explanations."""
        if not (self.features / f"{EXPLANATIONS}.parquet").is_file():
            return {}
        table = self.read(EXPLANATIONS)
        if "chosen" in table.column_names:  # other candidates are in the table as well
            table = table.filter(table["chosen"])
        table = table.select(["latent", "explanation"])
        found: dict[int, list[str]] = {}
        for latent, text in zip(*(c.to_pylist() for c in table.columns), strict=True):
            found.setdefault(latent, []).append(text)
        return found

    def firings(self, latents: range | None = None, **options: Any) -> Iterator[pa.Table]:
        """Yield firings, a block of rows at a time, sorted by latent, then row."""
        for path in firing_files(self.features):
            check_columns(path, FIRINGS)
            table = self._read(path, latents, **options)
            require_whole(path, table)
            latent, value = (table[name].to_numpy() for name in ("latent", "value"))
            if len(latent) and not (0 <= latent.min() <= latent.max() < self.n_latents):
                raise RunError(f"{path} is damaged (it has other latents); build again.")
            if not (value > 0).all() or (np.diff(latent) < 0).any():
                raise RunError(f"{path} is damaged (not firings by latent); build again.")
            yield table

    def described(self, latents: Sequence[range], widths: Widths) -> Iterator[Latent]:
        """Yield one latent after the other.

        Args:
            widths: computes the width of bars from the highest activation of each latent.
        """
        for counted in pieces(latents, COUNTED):
            largest = self.read("latents", counted, columns=["max"])["max"].to_numpy()
            largest = np.nan_to_num(largest.astype(np.float64))  # NaN for latents that never fire
            bars = self._bars(counted, widths(largest))
            for some in pieces([counted], AT_ONCE):
                yield from self._described(some, bars)

    def _described(self, latents: range, bars: dict[int, dict[int, int]]) -> Iterator[Latent]:
        facts = self.read("latents", latents).to_pylist()
        for row in facts:
            check_latent(self.features, row)
        largest = np.array([row["max"] or 0.0 for row in facts])
        histogram = self._histogram(latents)
        deciles = tenths(histogram, largest)
        parts = quantiles(histogram, [p / PERCENTS for p in range(1, PERCENTS)], largest)
        percentiles = np.stack([*parts, largest], axis=1)
        contexts, alike = self._contexts(latents), self._alike(latents)
        for place, latent in enumerate(latents):
            yield Latent(
                latent,
                facts[place],
                contexts.get(latent, {}),
                bars.get(latent, {}),
                percentiles[place].tolist(),
                deciles[place],
                alike.get(latent, []),
            )

    def _contexts(self, latents: range) -> dict[int, dict[str, list[Context]]]:
        table = self.read("contexts", latents, columns=list(CONTEXT_COLUMNS)).combine_chunks()
        found: dict[int, dict[str, list[Context]]] = {}
        require_whole(self.features / "contexts.parquet", table)
        lengths = pc.list_value_length(table["activations"]).to_numpy()
        ends = np.cumsum(lengths).tolist()
        if not np.array_equal(pc.list_value_length(table["token_ids"]).to_numpy(), lengths):
            raise RunError(
                f"{self.features / 'contexts.parquet'} is damaged (not a number for each token); "
                "build again."
            )
        ids = pc.list_flatten(table["token_ids"]).to_pylist()
        texts, token_ends = table["text"].to_pylist(), table["token_ends"].to_pylist()
        activations = shortest(pc.list_flatten(table["activations"]))
        peaks = shortest(table["activation"])
        rest = [table[name].to_pylist() for name in CONTEXT_COLUMNS[:2] + CONTEXT_COLUMNS[3:7]]
        start = 0
        for n, (latent, stratum, row, document, position, first) in enumerate(
            zip(*rest, strict=True)
        ):
            window = slice(start, ends[n])
            place = position - first
            check_context(
                self.features, latent, stratum, place, texts[n], token_ends[n], activations[window]
            )
            found.setdefault(latent, {}).setdefault(stratum, []).append(
                Context(
                    peaks[n],
                    row,
                    document,
                    place,
                    ids[window],
                    texts_of_tokens(texts[n], token_ends[n]),
                    activations[window],
                )
            )
            start = ends[n]
        return found

    def _alike(self, latents: range) -> dict[int, list[tuple[int, float]]]:
        table = self.read("neighbours", latents)
        table = table.filter(pc.is_valid(table["cosine_rank"])).sort_by(
            [("latent", "ascending"), ("cosine_rank", "ascending")]
        )
        table = table.select(["latent", "other", "decoder_cosine"])
        require_whole(self.features / "neighbours.parquet", table)
        found: dict[int, list[tuple[int, float]]] = {}
        columns = table["latent"].to_pylist(), table["other"].to_pylist()
        for latent, other, cosine in zip(*columns, shortest(table["decoder_cosine"]), strict=True):
            found.setdefault(latent, []).append((other, cosine))
        return found

    def _histogram(self, latents: range) -> npt.NDArray[np.int64]:
        """int64 [latents, bins of the table of histograms]."""
        table = self.read("histograms", latents)
        dense = np.zeros((len(latents), kernels.BINS), np.int64)
        latent, number, count = (table[c].to_numpy() for c in ("latent", "bin", "count"))
        for place, *row in zip(*(table[c].to_pylist() for c in HISTOGRAM_COLUMNS), strict=True):
            check_histogram(self.features, place, [row])
        dense[latent - latents.start, number] = count
        return dense

    def _bars(self, latents: range, widths: npt.NDArray[np.float64]) -> dict[int, dict[int, int]]:
        """Count firings in bars of equal width per latent; empty bars are left out."""
        pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for table in self.firings(latents, columns=["latent", "value"]):
            place = table["latent"].to_numpy().astype(np.int64) - latents.start
            value = table["value"].to_numpy().astype(np.float64)
            with np.errstate(divide="ignore", over="ignore"):
                number = np.ceil(value / widths[place])
            if not (number < MAX_BAR).all():
                raise RunError(
                    f"{self.features} has activations too large to be counted in bars; "
                    "if they are wrong, build the tables again."
                )
            bar = number.astype(np.int64)
            found, n = np.unique(place << 32 | bar, return_counts=True)
            pairs, inverse = np.unique(np.concatenate([pairs, found]), return_inverse=True)
            counts = np.bincount(inverse, np.concatenate([counts, n]), len(pairs)).astype(np.int64)
        bars: dict[int, dict[int, int]] = {}
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            bars.setdefault(latents.start + (pair >> 32), {})[pair & 0xFFFFFFFF] = count
        return bars

    def _read(self, path: Path, latents: range | None, **options: Any) -> pa.Table:
        if latents is not None:
            latent = pc.field("latent")
            options["filters"] = (latent >= latents.start) & (latent < latents.stop)
        try:
            table = pq.read_table(
                exact_file(path), page_checksum_verification=True, partitioning=None, **options
            )
            table.validate(full=True)  # texts are UTF-8, lists follow one another
            return table
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"{path} is damaged ({str(error).splitlines()[0]}); "
                f"remove {self.features} and build again."
            ) from error


def fiftieths(largest: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the widths of `BARS` bars from 0 to the highest activation."""
    return largest / BARS


def heights(latent: Latent) -> list[int]:
    """Return the number of firings in each of `BARS` bars."""
    found = [0] * BARS
    for bar, n in latent.bars.items():
        found[min(bar, BARS) - 1] += n  # by rounding, the highest firing may be past the last bar
    return found


def tenths(
    histogram: npt.NDArray[np.int64], largest: npt.NDArray[np.float64]
) -> list[list[tuple[float, float, int]]]:
    """Return the edges and firings of each tenth of the activations, for each latent."""
    edges = decile_edges(histogram)  # at edges of bins
    number = (np.log2(edges) - kernels.LOWEST_OCTAVE) * kernels.BINS_PER_OCTAVE
    below = np.zeros((len(histogram), kernels.BINS + 1), np.int64)
    histogram.cumsum(axis=1, out=below[:, 1:])
    at = np.take_along_axis(below, np.rint(number).astype(np.int64), axis=1)
    counts = np.diff(at, axis=1, prepend=0, append=below[:, -1:]).tolist()
    edges = np.minimum(edges, largest[:, None])
    lows = np.concatenate([np.zeros((len(edges), 1)), edges], axis=1).tolist()
    highs = np.concatenate([edges, largest[:, None]], axis=1).tolist()
    return [list(zip(*each, strict=True)) for each in zip(lows, highs, counts, strict=True)]


def shortest(values: pa.ChunkedArray | npt.NDArray[np.float32] | list[float]) -> list[float]:
    """Convert float32 to the shortest decimals that round to them: 0.1, not 0.10000000149."""
    if not isinstance(values, pa.ChunkedArray):
        values = pa.array(values, pa.float32())
    return [float(text) for text in pc.cast(values, pa.string()).to_pylist()]
