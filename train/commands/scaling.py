"""`train-sae scaling`: scaling laws of a sweep as a table, a file of fits, and plots."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from sae_harvest.common.console import output
from sae_harvest.common.errors import InputError
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import PathOption
from sae_harvest.common.paths import shown


@click.command()
@click.argument("sweep", metavar="SWEEP_DIR", type=PathOption(exists=True, file_okay=False))
@click.option(
    "--out",
    type=PathOption(file_okay=False),
    required=True,
    help="Folder for scaling.parquet, fits.json and the plots.",
)
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw the laws as PNG.")
@click.option(
    "--seed",
    type=CountRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the bootstrap behind the intervals.",
)
def scaling(sweep: Path, out: Path, plots: bool, seed: int) -> None:
    """Fit scaling laws, L(n), L(n, k) and L(C), to the runs of a sweep.

    \b
    train-sae scaling runs/demo/sweep --out runs/demo/scaling
    """
    if plots and find_spec("matplotlib") is None:
        raise InputError(
            "Plots are drawn with matplotlib, which is not installed; "
            "pip install matplotlib, or give --no-plots."
        )
    from sae_harvest.train.scaling.fits import analyse, fits, write
    from sae_harvest.train.scaling.points import read_sweep

    found = analyse(read_sweep(sweep), seed=seed)
    write(found, out)
    content = fits(found)
    output().print(_table(content))
    for law, reason in found.left_out.items():
        output().print(f"{law} is left out: {reason}.", soft_wrap=True)
    for doubt in found.doubts:
        output().print(f"Doubtful: {doubt}.", soft_wrap=True)
    if plots:
        from sae_harvest.train.scaling.plots import plot

        for path in plot(found, out):
            output().print(shown(path), soft_wrap=True)


def _table(content: dict[str, Any]) -> Table:
    """Return the laws with their parameters and intervals."""
    level = content["laws"][0]["level"]
    table = Table("law", "k", "parameter", "value", f"{level:.0%} interval", "R²", box=None)
    for law in content["laws"]:
        first = (law["law"], "all" if law["k"] is None else str(law["k"]))
        for name, numbers in law["parameters"].items():
            table.add_row(
                *first,
                name,
                f"{numbers['value']:.4g}",
                f"{numbers['low']:.4g} to {numbers['high']:.4g}",
                f"{law['r2']:.4f}" if first[0] else "",
            )
            first = ("", "")
    return table
