"""A store described for a terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from rich.table import Column, Table

from harvest.models import load_tokenizer, resolve_model
from store.errors import SaeHarvestError
from store.reader import ActivationStore

SHOWN = 6  # most frequent outlier positions and tokens


def describe(path: Path) -> list[Table]:
    """One table of facts and one per site."""
    store = ActivationStore.open(path)
    plan = store.plan
    facts = Table("store", Column(str(path), overflow="fold"), box=None)
    facts.add_row("model", str(plan["model"]["name"]))
    facts.add_row("corpus", str(plan["corpus"]["name"]))
    facts.add_row("rows", f"{store.n_rows:,} ({store.n_contexts:,} × {store.context_length})")
    facts.add_row("dtype", f"{plan['dtype']} (computed in {plan['compute_dtype']})")
    facts.add_row("shards", f"{store.n_shards} of up to {store.shard_rows:,} rows")
    facts.add_row("bytes", f"{store.n_bytes:,} ({store.n_bytes / store.n_rows:,.1f} a row)")
    facts.add_row("digest", store.digest)
    return [facts, *(_site(store, site) for site in store.sites)]


def _site(store: ActivationStore, site: str) -> Table:
    s = store.statistics(site)
    ordinary, every = s["ordinary"], s["all"]
    table = Table(site, Column(f"{store.width(site)} wide", overflow="fold"), box=None)
    quantiles = ", ".join(f"{q}: {v:,.1f}" for q, v in s["norm_quantiles"].items())
    table.add_row("norm quantiles", quantiles)
    table.add_row("largest norm", f"{s['norm_max']:,.1f}")
    share = s["outlier"].rows / every.rows
    table.add_row("outlier rows", f"{s['outlier'].rows:,} ({share:.2%}), {s['outlier_rule']}")
    without, total = ordinary.variance.sum(), every.variance.sum()
    table.add_row("variance", f"{total:,.0f} with outlier rows, {without:,.0f} without")
    positions = Counter(s["outlier_positions"]).most_common(SHOWN)
    table.add_row("their positions", ", ".join(f"{p} ({n:,})" for p, n in positions))
    tokens = Counter(s["outlier_tokens"]).most_common(SHOWN)
    names = _token_names(store, [int(t) for t, _ in tokens])
    named = zip(names, tokens, strict=True)
    table.add_row("their tokens", ", ".join(f"{name} ({n:,})" for name, (_, n) in named))
    table.add_row("outlier dimensions", ", ".join(map(str, s["outlier_dimensions"])) or "none")
    table.add_row("mean norm of the mean", f"{np.linalg.norm(ordinary.mean):,.1f} (ordinary rows)")
    return table


def _token_names(store: ActivationStore, ids: list[int]) -> list[str]:
    """Texts of token ids; the bare ids where the model is not at hand any more."""
    try:
        tokenizer = load_tokenizer(resolve_model(store.plan["model"]["name"]))
    except SaeHarvestError:
        return [f"id {i}" for i in ids]
    return [repr(tokenizer.decode([i])) for i in ids]
