"""Scaling laws of a sweep: the fits, and the files with their results.

OUT/scaling.parquet   every point, with the prediction of each law
OUT/fits.json         parameters with intervals, R^2
OUT/*.png             plots (`train.scaling.plots`)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.atomic import new_folder, replacing
from sae_harvest.common.errors import InputError
from sae_harvest.common.paths import exact_file
from sae_harvest.train.run.files import write_json
from sae_harvest.train.scaling.envelope import Envelope, envelope
from sae_harvest.train.scaling.laws import JointLaw, PowerLaw
from sae_harvest.train.scaling.least_squares import DRAWS, Fit, fit
from sae_harvest.train.scaling.points import RunPoint

MIN_SIZES = 4  # three parameters and one to spare
MIN_K, MIN_PAIRS = 3, 8  # for L(n, k), which has six parameters
MIN_INNER = 6  # points of an envelope
TABLE_FILE, FITS_FILE = "scaling.parquet", "fits.json"
LATENTS, JOINT, COMPUTE = "L(n)", "L(n,k)", "L(C)"


@dataclass(frozen=True)
class Size:
    """All runs with one n_latents and k."""

    n_latents: int
    """Number of latents."""
    k: int
    """Active latents per row."""
    fvu: float
    """Geometric mean FVU of the runs."""


@dataclass(frozen=True)
class Scaling:
    """All fits of a sweep."""

    points: list[RunPoint]
    """The runs that were used."""
    sizes: list[Size]
    """The sizes to which the laws of latents were fitted."""
    by_k: dict[int, Fit]
    """k → L(n), for each k with enough sizes."""
    joint: Fit | None
    """L(n, k)."""
    envelopes: dict[int, Envelope]
    """k → envelope of the training curves."""
    compute: dict[int, Fit]
    """k → L(C), for each k with enough points."""
    left_out: dict[str, str]
    """Missing law → the reason."""
    doubts: list[str]
    """Reasons to doubt a law."""


def analyse(points: Sequence[RunPoint], draws: int = DRAWS, seed: int = 0) -> Scaling:
    """Fit every law that the runs allow.

    Runs of one n_latents and k with several seeds are averaged (ln FVU): their deviations from a
    law are correlated, so separate points would make its intervals too narrow. Only the best
    learning rate of each n_latents and k counts.

    Raises:
        InputError: too few sizes for any law.
    """
    points = best_rates(points)
    groups: dict[tuple[int, int], list[float]] = defaultdict(list)
    for point in points:
        groups[point.n_latents, point.k].append(np.log(point.fvu))
    sizes = [Size(n, k, float(np.exp(np.mean(logs)))) for (n, k), logs in sorted(groups.items())]
    per_k: dict[int, list[Size]] = defaultdict(list)
    for size in sizes:
        per_k[size.k].append(size)
    enough = {k: group for k, group in sorted(per_k.items()) if len(group) >= MIN_SIZES}
    if not enough:
        most = max(per_k, key=lambda k: len(per_k[k]))
        raise InputError(
            f"A scaling law needs runs of at least {MIN_SIZES} values of n_latents at one k; "
            f"there are {len(per_k[most])} at k {most}; add sizes to the sweep and run it again."
        )
    left_out: dict[str, str] = {}
    by_k = {
        k: fit(PowerLaw(_array(size.n_latents for size in group)), _losses(group), draws, seed)
        for k, group in enough.items()
    }
    joint = None
    if len(per_k) >= MIN_K and len(sizes) >= MIN_PAIRS:
        pairs = np.array([(size.n_latents, size.k) for size in sizes], float)
        joint = fit(JointLaw(pairs), _losses(sizes), draws, seed)
    else:
        left_out[JOINT] = (
            f"needs {MIN_K} values of k and {MIN_PAIRS} pairs of n_latents and k, found "
            f"{len(per_k)} and {len(sizes)}"
        )
    envelopes, compute = {}, {}
    for k in enough:
        envelopes[k] = found = envelope([point for point in points if point.k == k])
        inner = int(found.inner.sum())
        if inner < MIN_INNER:
            left_out[f"{COMPUTE} at k {k}"] = (
                f"needs {MIN_INNER} half octaves of compute in which the best size is neither "
                f"the smallest nor the largest, found {inner}"
            )
            continue
        compute[k] = fit(PowerLaw(found.flops[found.inner]), found.fvu[found.inner], draws, seed)
    doubts = [doubt for k, group in enough.items() for doubt in _doubts(k, group)]
    return Scaling(list(points), sizes, by_k, joint, envelopes, compute, left_out, doubts)


def _doubts(k: int, group: Sequence[Size]) -> list[str]:
    """Whether the larger SAEs saw too few rows for the fit to describe the effect of size."""
    best = min(group, key=lambda size: size.fvu)
    if best == group[-1]:
        return []
    return [
        f"at k {k} the loss is least at {best.n_latents} latents, not at {group[-1].n_latents}: "
        "the larger sizes have not seen enough rows, so these laws describe the training and not "
        "the size; train on more tokens"
    ]


def best_rates(points: Sequence[RunPoint]) -> list[RunPoint]:
    """Return the runs with the best learning rate for their n_latents and k."""
    losses: dict[tuple[int, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        losses[point.n_latents, point.k][point.lr].append(np.log(point.fvu))
    best = {
        pair: min(rates, key=lambda lr: float(np.mean(rates[lr]))) for pair, rates in losses.items()
    }
    return [point for point in points if point.lr == best[point.n_latents, point.k]]


def _array(values: Any) -> Any:
    return np.array(list(values), float)


def _losses(sizes: Sequence[Size]) -> Any:
    return _array(size.fvu for size in sizes)


def fits(scaling: Scaling) -> dict[str, Any]:
    """Return the content of fits.json: each law's parameters, intervals and R^2."""
    found: dict[str, Any] = {
        "loss": "held-out FVU without outliers; L(C): FVU of training batches before their step",
        "intervals": "parametric bootstrap, scale of the deviations drawn as in Student's t",
        "laws": [{"law": LATENTS, "form": "e + a n^-b", "k": k} | law.to_json()
                 for k, law in scaling.by_k.items()],
        "left_out": scaling.left_out,
        "doubts": scaling.doubts,
    }  # fmt: skip
    if scaling.joint is not None:
        form = "exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)"
        found["laws"].append({"law": JOINT, "form": form, "k": None} | scaling.joint.to_json())
    for k, law in scaling.compute.items():
        found["laws"].append(
            {"law": COMPUTE, "form": "e + a C^-b, C in FLOPs", "k": k} | law.to_json()
        )
    return found


def table(scaling: Scaling) -> pa.Table:
    """Return all points: one row per run (kind "run"), then those of envelopes (kind "envelope").

    The columns predicted_n, predicted_nk and predicted_c hold the FVU that L(n), L(n, k) and L(C)
    predict. A column is null where that law was not fitted.
    """
    rows: list[dict[str, Any]] = []
    for point in scaling.points:
        law = scaling.by_k.get(point.k)
        rows.append(
            {
                "kind": "run",
                "run": point.name,
                "n_latents": point.n_latents,
                "k": point.k,
                "seed": point.seed,
                "lr": point.lr,
                "tokens": point.tokens,
                "flops": point.flops,
                "fvu": point.fvu,
                "l0": point.l0,
                "predicted_n": law and float(law.predict([point.n_latents])[0]),
                "predicted_nk": scaling.joint
                and float(scaling.joint.predict([(point.n_latents, point.k)])[0]),
            }
        )
    for k, found in scaling.envelopes.items():
        law = scaling.compute.get(k)
        for flops, fvu, best, inner in zip(
            found.flops, found.fvu, found.best, found.inner, strict=True
        ):
            rows.append(
                {
                    "kind": "envelope",
                    "n_latents": int(best),
                    "k": k,
                    "flops": float(flops),
                    "fvu": float(fvu),
                    "inner": bool(inner),
                    "predicted_c": law and float(law.predict([flops])[0]),
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("run", pa.string()),
        ("n_latents", pa.int64()),
        ("k", pa.int64()),
        ("seed", pa.int64()),
        ("lr", pa.float64()),
        ("tokens", pa.int64()),
        ("flops", pa.float64()),
        ("fvu", pa.float64()),
        ("l0", pa.float64()),
        ("inner", pa.bool_()),
        ("predicted_n", pa.float64()),
        ("predicted_nk", pa.float64()),
        ("predicted_c", pa.float64()),
    ]
)


def write(scaling: Scaling, out: Path) -> None:
    """Write the table and the fits into the folder, made if missing."""
    new_folder(out)
    with replacing(out / TABLE_FILE) as temporary, exact_file(temporary, "wb") as sink:
        pq.write_table(table(scaling), sink)
    write_json(out / FITS_FILE, fits(scaling))
