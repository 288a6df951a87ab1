"""The `train-sae` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from store.console import EXIT_INTERRUPTED, Commands, output, progress, store_option


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Sparse autoencoders from stored activations.

    \b
    train-sae run --store runs/demo/store --out runs/demo/sae --n-latents 8192 --tokens 2000000
    """


@main.command()
@store_option
@click.option("--site", help="Which activations, resid_post.12 say; default: the only site.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The run's folder; the same command continues a run that is there.",
)
@click.option(
    "--n-latents", type=click.IntRange(min=1), default=8192, show_default=True, help="Latents."
)
@click.option(
    "--k", type=click.IntRange(min=1), default=32, show_default=True, help="Latents kept per row."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=10_000_000,
    show_default=True,
    help="Rows to train on, repeats included.",
)
@click.option(
    "--batch-rows",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Rows per step.",
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True, max=1),
    help="Learning rate; default 1e-3 * sqrt(16384 / n-latents).",
)
@click.option(
    "--dead-after-tokens",
    type=click.IntRange(min=1),
    default=10_000_000,
    show_default=True,
    help="A latent that has not fired in this many rows is dead and trained by AuxK.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Steps between checkpoints.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the initial weights and the order of rows.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
def run(store: str, site: str | None, out: Path, device: str, **given: Any) -> None:
    """Train a TopK sparse autoencoder, or continue to.

    \b
    train-sae run --store runs/demo/store --out runs/demo/sae --n-latents 8192 --tokens 2000000
    """
    if given["k"] > given["n_latents"]:
        raise click.UsageError(f"--k {given['k']} exceeds --n-latents {given['n_latents']}.")
    if given["tokens"] < given["batch_rows"]:
        raise click.UsageError(
            f"--tokens {given['tokens']} is less than one batch, --batch-rows "
            f"{given['batch_rows']}."
        )
    from train.config import TrainConfig

    result = train_with_bar(TrainConfig(**given), store, out, site, device)
    if not result.finished:
        click.echo(
            f"Stopped after step {result.steps}, saved in {out}; the same command continues.",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)
    output().print(summary(out, result))


def train_with_bar(config: Any, store: str | Path, out: Path, site: str | None, device: str) -> Any:
    """`train.trainer.train` under a progress bar."""
    from train.trainer import train

    with progress("") as bar:
        task = bar.add_task("preparing", total=None, rate="")

        def show(phase: str, done: int, total: int, rate: str) -> None:
            bar.update(task, description=phase, completed=done, total=total, rate=rate)

        return train(config, store, out, site, device, show)


def summary(out: Path, result: Any) -> Table:
    """The evaluation as a table."""
    table = Table("held-out rows", "rows", "FVU", "L0", "never fired", title=str(out), box=None)
    for group, name in (
        ("without_outliers", "without outliers"),
        ("with_outliers", "with outliers"),
    ):
        values = result.evaluation[group]
        if values["rows"] == 0:
            table.add_row(name, "0", "-", "-", "-")
            continue
        fvu = "-" if values["fvu"] is None else f"{values['fvu']:.4f}"
        table.add_row(
            name,
            f"{values['rows']:,}",
            fvu,
            f"{values['l0']:.1f}",
            f"{values['dead_share']:.1%}",
        )
    return table


if __name__ == "__main__":
    main()
