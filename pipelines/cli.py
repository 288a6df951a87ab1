"""The `sae-pipeline` command: the whole path in one go."""

from __future__ import annotations

from pathlib import Path

import click

from store.console import Commands, output


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Harvest, train, build tables, measure.

    \b
    sae-pipeline demo
    """


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for store, SAE and tables.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Ray workers; 0 runs in this process without Ray.",
)
def demo(out: Path, workers: int) -> None:
    """SmolLM2-135M over packaged news: 262,144 tokens, 4,608 latents; minutes on two cores.

    Run again, it does only what is missing.

    \b
    sae-pipeline demo --out runs/demo
    """
    from pipelines.demo import run_demo

    run_demo(out, workers, output())
