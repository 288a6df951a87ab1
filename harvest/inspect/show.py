"""A store described for a terminal: its sources, software and contents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.inspect.provenance import tokenizer_of
from sae_harvest.harvest.text.documents import CorpusSpec
from sae_harvest.store.commits import read_plan_record
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects, open_objects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.seals import read_seal, sealed_counts
from sae_harvest.store.statistics.stats import quantization_fvu

MAX_LISTED = 6  # most frequent outlier positions and tokens


def describe(place: str | Path) -> list[Table]:
    """Make one table of facts, one of the seals, and one per site."""
    store = ActivationStore.open(place)
    objects = open_objects(place)
    record = read_plan_record(objects)
    facts = Table("store", Column(str(place), overflow="fold"), box=None)
    for name, value in _origins(record["plan"], record["made_with"]).items():
        facts.add_row(name, value)
    facts.add_row("rows", f"{store.n_rows:,} ({store.n_contexts:,} × {store.context_length})")
    facts.add_row("dtype", f"{store.plan['dtype']} (computed in {store.plan['compute_dtype']})")
    facts.add_row("shards", f"{store.n_shards} of up to {store.shard_rows:,} rows")
    facts.add_row("bytes", f"{store.n_bytes:,} ({store.n_bytes / store.n_rows:,.1f} a row)")
    for digest in _seals(objects, Plan.model_validate(record["plan"])):
        facts.add_row("digest", digest)
    return [facts, *(_site(store, site) for site in store.sites)]


def _origins(plan: dict[str, Any], made_with: dict[str, str]) -> dict[str, str]:
    """Return the origin of the bytes: model, tokenizer, text, software."""
    model, tokenizer, corpus = plan["model"], plan["tokenizer"], plan["corpus"]
    revision = f", revision {model['revision']}" if model.get("revision") else ""
    options = [
        f"{name} {corpus[name]}"
        for name in ("config", "split", "revision", "text_column")
        if corpus.get(name) not in (None, CorpusSpec.model_fields[name].default)
    ]
    options += ["without duplicates"] * bool(corpus.get("dedup"))
    options += ["texts kept"] * plan["document_text"]
    software = ", ".join(f"{name} {version}" for name, version in made_with.items())
    return {
        "model": f"{model['name']}{revision}",
        "weights": str(model["weights"]),
        "tokenizer": f"xxh3 {tokenizer.get('xxh3')}, {tokenizer.get('vocabulary')} tokens",
        "corpus": ", ".join([corpus["name"], *options]),
        "fingerprint": str(corpus.get("fingerprint")),
        "made with": software or "not known: plan.json was restored from a seal",
    }


def _seals(objects: Objects, plan: Plan) -> list[str]:
    """List every digest of the store's history, the latest first."""
    seals = [read_seal(objects, plan, count) for count in reversed(sealed_counts(objects))]
    latest, *earlier = seals
    return [
        latest["digest"],
        *(f"{seal['digest']} (earlier, {seal['rows']:,} rows)" for seal in earlier),
    ]


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
    positions = Counter(s["outlier_positions"]).most_common(MAX_LISTED)
    table.add_row("their positions", ", ".join(f"{p} ({n:,})" for p, n in positions))
    tokens = Counter(s["outlier_tokens"]).most_common(MAX_LISTED)
    names = _token_names(store, [int(t) for t, _ in tokens])
    named = zip(names, tokens, strict=True)
    table.add_row("their tokens", ", ".join(f"{name} ({n:,})" for name, (_, n) in named))
    table.add_row("outlier dimensions", ", ".join(map(str, s["outlier_dimensions"])) or "none")
    table.add_row("mean norm of the mean", f"{np.linalg.norm(ordinary.mean):,.1f} (ordinary rows)")
    if "quantization_error" in s:
        fvu = quantization_fvu(s["quantization_error"], ordinary)
        text = f"{np.median(fvu):.1e} median, {fvu.max():.1e} worst FVU of a dimension"
        table.add_row("int8 error", f"{text} (ordinary rows)")
    return table


def _token_names(store: ActivationStore, ids: list[int]) -> list[str]:
    """Return the texts of token ids, or the bare ids if the tokenizer is not available."""
    try:
        tokenizer = tokenizer_of(store)
    except InputError:
        return [f"id {i}" for i in ids]
    return [repr(tokenizer.decode([i])) for i in ids]
