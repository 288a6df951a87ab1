"""The `sae-pipeline` command: harvest, training and tables in one command."""

from __future__ import annotations

from pathlib import Path

import click

from sae_harvest.common.console import SAME_COMMAND, device_option, output, when_interrupted
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import NameOption, PathOption
from sae_harvest.common.paths import shown
from sae_harvest.common.yamlfile import read_value
from sae_harvest.train.run.exit_codes import Job, JobCommands, stopped, stopped_code_option


@click.group(cls=JobCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Harvest, train, build tables, measure.

    \b
    sae-pipeline demo
    sae-pipeline run gpt2-small --out runs/gpt2-small
    """


@main.command()
@click.option(
    "--out",
    type=PathOption(),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for store, SAE and tables.",
)
@click.option(
    "--workers",
    type=CountRange(min=0),
    default=1,
    show_default=True,
    help="Ray workers; 0 runs in this process without Ray.",
)
@click.option(
    "--tokens",
    type=CountRange(min=4096),
    default=262_144,
    show_default=True,
    help="Tokens to harvest. Training reads each of them six times.",
)
def demo(out: Path, workers: int, tokens: int) -> None:
    """SmolLM2-135M over packaged news, 4,608 latents; minutes on two cores.

    A second run does only the work that is missing.

    \b
    sae-pipeline demo --out runs/demo
    sae-pipeline demo --out runs/demo-small --tokens 32768
    """
    from sae_harvest.pipelines.demo import run_demo

    with when_interrupted(SAME_COMMAND):
        run_demo(out, workers, output(), tokens)


@main.command(cls=Job)
@click.argument("recipe", type=NameOption())
@click.option("--out", type=PathOption(), required=True, help="Folder for stores and SAEs.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Value for a key of the recipe, such as harvest.tokens=1e6; repeat for several.",
)
@click.option(
    "--workers",
    type=CountRange(min=0),
    default=1,
    show_default=True,
    help="Ray workers that harvest; 0 harvests in this process without Ray.",
)
@click.option("--address", help="Ray cluster to harvest on: auto, or HOST:PORT.")
@device_option
@stopped_code_option
def run(
    recipe: str,
    out: Path,
    changes: tuple[str, ...],
    workers: int,
    address: str | None,
    device: str,
    stopped_code: int,
) -> None:
    """Harvest layers of a model and train a sweep of SAEs on each site.

    RECIPE is a YAML file, or the name of a packaged recipe: gpt2-small or
    scaling-smollm2.

    \b
    sae-pipeline run gpt2-small --out runs/gpt2-small
    sae-pipeline run gpt2-small --out runs/one-layer --set layers=[8]
    """
    from sae_harvest.harvest.run.driver import Execution
    from sae_harvest.pipelines.recipe import SUITE_FILE, read_recipe, run_recipe, suite_table

    found = read_recipe(recipe, dict(map(_change, changes)))
    signal = run_recipe(found, out, Execution(workers, device, address), output().print)
    if signal is not None:
        stopped(f"Stopped, saved in {shown(out)}", signal, stopped_code)
    output().print(suite_table(out))
    output().print(f"Table: {shown(out / SUITE_FILE)}", soft_wrap=True)


def _change(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise click.UsageError(f"--set {text}: expected KEY=VALUE, harvest.tokens=1e6 say.")
    return key, read_value(value)
