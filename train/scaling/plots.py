"""Plots of scaling laws: points, fitted curves with their bands, on logarithmic axes.

Colours come from viridis, which is ordered for every kind of colour vision. Points of different k
also differ in shape. Only this module imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from sae_harvest.common.atomic import replacing
from sae_harvest.train.scaling.envelope import curve_flops
from sae_harvest.train.scaling.fits import Scaling
from sae_harvest.train.scaling.least_squares import LEVEL, Fit

LATENTS_PLOT, JOINT_PLOT, COMPUTE_PLOT = "loss_latents.png", "loss_joint.png", "loss_compute.png"
SIZE, DPI = (7.0, 4.8), 160
MARKERS = "osD^vP*X"
LOSS = "FVU (share of variance not explained)"
STYLE: Any = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
STEPS = 200  # points of a drawn curve


def plot(scaling: Scaling, out: Path) -> list[Path]:
    """Draw every fitted law as PNG and return the files."""
    written = [_save(out / LATENTS_PLOT, _latents, scaling)]
    if scaling.joint is not None:
        written.append(_save(out / JOINT_PLOT, _joint, scaling))
    if scaling.compute:
        written.append(_save(out / COMPUTE_PLOT, _compute, scaling))
    return written


def _save(path: Path, draw: Any, scaling: Scaling) -> Path:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        draw(figure, scaling)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:])
    return path


def _colours(values: Sequence[int]) -> dict[int, Any]:
    """Return a colour per value, from dark to light in their order."""
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, max(2, len(values))))
    return dict(zip(sorted(values), shades, strict=False))


def _latents(figure: Figure, scaling: Scaling) -> None:
    """Draw L(n) at each k."""
    axes = figure.subplots()
    colours = _colours(list(scaling.by_k))
    for (k, law), marker in zip(scaling.by_k.items(), MARKERS * len(scaling.by_k), strict=False):
        at_k = [point for point in scaling.points if point.k == k]
        sizes = np.array([point.n_latents for point in at_k], float)
        label = f"$k$ = {k}:  {_power_text(law, 'n')}"
        _law(axes, law, sizes.min(), sizes.max(), colours[k], label)
        _points(axes, sizes, [point.fvu for point in at_k], colours[k], marker)
    _dress(axes, "number of latents $n$", [point.n_latents for point in scaling.points], 2)
    axes.set_title(f"Loss against the number of latents (shaded: {LEVEL:.0%} band of the law)")
    axes.set_ylabel(f"held-out {LOSS}")
    axes.legend(fontsize=9)


def _joint(figure: Figure, scaling: Scaling) -> None:
    """Draw L(n, k): one curve per k, all from one law."""
    law = scaling.joint
    assert law is not None
    axes = figure.subplots()
    ks = sorted({point.k for point in scaling.points})
    colours = _colours(ks)
    for k, marker in zip(ks, MARKERS * len(ks), strict=False):
        at_k = [point for point in scaling.points if point.k == k]
        sizes = np.array([point.n_latents for point in at_k], float)
        line = np.geomspace(sizes.min(), sizes.max(), STEPS)
        grid = np.stack((line, np.full(STEPS, k)), 1)
        low, high = law.band(grid)
        axes.fill_between(line, low, high, color=colours[k], alpha=0.15, linewidth=0)
        axes.plot(line, law.predict(grid), color=colours[k], label=f"$k$ = {k}")
        _points(axes, sizes, [point.fvu for point in at_k], colours[k], marker)
    _dress(axes, "number of latents $n$", [point.n_latents for point in scaling.points], 2)
    axes.set_title(f"One law of latents and sparsity, $L(n, k)$,  R² = {law.r2:.4f}")
    axes.set_ylabel(f"held-out {LOSS}")
    axes.legend(fontsize=9)


def _compute(figure: Figure, scaling: Scaling) -> None:
    """Draw L(C) and the training curves above it, at the k with the most points."""
    k = max(scaling.compute, key=lambda k: int(scaling.envelopes[k].inner.sum()))
    law, found = scaling.compute[k], scaling.envelopes[k]
    axes = figure.subplots()
    at_k = [point for point in scaling.points if point.k == k]
    colours = _colours(sorted({point.n_latents for point in at_k}))
    named: set[int] = set()
    for point in at_k:
        label = None if point.n_latents in named else f"$n$ = {point.n_latents:,}"
        named.add(point.n_latents)
        axes.plot(
            curve_flops(point),
            point.curve_fvu,
            color=colours[point.n_latents],
            linewidth=0.6,
            alpha=0.7,
            label=label,
        )
    inner, flops = found.inner, found.flops
    _law(axes, law, flops[inner].min(), flops[inner].max(), "black", _power_text(law, "C"))
    axes.plot(flops[inner], found.fvu[inner], "o", color="black", markersize=3.5, zorder=4)
    axes.set_xlim(flops.min(), max(point.flops for point in at_k) * 1.1)
    top = found.fvu.max() * 1.25
    axes.set_ylim(0.97 * min(point.curve_fvu.min() for point in at_k), top)
    _dress(axes, "training compute $C$ (FLOPs)", None, 10)
    axes.set_title(f"Loss against compute at k = {k}: the lower envelope of training curves")
    axes.set_ylabel(f"training {LOSS}")
    axes.legend(fontsize=8.5, ncols=2)


def _law(axes: Axes, law: Fit, first: float, last: float, colour: Any, label: str) -> None:
    """Draw a power law with its band."""
    line = np.geomspace(first, last, STEPS)
    low, high = law.band(line)
    axes.fill_between(line, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
    axes.plot(line, law.predict(line), color=colour, label=label, zorder=3)


def _points(axes: Axes, x: Any, y: Any, colour: Any, marker: str) -> None:
    axes.plot(
        x, y, marker, color=colour, markersize=6.5, markeredgecolor="white",
        markeredgewidth=0.7, zorder=4,
    )  # fmt: skip


def _power_text(law: Fit, name: str) -> str:
    found = law.to_json()["parameters"]
    e, a, b = (found[parameter]["value"] for parameter in "eab")
    return f"{e:.3g} + {a:.3g} ${name}^{{-{b:.3f}}}$,  R² = {law.r2:.4f}"


def _dress(axes: Axes, label: str, sizes: Sequence[int] | None, base: int) -> None:
    """Set logarithmic axes with plain numbers at the ticks."""
    axes.set_xscale("log", base=base)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    if sizes is not None:
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(sizes))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    subs = (
        (1.0, 2.0, 5.0)
        if high / low > 6
        else tuple(np.arange(1.0, 10.0, 0.5 if high / low < 2 else 1))
    )
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.yaxis.set_minor_locator(FixedLocator([]))
