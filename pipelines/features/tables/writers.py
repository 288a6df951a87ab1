"""Writers of the Parquet tables of a feature build; `docs/tables.md` describes the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.atomic import making
from sae_harvest.common.paths import exact_file
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.counting.lens import LogitLens
from sae_harvest.pipelines.features.counting.neighbours import Neighbours
from sae_harvest.pipelines.features.counting.profile import Profile, bin_edge
from sae_harvest.pipelines.features.tables.contexts import lists
from sae_harvest.pipelines.features.tables.folder import with_version
from sae_harvest.pipelines.features.tables.texts import TokenTexts

ROW_GROUP = 2048  # a query for one latent reads one group: the contexts of about 30 latents
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
MIN_SPREAD = 1e-3  # least std over mean for skew and kurtosis; their error is then below 1 %
NAMED_TOKENS = 10
SORTED_ROWS = 4_000_000  # rows of the table of tokens sorted at a time
SEEN = 3  # fewest firings on a token for a meaningful mean
CONTEXTS_ENCODING: dict[str, Any] = {  # smallest file, fastest to write
    "use_dictionary": ["latent", "stratum", "rank", "reason", "split"],
    "column_encoding": {
        "token_ids.list.element": "BYTE_STREAM_SPLIT",
        "token_ends.list.element": "BYTE_STREAM_SPLIT",
    },
}


class TableWriter:
    """One Parquet file, written in parts of whole row groups, and renamed when it is complete."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._path, self._options = path, options
        self._stack = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._rest: list[pa.Table] = []

    def add(self, part: pa.Table) -> None:
        """Add the next rows."""
        part = with_version(part)
        if self._writer is None:
            temporary = self._stack.enter_context(making(self._path))
            file = self._stack.enter_context(exact_file(temporary, "wb"))
            writer = pq.ParquetWriter(
                file, part.schema, compression="zstd", write_page_checksum=True, **self._options
            )
            self._writer = self._stack.enter_context(writer)
        self._rest.append(part)
        joined = pa.concat_tables(self._rest)
        whole = len(joined) // ROW_GROUP * ROW_GROUP
        if whole:
            self._writer.write_table(joined.slice(0, whole), row_group_size=ROW_GROUP)
            self._rest = [joined.slice(whole)]

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.push(self._write_rest)
        self._stack.__exit__(*error)

    def _write_rest(self, kind: type[BaseException] | None, *_: object) -> None:
        rest = sum(map(len, self._rest))
        if self._writer is not None and kind is None and rest:
            self._writer.write_table(pa.concat_tables(self._rest), row_group_size=ROW_GROUP)


def latents_table(
    found: Profile,
    n_rows: int,
    n_store_contexts: int,
    weights: dict[str, npt.NDArray[np.float32]],
    lens: LogitLens | None,
    texts: TokenTexts,
) -> pa.Table:
    """Make the part of the table for the latents of a profile. Moments are over firings.

    Args:
        n_rows: number of rows read.
        weights: a dictionary's W_enc [n_latents, d_in], W_dec [n_latents, d_out] and b_enc
            [n_latents]; each may be missing.
        lens: logit lens of all latents.
    """
    n = found.n_fire
    inside = slice(found.first, found.first + len(n))
    raw = found.power_sums / np.maximum(n, 1)[:, None]
    mean = raw[:, 0]
    spread = np.sqrt(np.maximum(raw[:, 1] - mean**2, 0))
    third = raw[:, 2] - 3 * mean * raw[:, 1] + 2 * mean**3
    fourth = raw[:, 3] - 4 * mean * raw[:, 2] + 6 * mean**2 * raw[:, 1] - 3 * mean**4
    # For a narrower spread, rounding of the sums of powers makes its shape meaningless.
    safe = np.where(spread > MIN_SPREAD * mean, spread, np.nan)
    skew, kurtosis = third / safe**3, fourth / safe**4
    columns: dict[str, Any] = {
        "latent": np.arange(inside.start, inside.stop, dtype=np.int32),
        "n_fire": n,
        "density": n / max(n_rows, 1),
        "n_contexts": found.n_contexts,
        "context_density": found.n_contexts / n_store_contexts,
        "dead": n == 0,
        "max": found.largest.astype(np.float64),
        "mean": mean,
        "std": spread,
        "skew": _nullable(skew),
        "kurtosis": _nullable(kurtosis),
        "bimodality": _nullable((skew**2 + 1) / kurtosis),
        "mean_square": found.power_sums[:, 1] / max(n_rows, 1),
    }
    found_quantiles = quantiles(found.histogram, QUANTILES, found.largest)
    for q, values in zip(QUANTILES, found_quantiles, strict=True):
        columns[f"q{q * 100:g}"] = values
    columns |= _token_columns(found, texts)
    shares = (found.positions / np.maximum(n, 1)[:, None]).astype(np.float32)
    columns["position_profile"] = lists(pa.array(shares.reshape(-1)), shares.shape)
    return pa.table(columns | _weight_columns(weights, inside) | _lens_columns(lens, texts, inside))


def _weight_columns(weights: dict[str, npt.NDArray[np.float32]], inside: slice) -> dict[str, Any]:
    n = inside.stop - inside.start
    some = {name: tensor[inside] for name, tensor in weights.items()}
    norms = {
        name: np.linalg.norm(some[name], axis=1) for name in ("W_enc", "W_dec") if name in some
    }
    nothing = pa.nulls(n, pa.float32())
    cosine: Any = nothing  # undefined for the rows of a transcoder
    if len(norms) == 2 and some["W_enc"].shape == some["W_dec"].shape:
        dots = np.einsum("nd,nd->n", some["W_enc"], some["W_dec"])
        cosine = dots / np.maximum(norms["W_enc"] * norms["W_dec"], 1e-12)
    return {
        "encoder_norm": norms.get("W_enc", nothing),
        "decoder_norm": norms.get("W_dec", nothing),
        "encoder_decoder_cosine": cosine,
        "encoder_bias": some.get("b_enc", nothing),
    }


def _lens_columns(lens: LogitLens | None, texts: TokenTexts, inside: slice) -> dict[str, Any]:
    n = inside.stop - inside.start
    columns: dict[str, Any] = {}
    for end in ("top", "bottom"):
        if lens is None:
            columns[f"{end}_logit_tokens"] = pa.nulls(n, pa.list_(pa.string()))
            columns[f"{end}_logits"] = pa.nulls(n, pa.list_(pa.float32()))
            continue
        ids, logits = getattr(lens, end)[inside], getattr(lens, f"{end}_logits")[inside]
        columns[f"{end}_logit_tokens"] = lists(texts.of(ids.reshape(-1)), ids.shape)
        columns[f"{end}_logits"] = lists(pa.array(logits.reshape(-1)), logits.shape)
    return columns


def _token_columns(found: Profile, texts: TokenTexts) -> dict[str, Any]:
    """Make the columns about the tokens on which each latent fires."""
    tokens, starts = found.tokens, found.tokens.starts
    often = _first_of_each(starts, NAMED_TOKENS)
    strong_starts, strongest = tokens.strongest(NAMED_TOKENS, SEEN)
    means = (tokens.total[strongest] / tokens.count[strongest]).astype(np.float32)
    return {
        "n_tokens": np.diff(starts).astype(np.int32),
        "token_entropy_bits": tokens.entropy_bits(),
        "top_tokens": often.of(texts.of(tokens.token[often.places])),
        "top_token_counts": often.of(pa.array(tokens.count[often.places])),
        "strongest_tokens": _runs(strong_starts, texts.of(tokens.token[strongest])),
        "strongest_token_means": _runs(strong_starts, pa.array(means)),
    }


class _first_of_each:
    """Places of the first entries, at most `most`, of runs that begin at `starts` [n + 1]."""

    def __init__(self, starts: npt.NDArray[np.int64], most: int) -> None:
        lengths = np.minimum(np.diff(starts), most)
        ends = np.cumsum(lengths)
        inside = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
        self.places = np.repeat(starts[:-1], lengths) + inside
        self._starts = np.concatenate([[0], ends])

    def of(self, flat: pa.Array) -> pa.ListArray:
        """Return the values at the places, one list per run."""
        return _runs(self._starts, flat)


def _runs(starts: npt.NDArray[np.int64], flat: pa.Array) -> pa.ListArray:
    """Return the values of runs that begin at `starts` [n + 1], one list per run."""
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), flat)


def quantiles(
    histogram: npt.NDArray[np.int64], shares: Sequence[float], largest: npt.NDArray[np.float32]
) -> list[npt.NDArray[np.float64]]:
    """Compute quantiles of each latent's activations, [n] per share, exact to one bin."""
    below = histogram.cumsum(axis=1)
    total, found = below[:, -1], []
    for share in shares:
        number = (below < np.ceil(share * total)[:, None]).sum(axis=1)
        middle = np.sqrt(bin_edge(number) * bin_edge(number + 1))
        found.append(np.where(total > 0, np.minimum(middle, largest), 0.0))
    return found


def histograms_table(found: Profile) -> pa.Table:
    """Make the table (latent, bin, low, high, count); empty bins are left out."""
    latent, number = np.nonzero(found.histogram)
    return pa.table(
        {
            "latent": (latent + found.first).astype(np.int32),
            "bin": number.astype(np.int16),
            "low": bin_edge(number),
            "high": bin_edge(number + 1),
            "count": found.histogram[latent, number],
        }
    )


def neighbours_table(near: Neighbours) -> pa.Table:
    """Make the table of neighbours: each pair once, sorted by latent, then other."""
    parts = []
    for kind, (others, cosine, both) in enumerate(
        (
            (near.alike, near.alike_cosine, near.alike_together),
            (near.along, near.along_cosine, near.along_together),
        )
    ):
        which, rank = np.nonzero(others >= 0)
        ranks = [np.full(len(which), -1), np.full(len(which), -1)]
        ranks[kind] = rank
        found = (numbers[which, rank] for numbers in (others, cosine, both))
        parts.append((which + near.first, *found, *ranks))
    latent, other, cosine, together, cosine_rank, cofire_rank = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    order = np.lexsort((other, latent))
    pair = latent[order] * len(near.fired) + other[order]
    firsts = np.flatnonzero(np.diff(pair, prepend=-1))
    cosine_rank = np.maximum.reduceat(cosine_rank[order], firsts) if len(firsts) else cosine_rank
    cofire_rank = np.maximum.reduceat(cofire_rank[order], firsts) if len(firsts) else cofire_rank
    at = order[firsts]
    latent, other, cosine, together = latent[at], other[at], cosine[at], together[at]
    either = near.fired[latent] + near.fired[other] - together
    return pa.table(
        {
            "latent": latent.astype(np.int32),
            "other": other.astype(np.int32),
            "decoder_cosine": _nullable(cosine),
            "cofire": together,
            "jaccard": together / np.maximum(either, 1),
            "cosine_rank": pa.array(cosine_rank.astype(np.int16), mask=cosine_rank < 0),
            "cofire_rank": pa.array(cofire_rank.astype(np.int16), mask=cofire_rank < 0),
        }
    )


def tokens_part(found: Profile, config: FeatureConfig) -> pa.Table:
    """Make (token, latent, count, mean, share) of the most frequent tokens of each latent."""
    starts, tokens = found.tokens.starts, found.tokens
    places = _first_of_each(starts, config.n_tokens).places
    latent = np.searchsorted(starts, places, side="right") - 1
    count = tokens.count[places]
    return pa.table(
        {
            "token": tokens.token[places],
            "latent": (found.first + latent).astype(np.int32),
            "count": count,
            "mean": (tokens.total[places] / count).astype(np.float32),
            "share": (count / found.n_fire[latent]).astype(np.float32),
        }
    )


def tokens_tables(parts: list[pa.Table], texts: TokenTexts) -> Iterator[pa.Table]:
    """Yield all parts sorted by token, decreasing count, latent, with the token's text.

    Each table has a range of tokens, so that not all rows are in memory twice.
    """
    joined = pa.concat_tables(parts)
    token = joined["token"].to_numpy()
    rows_below = np.cumsum(np.bincount(token, minlength=1))
    order = [("token", "ascending"), ("count", "descending"), ("latent", "ascending")]
    first = 0
    while first < len(rows_below):
        done = rows_below[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(rows_below, done + SORTED_ROWS, side="right")))
        some = joined.filter(pa.array((token >= first) & (token < last)))
        some = some.sort_by(order).combine_chunks()
        yield some.add_column(1, "text", texts.of(some["token"].to_numpy()))
        first = last


def _nullable(x: npt.NDArray[np.floating]) -> pa.Array:
    return pa.array(x, mask=np.isnan(x))
