"""The comparison of two dictionaries by the rows on which their latents fire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.models import (
    load_tokenizer,
    resolve_model,
    tokenizer_fingerprint,
)
from sae_harvest.pipelines.evaluate.matching import table
from sae_harvest.pipelines.evaluate.matching.classes import ABSORBED, classed, fates
from sae_harvest.pipelines.evaluate.matching.common import Side, common_rows
from sae_harvest.pipelines.evaluate.matching.disagreement import (
    disagreement_tables,
    disagreements,
)
from sae_harvest.pipelines.evaluate.matching.joint import MIN_FIRINGS, OVERLAP, joint_counts
from sae_harvest.pipelines.evaluate.matching.sets import set_counts
from sae_harvest.pipelines.evaluate.matching.spans import Spans
from sae_harvest.pipelines.exports.files import new_folder
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.pipelines.features.tables.writers import TableWriter
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.run.files import write_json

OnProgress = Callable[[str, int, int], None]  # phase, amount done, amount in all


@dataclass(frozen=True)
class Diff:
    """The result of a comparison."""

    record: dict[str, Any]
    """Content of matches.json."""

    pairs: dict[str, int]
    """Number of pairs of each class."""

    absorbing: int
    """Number of latents, of both dictionaries, that are silent where a narrower one fires."""

    cosine: float | None
    """Median cosine of the decoder rows of `same` pairs; None if it is not known."""


def diff(
    features_a: Path,
    features_b: Path,
    out: Path,
    overlap: float = OVERLAP,
    moved: Locations = NOTHING_MOVED,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Diff:
    """Compare the latents of two dictionaries over all rows that both of them read.

    Writes matches.parquet, disagreements.parquet and matches.json into `out`; see docs/diff.md.

    Args:
        features_a, features_b: folders of feature tables, made from one store or from stores of the
            same tokens.
        out: new folder.
        overlap: share of a latent's rows that counts as most of them, above 0, at most 1.
        moved: new places of SAEs, stores and models, if they have moved.
        on_progress: called with the phase, the amount done and the amount in all.

    Raises:
        InputError: the tables' rows are not the same, or the tokenizer is missing.
        RunError: tables, an SAE or a store are missing or damaged, or `out` cannot be written.
    """
    a, b = Side.open(features_a, moved), Side.open(features_b, moved)
    rows = common_rows(a, b)
    texts = texts_of(a.store, moved)
    spans = Spans(rows)
    with new_folder(out) as folder:
        joint = joint_counts(spans, overlap, lambda *n: on_progress("counting joint firings", *n))
        of_a, of_b = set_counts(spans, joint, lambda *n: on_progress("counting sets", *n))
        pairs = classed(joint, of_a, of_b)
        with TableWriter(folder / f"{table.MATCHES}.parquet") as writer:
            matches = table.matches_table(joint, of_a, of_b, pairs, a, b)
            writer.add(matches)
        found = disagreements(spans, pairs)
        done = 0
        with TableWriter(folder / f"{table.DISAGREEMENTS}.parquet") as writer:
            for part in disagreement_tables(spans, pairs, found, a.store, texts):
                writer.add(part)
                done += len(part)
                on_progress("reading contexts", done, len(found))
        record = table.record(joint, a, b, asdict(fates(joint, pairs)))
        write_json(folder / table.RECORD_FILE, record)
    names = [table.CLASSES[kind] for kind in pairs.kind.tolist()]
    absorbed = pairs.kind == ABSORBED
    parents = set(zip(pairs.child[absorbed].tolist(), pairs.parent[absorbed].tolist(), strict=True))
    same = matches.filter(pc.equal(matches["class"], "same"))["decoder_cosine"].drop_null()
    return Diff(
        record,
        {name: names.count(name) for name in table.CLASSES},
        len(parents),
        float(np.median(same.to_numpy())) if len(same) else None,
    )


def texts_of(store: ActivationStore, moved: Locations) -> TokenTexts:
    """Return the texts of a store's tokens.

    Raises:
        InputError: the tokenizer is missing, or another than that of the harvest.
    """
    planned = store.plan["model"]
    name = moved.models[0] if moved.models else planned["name"]
    resolved = resolve_model(name, None if moved.models else planned.get("revision"))
    tokenizer = load_tokenizer(resolved)
    if tokenizer_fingerprint(tokenizer) != store.plan["tokenizer"].get("xxh3"):
        raise InputError(
            f"The tokenizer of {resolved.name} is not the tokenizer that {store.place} was "
            "harvested with; put the old one back, or say where it is with --model."
        )
    return TokenTexts(tokenizer)


def summary(found: Diff) -> list[str]:
    """Return the lines that describe a comparison to someone who reads one for the first time."""
    record, pairs = found.record, found.pairs
    a, b = record["latents"]["a"], record["latents"]["b"]
    lines = [
        f"A  {record['a']['features']}: {record['a']['n_latents']:,} latents",
        f"B  {record['b']['features']}: {record['b']['n_latents']:,} latents",
        f"{record['rows']:,} rows are read by both.",
        "",
        f"{'':10}{'A':>8}{'B':>8}",
    ]
    for name, sentence in _SENTENCES.items():
        counts = "".join(f"{side[name]:8,}" if name in side else f"{'':8}" for side in (a, b))
        lines.append(f"{name:10}{counts}  {sentence.format(pairs=pairs.get(name, 0))}")
    lines += [
        "",
        "A latent is counted once, in the first of these that it belongs to. Most rows are at "
        f"least {record['overlap']:.0%} of them.",
    ]
    if found.cosine is not None:
        lines.append(
            f"The decoder rows of `same` pairs have a median cosine of {found.cosine:.2f}."
        )
    if found.absorbing:
        lines.append(
            f"{found.absorbing:,} latents with a partner are silent on rows where a narrower "
            f"latent fires in their place ({pairs['absorbed']:,} absorbed pairs)."
        )
    return lines


_SENTENCES = {
    "same": "each fires on most rows of the other ({pairs:,} pairs)",
    "split": "in A: several latents of B share its rows; in B: it is one of them ({pairs:,} pairs)",
    "merged": "in A: one of several that share the rows of a latent of B; in B: that latent "
    "({pairs:,} pairs)",
    "absorbed": "narrow, and fires in place of a broader latent that should fire too",
    "died": "no latent of B, and no set of them, has most of its rows",
    "born": "no latent of A, and no set of them, has most of its rows",
    "rare": f"fires on fewer than {MIN_FIRINGS} of the rows, too few to compare",
    "dead": "never fires on these rows",
}
