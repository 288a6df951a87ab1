"""Feature tables made by hand, in the format of docs/tables.md: no model, no store, no SAE.

Latent `l` fires on the word `word_of(l)`; everything else follows from that and from a seed. The
numbers agree with each other where a test could look (texts are joined tokens, the strongest
context is the maximum), but nothing was counted from anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae_harvest.train.config import SAEConfig
from sae_harvest.train.sae.sae import SAE

ROW_GROUP = 2048
CONTEXT_LENGTH = 128
WORDS = (
    " court", " river", " goals", " bank", " senator", " café", " 東京", " police", " winter",
    " children", " market", " oil", " guitar", " vaccine", " vote", " court's",
)  # fmt: skip
FILLERS = (" the", " a", " of", " and", " in", ",", ".", " was", " said", " that", "\n", " it")
STRATA = (
    ("top", 10),
    *((f"decile_{d}", 2) for d in range(1, 11)),
    ("random", 4),
    ("inactive", 3),
    ("hard_negative", 3),
)  # 40 contexts a latent
HOSTILE_LATENT = 3
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "\u202edetrevni si siht\u202c",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇪🇺",
    "a\x00b\x1b[31mred\x07",
    "{{7*7}} ${7*7} '; DROP TABLE latents; --",
    "</style><style>body{display:none}",
)
HOSTILE_URL = "javascript:window.hacked=1"
WINDOW_START = 32


def word_of(latent: int) -> str:
    """The token on which a latent fires."""
    return WORDS[latent % len(WORDS)]


def write_tables(
    folder: Path,
    n_latents: int = 48,
    window: int = 24,
    n_documents: int = 60,
    seed: int = 0,
    hostile: bool = False,
    **ancestry: str,
) -> Path:
    """Write every table and run.json into `folder`; the last latent is dead.

    Args:
        ancestry: what run.json says of store and SAE, where it matters.
        hostile: latent `HOSTILE_LATENT` fires on `HOSTILE`, document 0 is hostile too.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    live = np.arange(n_latents - 1)
    n_fire = np.append(rng.integers(40, 5000, n_latents - 1), 0)
    peak = np.append(np.round(rng.uniform(2, 30, n_latents - 1), 2), 0)
    n_rows = 200_000
    for name, table in {
        "latents": _latents(rng, n_latents, n_fire, peak, n_rows),
        "histograms": _histograms(n_fire, peak),
        "neighbours": _neighbours(rng, n_latents),
        "tokens": _tokens(live, n_fire, peak),
        "documents": _documents(n_documents, hostile),
    }.items():
        _write(folder, name, table)
    _write_contexts(folder, rng, live, peak, window, n_documents, hostile)
    (folder / "firings").mkdir()
    firing = pa.table(
        {
            "latent": pa.array(live, pa.int32()),
            "row": pa.array(live * 100, pa.int64()),
            "value": pa.array(peak[:-1], pa.float32()),
        }
    )
    pq.write_table(firing, folder / "firings" / "000000.parquet")
    (folder / "run.json").write_text(run_json(n_latents, n_rows, seed, **ancestry))
    return folder


def run_json(n_latents: int, n_rows: int = 200_000, seed: int = 0, **ancestry: str) -> str:
    """run.json of tables; ancestry: what it says of store and SAE, where it matters."""
    run = {
        "tables": "3",
        "store": "/nowhere/store",
        "store_digest": f"{seed:032x}",
        "sae": "/nowhere/sae",
        "sae_digest": f"{seed:032x}",
        "site": "resid_post.1",
        "model": "made-up",
        "n_latents": n_latents,
        "context_length": CONTEXT_LENGTH,
        "rows": "all documents",
        "config": {"seed": seed},
        "code": "0.1.0",
        "n_rows": n_rows,
        "cofire_rows": n_rows,
    }
    return json.dumps(run | ancestry, indent=2) + "\n"


def write_sae(folder: Path, n_latents: int, width: int = 16, seed: int = 0) -> SAE:
    """An SAE with random unit decoder rows."""
    config = SAEConfig.model_validate(
        {"n_latents": n_latents, "d_in": width, "k": 4, "site": "resid_post.1"}
    )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_latents, width, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    sae = SAE(config, rows.clone(), rows, torch.zeros(n_latents), torch.zeros(width))
    sae.save(folder)
    return sae


def _write(folder: Path, name: str, table: pa.Table) -> None:
    table = table.replace_schema_metadata({b"sae_harvest_tables": b"3"})
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=ROW_GROUP)


def _latents(
    rng: np.random.Generator, n: int, n_fire: np.ndarray, peak: np.ndarray, n_rows: int
) -> pa.Table:
    alive = n_fire > 0
    words = [[word_of(i), FILLERS[i % len(FILLERS)]] if alive[i] else [] for i in range(n)]
    speaks = [f" w{i}" for i in range(20)]
    logits = np.sort(rng.normal(2, 1, 20))[::-1].astype(np.float32)

    def stat(values: Any) -> pa.Array:  # nothing is known of a latent that never fires
        return pa.array(np.broadcast_to(values, n).astype(np.float64), mask=~alive)

    columns: dict[str, Any] = {
        "latent": pa.array(np.arange(n), pa.int32()),
        "n_fire": pa.array(n_fire, pa.int64()),
        "density": n_fire / n_rows,
        "n_contexts": pa.array(n_fire // 2, pa.int64()),
        "context_density": n_fire / 2 / (n_rows / CONTEXT_LENGTH),
        "dead": ~alive,
        "max": stat(peak),
        "mean": stat(peak * 0.3),
        "std": stat(peak * 0.2),
        "skew": stat(1.2),
        "kurtosis": stat(rng.uniform(2, 9, n)),
        "bimodality": stat(rng.uniform(0.2, 0.8, n)),
        "mean_square": n_fire / n_rows * (peak * 0.36) ** 2,
        **{f"q{q}": stat(peak * q / 100) for q in (10, 25, 50, 75, 90, 99)},
        "n_tokens": pa.array(np.where(alive, 2, 0), pa.int32()),
        "token_entropy_bits": stat(rng.uniform(0, 6, n)),
        "top_tokens": pa.array(words, pa.list_(pa.string())),
        "top_token_counts": pa.array(
            [[int(f * 0.7), int(f * 0.3)] if f else [] for f in n_fire], pa.list_(pa.int64())
        ),
        "strongest_tokens": pa.array(words, pa.list_(pa.string())),
        "strongest_token_means": pa.array(
            [[p * 0.5, p * 0.2] if p else [] for p in peak.tolist()], pa.list_(pa.float32())
        ),
        "position_profile": pa.array([[1 / 16] * 16] * n, pa.list_(pa.float32())),
        "encoder_norm": pa.array(np.ones(n), pa.float32()),
        "decoder_norm": pa.array(np.ones(n), pa.float32()),
        "encoder_decoder_cosine": pa.array(rng.uniform(0.3, 0.95, n), pa.float32()),
        "encoder_bias": pa.array(rng.normal(0, 1, n), pa.float32()),
        "top_logit_tokens": pa.array([speaks] * n, pa.list_(pa.string())),
        "top_logits": pa.array([logits] * n, pa.list_(pa.float32())),
        "bottom_logit_tokens": pa.array([speaks[::-1]] * n, pa.list_(pa.string())),
        "bottom_logits": pa.array([-logits] * n, pa.list_(pa.float32())),
    }
    return pa.table(columns)


def _histograms(n_fire: np.ndarray, peak: np.ndarray) -> pa.Table:
    """Five bins a latent, the last one with the maximum; the counts add up to n_fire."""
    rows = []
    for latent, (count, top) in enumerate(zip(n_fire.tolist(), peak.tolist(), strict=True)):
        if not count:
            continue
        last = int(np.floor((np.log2(top) + 12) * 16))
        shares = [count * s // 100 for s in (40, 30, 20, 5)]
        counts = [*shares, count - sum(shares)]
        for bin_, n in zip(range(last - 64, last + 1, 16), counts, strict=True):
            rows.append((latent, bin_, 2.0 ** (bin_ / 16 - 12), 2.0 ** ((bin_ + 1) / 16 - 12), n))
    latent, number, low, high, n = (np.array(column) for column in zip(*rows, strict=True))
    return pa.table(
        {
            "latent": pa.array(latent, pa.int32()),
            "bin": pa.array(number, pa.int16()),
            "low": low,
            "high": high,
            "count": pa.array(n, pa.int64()),
        }
    )


def _neighbours(rng: np.random.Generator, n: int) -> pa.Table:
    """Twenty others a latent: ten near by cosine, ten by firing together."""
    steps = np.arange(1, 21)
    latent = np.repeat(np.arange(n), 20)
    other = (latent + np.tile(steps, n)) % n
    order = np.lexsort((other, latent))
    rank = np.tile(np.arange(20), n)[order]
    by_cosine = rank < 10
    cosine = np.where(by_cosine, 0.9 - rank * 0.05, 0.1)
    jaccard = np.where(by_cosine, 0.01, 0.5 - (rank - 10) * 0.04)
    return pa.table(
        {
            "latent": pa.array(latent[order], pa.int32()),
            "other": pa.array(other[order], pa.int32()),
            "decoder_cosine": pa.array(cosine, pa.float32()),
            "cofire": pa.array((jaccard * 1000).astype(int), pa.int64()),
            "jaccard": jaccard,
            "cosine_rank": pa.array(rank, pa.int16(), mask=~by_cosine),
            "cofire_rank": pa.array(rank - 10, pa.int16(), mask=by_cosine),
        }
    )


def _tokens(live: np.ndarray, n_fire: np.ndarray, peak: np.ndarray) -> pa.Table:
    first, second = live % len(WORDS), len(WORDS) + live % len(FILLERS)
    token = np.concatenate([first, second])
    latent = np.concatenate([live, live])
    count = np.concatenate([n_fire[live] * 7 // 10, n_fire[live] * 3 // 10])
    order = np.lexsort((latent, -count, token))
    texts = np.array([*WORDS, *FILLERS])
    return pa.table(
        {
            "token": pa.array(token[order], pa.int32()),
            "text": pa.array(texts[token[order]].tolist()),
            "latent": pa.array(latent[order], pa.int32()),
            "count": pa.array(count[order], pa.int64()),
            "mean": pa.array(peak[latent[order]] * 0.4, pa.float32()),
            "share": pa.array((count / n_fire[latent])[order], pa.float32()),
        }
    )


def _documents(n: int, hostile: bool) -> pa.Table:
    titles = [f"Story {i}" for i in range(n)]
    urls = [f"https://example.org/{i}" if i % 3 else None for i in range(n)]
    if hostile:
        titles[0], urls[0] = HOSTILE[0], HOSTILE_URL
    return pa.table(
        {
            "document": pa.array(range(n), pa.int64()),
            "source": ["made-up"] * n,
            "title": titles,
            "url": urls,
        }
    )


def _write_contexts(
    folder: Path,
    rng: np.random.Generator,
    live: np.ndarray,
    peak: np.ndarray,
    window: int,
    n_documents: int,
    hostile: bool,
) -> None:
    """In pieces of 256 latents, which are whole row groups of the file."""
    writer = None
    for first in range(0, len(live), 256):
        table = _contexts(rng, live[first : first + 256], peak, window, n_documents, hostile)
        table = table.replace_schema_metadata({b"sae_harvest_tables": b"3"})
        writer = writer or pq.ParquetWriter(folder / "contexts.parquet", table.schema)
        writer.write_table(table, row_group_size=ROW_GROUP)
    assert writer is not None
    writer.close()


def _contexts(
    rng: np.random.Generator,
    latents: np.ndarray,
    peak: np.ndarray,
    window: int,
    n_documents: int,
    hostile: bool,
) -> pa.Table:
    strata = [name for name, n in STRATA for _ in range(n)]
    ranks = [rank for _, n in STRATA for rank in range(n)]
    levels = np.array([_level(s, r) for s, r in zip(strata, ranks, strict=True)])
    n = len(latents) * len(strata)
    latent = np.repeat(latents, len(strata))
    activation = (peak[latent] * np.tile(levels, len(latents))).astype(np.float32)
    at = rng.integers(window // 4, window // 2, n)  # place of the peak in the window
    ids = rng.integers(len(WORDS), len(WORDS) + len(FILLERS), (n, window)).astype(np.int32)
    fires = activation > 0
    rows = np.arange(n)
    ids[rows[fires], at[fires]] = latent[fires] % len(WORDS)
    activations = np.zeros((n, window), np.float32)
    activations[rows, at] = activation
    activations[rows, at + 1] = activation / 4
    vocabulary = np.array([*WORDS, *FILLERS], dtype=object)
    texts = vocabulary[ids]
    document = rng.integers(0, n_documents, n)
    if hostile:
        for number, row in enumerate(np.flatnonzero(latent == HOSTILE_LATENT)):
            texts[row, at[row]] = HOSTILE[number % len(HOSTILE)]
            document[row] = 0 if number % 2 else document[row]
    context = rng.integers(0, 1000, n)
    position = WINDOW_START + at
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * window)
    lengths = [[len(text) for text in line] for line in texts]

    def lists(flat: np.ndarray, kind: pa.DataType) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(flat.reshape(-1), kind))

    reasons = [["token", "neighbour"][r % 2] if s == "hard_negative" else None
               for s, r in zip(strata, ranks, strict=True)]  # fmt: skip
    return pa.table(
        {
            "latent": pa.array(latent, pa.int32()),
            "stratum": pa.array(strata * len(latents)),
            "rank": pa.array(ranks * len(latents), pa.int16()),
            "reason": pa.array(reasons * len(latents), pa.string()),
            "split": pa.array(["explain", "score"] * (n // 2)),
            "activation": pa.array(activation),
            "row": pa.array(context * CONTEXT_LENGTH + position, pa.int64()),
            "context": pa.array(context, pa.int64()),
            "document": pa.array(document, pa.int64()),
            "position": pa.array(position, pa.int32()),
            "window_start": pa.array(np.full(n, WINDOW_START), pa.int32()),
            "token_ids": lists(ids, pa.int32()),
            "token_ends": lists(np.cumsum(lengths, axis=1), pa.int32()),
            "activations": lists(activations, pa.float32()),
            "text": pa.array(["".join(line) for line in texts.tolist()]),
        }
    )


def _level(stratum: str, rank: int) -> float:
    """Share of the maximum that a context of this stratum reaches."""
    if stratum in ("inactive", "hard_negative"):
        return 0.0
    if stratum == "top":
        return 1 - rank / 20
    return int(stratum.removeprefix("decile_")) / 20 if stratum != "random" else 0.3
