"""The Parquet tables of a feature build, sorted by latent, with small row groups.

latents.parquet     one row a latent: counts, moments, quantiles, tokens, logit lens, weights
contexts.parquet    where it fires: strata `top` and `random`, with activations per token
histograms.parquet  its activations in log-spaced bins
neighbours.parquet  latents with similar decoder rows, and how often both fire
tokens.parquet      latent × token: count and mean activation
documents.parquet   source, title and URL of every document
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.features import kernels
from pipelines.features.accumulate import Accumulator, ShortList
from pipelines.features.config import FeatureConfig
from pipelines.features.folder import FORMAT
from pipelines.features.lens import LogitLens
from pipelines.features.texts import TokenTexts
from store.reader import ActivationStore
from store.rules import heldout_documents

ROW_GROUP = 2048  # a point query reads one group: about 70 latents' contexts
SCORE_FRACTION = 0.5
QUANTILES = (0.5, 0.9, 0.99)
LEAST_SPREAD = 1e-3  # of the mean, for skew and kurtosis; the error there is below 1 %


def write_table(folder: Path, name: str, table: pa.Table) -> None:
    """Write one table with the format's version in its metadata."""
    metadata = {b"sae_harvest_tables": FORMAT.encode()} | (table.schema.metadata or {})
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, folder / f"{name}.parquet", compression="zstd", row_group_size=ROW_GROUP)


def latents_table(
    counts: Accumulator,
    n_store_contexts: int,
    weights: dict[str, npt.NDArray[np.float32]],
    lens: LogitLens | None,
    texts: TokenTexts,
    config: FeatureConfig,
) -> pa.Table:
    """One row per latent. Moments are over firings; density and E[a²] over all rows read. Skew
    and kurtosis (3 for a normal distribution) are null where all firings are about the same.

    Args:
        weights: W_enc [n_latents, d_in], W_dec [n_latents, d_out], b_enc [n_latents].
    """
    n = counts.n_fire
    fired = np.maximum(n, 1)
    mean = counts.power_sums[:, 0] / fired
    raw = counts.power_sums / fired[:, None]
    variance = np.maximum(raw[:, 1] - mean**2, 0)
    spread = np.sqrt(variance)
    third = raw[:, 2] - 3 * mean * raw[:, 1] + 2 * mean**3
    fourth = raw[:, 3] - 4 * mean * raw[:, 2] + 6 * mean**2 * raw[:, 1] - 3 * mean**4
    # Sums of powers lose the shape of a spread this narrow to rounding.
    safe = np.where(spread > LEAST_SPREAD * mean, spread, np.nan)
    columns: dict[str, Any] = {
        "latent": np.arange(len(n), dtype=np.int32),
        "n_fire": n,
        "density": n / max(counts.n_rows, 1),
        "n_contexts": counts.n_contexts,
        "context_density": counts.n_contexts / n_store_contexts,
        "dead": n == 0,
        "max": counts.largest,
        "mean": mean,
        "std": spread,
        "skew": _nullable(third / safe**3),
        "kurtosis": _nullable(fourth / safe**4),
        "mean_square": counts.power_sums[:, 1] / max(counts.n_rows, 1),
    }
    for q in QUANTILES:
        columns[f"q{q * 100:g}"] = histogram_quantiles(counts.histogram, q, counts.largest)
    columns |= _token_columns(counts, texts, config)
    norms = {name: np.linalg.norm(weights[name], axis=1) for name in ("W_enc", "W_dec")}
    cosine: Any = pa.nulls(len(n), pa.float32())  # of a transcoder's rows there is none
    if weights["W_enc"].shape == weights["W_dec"].shape:
        dots = np.einsum("nd,nd->n", weights["W_enc"], weights["W_dec"])
        cosine = dots / np.maximum(norms["W_enc"] * norms["W_dec"], 1e-12)
    columns |= {
        "encoder_norm": norms["W_enc"],
        "decoder_norm": norms["W_dec"],
        "encoder_decoder_cosine": cosine,
        "encoder_bias": weights["b_enc"],
    }
    if lens is not None:
        for end, ids, logits in (
            ("top", lens.top, lens.top_logits),
            ("bottom", lens.bottom, lens.bottom_logits),
        ):
            flat = pa.array([texts.one(t) for t in ids.reshape(-1).tolist()])
            columns[f"{end}_logit_tokens"] = _lists(flat, ids.shape)
            columns[f"{end}_logits"] = _lists(pa.array(logits.reshape(-1)), logits.shape)
    return pa.table(columns)


def contexts_table(store: ActivationStore, counts: Accumulator, texts: TokenTexts) -> pa.Table:
    """The short lists of every latent, sorted by latent, stratum (top first) and rank."""
    parts = [
        _context_part(store, "top", counts.top, texts),
        _context_part(store, "random", counts.random, texts),
    ]
    table = pa.concat_tables(parts)
    order = np.lexsort(
        (
            table["rank"].to_numpy(),
            np.repeat([0, 1], [len(p) for p in parts]),
            table["latent"].to_numpy(),
        )
    )
    return table.take(order)


def histograms_table(counts: Accumulator) -> pa.Table:
    """latent, bin, low, high, count; only bins that hold something."""
    latent, number = np.nonzero(counts.histogram)
    return pa.table(
        {
            "latent": latent.astype(np.int32),
            "bin": number.astype(np.int16),
            "low": bin_edge(number),
            "high": bin_edge(number + 1),
            "count": counts.histogram[latent, number],
        }
    )


def neighbours_table(counts: Accumulator, cosines: npt.NDArray[np.float32]) -> pa.Table:
    """latent, other, rank, decoder cosine, rows on which both fire, Jaccard index of the two."""
    n_latents, n = counts.neighbours.shape
    latent = np.repeat(np.arange(n_latents, dtype=np.int32), n)
    other = counts.neighbours.reshape(-1)
    together = counts.together.reshape(-1)
    either = counts.n_fire[latent] + counts.n_fire[other] - together
    return pa.table(
        {
            "latent": latent,
            "other": other.astype(np.int32),
            "rank": np.tile(np.arange(n, dtype=np.int16), n_latents),
            "decoder_cosine": cosines.reshape(-1),
            "cofire": together,
            "jaccard": together / np.maximum(either, 1),
        }
    )


def tokens_table(counts: Accumulator, texts: TokenTexts) -> pa.Table:
    """latent, token, text, count, mean activation; most frequent first within a latent."""
    t = counts.token_counts()
    ids = t["token"].to_numpy()
    return pa.table(
        {
            "latent": t["latent"],
            "token": t["token"],
            "text": pa.array([texts.one(i) for i in ids.tolist()]),
            "count": t["count"],
            "mean": t["total"].to_numpy() / t["count"].to_numpy(),
        }
    )


def documents_table(store: ActivationStore) -> pa.Table:
    """Every document of the store once, by number."""
    parts = [store.documents(shard) for shard in range(store.n_shards)]
    documents = pa.concat_tables(parts).sort_by("document")
    # texts stay in the store: a table that is browsed should not hold the corpus
    return documents.drop_columns([name for name in documents.column_names if name == "text"])


def bin_edge(number: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Lower edge of a histogram bin."""
    return 2.0 ** (kernels.LOWEST_OCTAVE + number / kernels.BINS_PER_OCTAVE)


def histogram_quantiles(
    histogram: npt.NDArray[np.int64], q: float, largest: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Quantile q of each latent's activations [n_latents], within one bin (19 %)."""
    cumulative = histogram.cumsum(axis=1)
    total = cumulative[:, -1]
    number = (cumulative < np.ceil(q * total)[:, None]).sum(axis=1)
    middle = np.sqrt(bin_edge(number) * bin_edge(number + 1))
    return np.where(total > 0, np.minimum(middle, largest), 0.0)


def document_split(text_hash: npt.NDArray[np.uint64]) -> npt.NDArray[np.str_]:
    """ "explain" or "score" by the text's hash: what is shown to an explainer never scores it."""
    # Other bits than those that hold documents out of training, so that the two are independent.
    turned = (text_hash << np.uint64(32)) | (text_hash >> np.uint64(32))
    return np.where(heldout_documents(turned, SCORE_FRACTION), "score", "explain")


def _context_part(
    store: ActivationStore, stratum: str, short_list: ShortList, texts: TokenTexts
) -> pa.Table:
    places = short_list.priority.shape[1]
    used = np.arange(places) < short_list.kept[:, None]
    latent, rank = np.nonzero(used)
    row = short_list.peak_row[used]
    begin = short_list.window_start[used]
    activations = short_list.windows[latent, short_list.slot[used]]  # [entries, window]
    length, window = store.context_length, activations.shape[1]
    context, position = row // length, row % length
    ids = np.empty((len(row), window), np.int32)
    split = np.empty(len(row), dtype="<U7")
    for shard in np.unique(row // store.shard_rows).tolist():
        here = np.flatnonzero(row // store.shard_rows == shard)
        first, last = store.shard_span(shard)
        tokens = store.tokens(first // length, last // length).reshape(-1)
        starts = context[here] * length + begin[here] - first
        ids[here] = tokens[starts[:, None] + np.arange(window)]
        _, text_hash = store.row_documents(shard)
        split[here] = document_split(text_hash[row[here] - first])
    pieces = [text for line in ids for text in texts.window(line)]
    return pa.table(
        {
            "latent": latent.astype(np.int32),
            "stratum": pa.array([stratum] * len(row), pa.string()),
            "rank": rank.astype(np.int16),
            "split": pa.array(split.tolist(), pa.string()),
            "activation": activations[np.arange(len(row)), position - begin],
            "row": row,
            "document": short_list.peak_document[used],
            "context": context,
            "position": position.astype(np.int32),
            "window_start": begin.astype(np.int32),
            "token_ids": _lists(pa.array(ids.reshape(-1)), ids.shape),
            "token_texts": _lists(pa.array(pieces, pa.string()), ids.shape),
            "activations": _lists(pa.array(activations.reshape(-1)), ids.shape),
        }
    )


def _token_columns(counts: Accumulator, texts: TokenTexts, config: FeatureConfig) -> dict[str, Any]:
    n_latents = len(counts.n_fire)
    t = counts.token_counts()
    latent, token, count = (t[c].to_numpy() for c in ("latent", "token", "count"))
    starts = np.searchsorted(latent, np.arange(n_latents + 1))
    lengths = np.minimum(np.diff(starts), config.n_tokens)
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(starts[:-1], lengths) + inside
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    share = count / np.maximum(counts.n_fire, 1)[latent]
    entropy = np.bincount(latent, share * np.log2(1 / share), n_latents)
    return {
        "top_tokens": pa.ListArray.from_arrays(
            offsets, pa.array([texts.one(i) for i in token[at].tolist()], pa.string())
        ),
        "top_token_shares": pa.ListArray.from_arrays(offsets, pa.array(share[at])),
        "token_entropy_bits": entropy,
    }


def _lists(flat: pa.Array, shape: tuple[int, ...]) -> pa.ListArray:
    offsets = np.arange(shape[0] + 1, dtype=np.int32) * shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def _nullable(x: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(x, mask=np.isnan(x))
