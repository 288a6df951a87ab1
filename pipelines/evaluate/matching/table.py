"""matches.parquet: a pair of latents of two dictionaries with its class.

OUT/matches.parquet         the pairs
OUT/disagreements.parquet   rows on which a pair disagrees, with the text around them
OUT/matches.json            the two dictionaries, the rows, what became of the latents
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from sae_harvest.common.errors import RunError
from sae_harvest.common.parsing import first_line
from sae_harvest.pipelines.evaluate.matching.classes import (
    ABSORBED,
    CHILD_A,
    CHILD_B,
    CHILDREN,
    CLASSES,
    MERGED,
    NONE,
    SPLIT,
    Pairs,
)
from sae_harvest.pipelines.evaluate.matching.common import Side
from sae_harvest.pipelines.evaluate.matching.joint import Ints, Joint
from sae_harvest.pipelines.evaluate.matching.sets import Sets
from sae_harvest.pipelines.features.tables.folder import read_record

MATCHES, DISAGREEMENTS, RECORD_FILE = "matches", "disagreements", "matches.json"
FORMAT = "1"
MATCHES_SCHEMA = pa.schema(
    [
        ("latent_a", pa.int32()),
        ("latent_b", pa.int32()),
        ("class", pa.string()),
        ("child", pa.string()),
        ("both_fire", pa.int64()),
        ("a_only", pa.int64()),
        ("b_only", pa.int64()),
        ("coverage", pa.float64()),
        ("precision", pa.float64()),
        ("jaccard", pa.float64()),
        ("decoder_cosine", pa.float32()),
        ("gain", pa.int64()),
        ("set_coverage", pa.float64()),
        ("set_precision", pa.float64()),
        ("parent", pa.int32()),
        ("parent_silent", pa.int64()),
        ("parent_cosine", pa.float32()),
    ]
)
DISAGREEMENTS_SCHEMA = pa.schema(
    [
        ("pair", pa.int64()),
        ("latent_a", pa.int32()),
        ("latent_b", pa.int32()),
        ("class", pa.string()),
        ("child", pa.string()),
        ("kind", pa.string()),
        ("rank", pa.int16()),
        ("row", pa.int64()),
        ("context", pa.int64()),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("window_start", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_ends", pa.list_(pa.int32())),
        ("activations_a", pa.list_(pa.float32())),
        ("activations_b", pa.list_(pa.float32())),
        ("text", pa.string()),
    ]
)
SCHEMAS = {MATCHES: MATCHES_SCHEMA, DISAGREEMENTS: DISAGREEMENTS_SCHEMA}


class SideRecord(BaseModel):
    """One of the two dictionaries in matches.json: where its tables were, and their origin."""

    model_config = ConfigDict(extra="allow")

    features: str
    sae: str
    sae_digest: str
    store: str
    store_digest: str
    site: str
    model: str
    n_latents: int


class Record(BaseModel):
    """matches.json: the two dictionaries, the rows, and what became of the latents by class."""

    model_config = ConfigDict(extra="allow")

    matches: str
    rows: int
    overlap: float
    latents: dict[str, dict[str, int]]
    a: SideRecord
    b: SideRecord


COSINES = 1 << 14  # pairs whose cosines are computed at a time


def matches_table(joint: Joint, of_a: Sets, of_b: Sets, pairs: Pairs, a: Side, b: Side) -> pa.Table:
    """Make the table of pairs."""
    n_a, n_b = _fired(joint.n_a, pairs.a), _fired(joint.n_b, pairs.b)
    either = n_a + n_b - pairs.both
    owner = np.where(pairs.kind == SPLIT, pairs.a, pairs.b)
    coverage, precision = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
    for kind, sets, fired in ((SPLIT, of_a, joint.n_a), (MERGED, of_b, joint.n_b)):
        here = pairs.kind == kind
        covered, union = sets.covered[owner[here]], sets.union[owner[here]]
        coverage[here], precision[here] = covered / fired[owner[here]], covered / union
    return pa.Table.from_pydict(
        {
            "latent_a": _nullable(pairs.a, pa.int32()),
            "latent_b": _nullable(pairs.b, pa.int32()),
            "class": pa.array(CLASSES).take(pa.array(pairs.kind)),
            "child": pa.array(CHILDREN, pa.string()).take(pa.array(pairs.child)),
            "both_fire": pairs.both,
            "a_only": n_a - pairs.both,
            "b_only": n_b - pairs.both,
            "coverage": _share(pairs.both, n_a),
            "precision": _share(pairs.both, n_b),
            "jaccard": _share(pairs.both, either),
            "decoder_cosine": _cosines(a, b, pairs),
            "gain": _nullable(pairs.gain, pa.int64()),
            "set_coverage": pa.array(coverage, mask=np.isnan(coverage)),
            "set_precision": pa.array(precision, mask=np.isnan(precision)),
            "parent": _nullable(pairs.parent, pa.int32()),
            "parent_silent": _nullable(pairs.parent_silent, pa.int64()),
            "parent_cosine": _parent_cosines(a, b, pairs),
        },
        MATCHES_SCHEMA,
    )


def record(joint: Joint, a: Side, b: Side, counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Return the content of matches.json."""
    found: dict[str, Any] = {
        "matches": FORMAT,
        "rows": joint.n_rows,
        "overlap": joint.overlap,
        "latents": counts,
    }
    for name, side in (("a", a), ("b", b)):
        keys = ("sae", "sae_digest", "store", "store_digest", "site", "model", "n_latents")
        place = {"features": str(side.features.absolute())}
        found[name] = place | {key: side.run[key] for key in keys}
    return found


def read_matches_record(folder: Path) -> dict[str, Any]:
    """Read matches.json.

    Raises:
        RunError: the folder holds no matches, damaged ones, or ones of another format.
    """
    found = read_record(folder / RECORD_FILE)
    if found is None:
        raise RunError(
            f"{folder} holds no matches (no {RECORD_FILE} there); give the folder that "
            "`sae-features diff --out` wrote."
        )
    if found.get("matches") != FORMAT:
        raise RunError(
            f"{folder} holds matches of format {found.get('matches')!s:.20}, this version reads "
            f"{FORMAT}; run `sae-features diff` again into another folder."
        )
    try:
        return Record.model_validate(found).model_dump()
    except ValidationError as error:
        raise RunError(
            f"{folder / RECORD_FILE} is damaged ({first_line(error)}); run `sae-features diff` "
            "again into another folder."
        ) from None


def _fired(fired: Ints, latents: Ints) -> Ints:
    """Return the rows on which each latent fires, 0 for none [pairs]."""
    return np.where(latents == NONE, 0, fired[latents])


def _share(part: Ints, whole: Ints) -> pa.Array:
    return pa.array(part / np.maximum(whole, 1), mask=whole == 0)


def _nullable(values: Ints, kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind, mask=values == NONE)


def _cosines(a: Side, b: Side, pairs: Pairs) -> pa.Array:
    """Return cosines of decoder rows, float32 [pairs]; null without them or of other widths."""
    found = np.full(len(pairs), np.nan, np.float32)
    if a.sae is not None and b.sae is not None and a.sae.W_dec.shape[1] == b.sae.W_dec.shape[1]:
        mine, other = (_unit(side.sae.W_dec.numpy()) for side in (a, b) if side.sae is not None)
        known = np.flatnonzero((pairs.a != NONE) & (pairs.b != NONE))
        for first in range(0, len(known), COSINES):
            some = known[first : first + COSINES]
            found[some] = np.einsum("pd,pd->p", mine[pairs.a[some]], other[pairs.b[some]])
    return pa.array(found, mask=np.isnan(found))


def _parent_cosines(a: Side, b: Side, pairs: Pairs) -> pa.Array:
    """Return cosines of the decoder rows of child and parent, float32 [pairs]; null without."""
    found = np.full(len(pairs), np.nan, np.float32)
    for side, number, latents in ((a, CHILD_A, pairs.a), (b, CHILD_B, pairs.b)):
        here = (pairs.kind == ABSORBED) & (pairs.child == number)
        if side.sae is not None:
            unit = _unit(side.sae.W_dec.numpy())
            found[here] = np.einsum("pd,pd->p", unit[latents[here]], unit[pairs.parent[here]])
    return pa.array(found, mask=np.isnan(found))


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    unit: npt.NDArray[np.float32] = rows / np.maximum(
        np.linalg.norm(rows, axis=1, keepdims=True), 1e-12
    )
    return unit
