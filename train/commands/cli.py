"""The `train-sae` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from sae_harvest.common.console import (
    EXIT_FAILURE,
    output,
)
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import Command, PathOption, grouped
from sae_harvest.common.paths import shown
from sae_harvest.common.settings import config_file_option, options_for, settings_of
from sae_harvest.train.commands.formats import add_format_commands
from sae_harvest.train.commands.plan import plan
from sae_harvest.train.commands.scaling import scaling
from sae_harvest.train.commands.summary import number, summary
from sae_harvest.train.commands.synthetic import synthetic
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.options import DEFAULTS, Places, RunSettings
from sae_harvest.train.run.exit_codes import (
    EXIT_UNFINISHED,
    Job,
    JobCommands,
    stopped,
    stopped_code_option,
)
from sae_harvest.train.run.progress import sweep_with_progress, train_with_progress

folder = PathOption(file_okay=False)


class GroupedJob(Command, Job):
    """A `Job` whose help lists its options in groups."""


@click.group(cls=JobCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Train sparse autoencoders on stored activations.

    \b
    train-sae run --store runs/demo/store --out runs/demo/wide --n-latents 8192 --tokens 2000000
    """


@main.command(cls=GroupedJob)
@config_file_option
@options_for(settings_of(Places))
@options_for(settings_of(TrainConfig), DEFAULTS)
@grouped(
    "Execution",
    "--workers",
    type=CountRange(min=1),
    help="Processes that train together, started by Ray; each gets a GPU, or a share of the "
    "cores.  [default: this process alone]",
)
@grouped(
    "Execution",
    "--parallel",
    type=click.Choice(["latents", "data"]),
    default="latents",
    show_default=True,
    help="What workers divide: the latents (each has a part of the weights) or the rows of a "
    "batch (each has all weights).",
)
@grouped(
    "Execution",
    "--address",
    help="Ray cluster that the workers run on: auto, or HOST:PORT.",
)
@stopped_code_option
@click.pass_context
def run(
    context: click.Context,
    file: Path | None,
    workers: int | None,
    parallel: Any,
    address: str | None,
    stopped_code: int,
    **given: Any,
) -> None:
    """Train a sparse autoencoder or a transcoder, or continue its training.

    \b
    train-sae run --store runs/demo/store --out runs/demo/wide --n-latents 8192 --tokens 2000000
    train-sae run --config run.yaml --out runs/demo/low-rate --lr 0.0005
    train-sae run --config run.yaml --workers 8 --address auto
    """
    settings = RunSettings.of(context, file)
    places, config = settings.places(), settings.config()
    out, name = Path(places.out), shown(places.out)
    if workers is None and address is not None:
        raise click.UsageError("--address requires --workers; give their number.")
    cluster = None
    if workers is not None:
        cluster = {"workers": workers, "parallel": parallel, "address": address}
    result = train_with_progress(config, places.store, out, places.site, places.device, cluster)
    if not result.finished:
        stopped(f"Stopped after step {result.steps}, saved in {name}", result.signal, stopped_code)
    output().print(summary({name: result.evaluation}))


@main.command(cls=GroupedJob)
@click.argument("file", type=PathOption(dir_okay=False))
@options_for(settings_of(Places))
@stopped_code_option
@click.pass_context
def sweep(context: click.Context, file: Path, stopped_code: int, **given: Any) -> None:
    """Train many SAEs on one stream of batches, or continue a sweep.

    FILE is YAML: settings of `train-sae run`, and under `grid` lists of values to combine.

    \b
    train-sae sweep sweep.yaml --store runs/demo/store --out runs/demo/sweep
    """
    from sae_harvest.train.sweeps.sweepfile import read_sweep_file

    found = read_sweep_file(file, RunSettings.typed(context))
    out = Path(found.places.out)
    result = sweep_with_progress(found, out)
    if result.signal is not None:
        stopped(f"Stopped, saved in {shown(out)}", result.signal, stopped_code)
    done = {name: member.evaluation for name, member in result.members.items()}
    output().print(summary({name: found for name, found in done.items() if found is not None}))
    for name in result.failed:
        click.echo(f"{name}: {result.members[name].failure}", err=True)
    if result.failed:
        click.echo(
            f"Error: {len(result.failed)} of {len(result.members)} members failed, named above; "
            "the others are finished.",
            err=True,
        )
        sys.exit(EXIT_FAILURE)


@main.command()
@click.argument("out", type=folder)
def status(out: Path) -> None:
    """Show the progress of a run or a sweep. Exit code 0: finished; 3: not finished; 1: failed.

    \b
    train-sae status runs/demo/sae
    """
    from sae_harvest.train.run.status import read_status

    runs = read_status(out)
    rest = ("state", "step", "of", "saved", "tokens", "fvu", "l0", "dead")
    table = Table(Column("run", overflow="fold"), *rest, box=None)
    for found in runs:
        last = found.metrics
        table.add_row(
            found.name,
            found.state,
            f"{found.step:,}",
            f"{found.steps:,}",
            "-" if found.saved is None else f"{found.saved:,}",
            f"{last.get('tokens', 0):,}",
            *(number(last.get(name), form) for name, form in STATUS_METRICS.items()),
        )
    output().print(table)
    for found in runs:
        if found.failure is not None:
            click.echo(f"{found.name}: {found.failure}", err=True)
    states = {found.state for found in runs}
    if states & {"running", "unfinished"}:
        sys.exit(EXIT_UNFINISHED)
    sys.exit(EXIT_FAILURE if "failed" in states else 0)


STATUS_METRICS = {"fvu": ".4f", "l0": ".1f", "dead_share": ".1%"}


add_format_commands(main)
main.add_command(plan)
main.add_command(scaling)
main.add_command(synthetic)

if __name__ == "__main__":
    main()
