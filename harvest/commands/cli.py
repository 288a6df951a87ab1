"""The `harvest` command: plan, run, status, verify, show, export, merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from sae_harvest.common.console import (
    SAME_COMMAND,
    Commands,
    Progress,
    device_option,
    output,
    store_option,
    when_interrupted,
)
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import grouped
from sae_harvest.common.paths import absolute, shown
from sae_harvest.common.settings import Setting, config_file_option, options_for
from sae_harvest.harvest.commands.request import HarvestSettings, Places, layer_option, parse_shards
from sae_harvest.harvest.commands.stores import export, merge


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Activations of a language model over text, in a store that zarr and dask can read.

    \b
    harvest run --model gpt2 --layer 8
    harvest run --model smollm2-135m --corpus news --layer 12 --tokens 262144
    """


def request_options(
    settings: Iterable[Setting],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--config`, the options of these settings, and `--layer`."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        return config_file_option(options_for(settings)(layer_option(command)))

    return add


@main.command()
@request_options(setting for setting in HarvestSettings.settings() if setting.path != ("store",))
@click.pass_context
def plan(context: click.Context, file: Path | None, **given: Any) -> None:
    """Print the rows, bytes and time that a harvest needs, without harvesting.

    \b
    harvest plan --model smollm2-135m --layer 12 --tokens 262144
    harvest plan --config harvest.yaml
    """
    from sae_harvest.harvest.run.estimate import estimate

    def say(line: str) -> None:
        click.echo(line, err=True)

    table = Table("what", Column("value", overflow="fold"), box=None)
    settings = HarvestSettings.of(context, file)
    device = settings.read(Places).device
    for name, value in estimate(settings.config(), device, say).items():
        table.add_row(name, value)
    output().print(table)


def means_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for workers and device."""
    options = [
        grouped(
            "Execution",
            "--workers",
            type=click.IntRange(min=0),
            default=1,
            show_default=True,
            help="Ray workers; 0 runs in this process without Ray.",
        ),
        grouped(
            "Execution",
            "--address",
            help="Address of a running Ray cluster: HOST:PORT or auto.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@request_options(HarvestSettings.settings())
@means_options
@grouped(
    "Execution",
    "--shards",
    "only",
    metavar="FIRST:LAST",
    help="Shards to harvest, without LAST. `harvest merge` joins the parts.",
)
@click.pass_context
def run(
    context: click.Context,
    file: Path | None,
    workers: int,
    address: str | None,
    only: str | None,
    **given: Any,
) -> None:
    """Harvest activations; the same command, run again, continues.

    \b
    harvest run --model gpt2 --layer 8
    harvest run --config harvest.yaml --tokens 524288
    """
    settings = HarvestSettings.of(context, file)
    places, config = settings.read(Places), settings.config()
    store = places.store
    if store is None:
        name = Path(config.model).resolve().name
        store = absolute(f"runs/{name}-{'-'.join(config.sites)}/store")
    from sae_harvest.harvest.run.progress import harvest_with_progress

    execution = make_execution(workers, places.device, address)
    result = harvest_with_progress(config, store, execution, parse_shards(only))
    rate = f", {result.rows_run / result.seconds:,.0f} tokens/s" if result.rows_run else ""
    ending = (
        f"Digest {result.digest}."
        if result.digest
        else "Not sealed: shards outside --shards are missing."
    )
    if config.tokens == "all" and result.digest:
        ending = f"The corpus holds {result.rows:,} tokens in whole contexts. {ending}"
    output().print(
        f"{shown(store)}: {result.rows:,} rows of {', '.join(config.sites)}, "
        f"{result.rows_run:,} of them now{rate}. {ending}",
        soft_wrap=True,
    )


def make_execution(workers: int, device: str, address: str | None) -> Any:
    """Make the execution that the options describe; usage error for a cluster without workers."""
    from sae_harvest.harvest.run.driver import Execution

    if address is not None and workers == 0:
        raise click.UsageError("--address requires --workers above 0; leave one of them out.")
    return Execution(workers=workers, device=device, address=address)


@main.command()
@store_option
def status(store: str) -> None:
    """Print the progress of a harvest, from any terminal.

    \b
    harvest status --store runs/demo/store
    """
    from sae_harvest.harvest.run.log import log_path
    from sae_harvest.harvest.run.status import describe_status
    from sae_harvest.store.objects import open_objects

    objects = open_objects(store)
    output().print(f"{shown(store)}: {describe_status(objects)}.", soft_wrap=True)
    log = log_path(objects.place)
    if log is not None and log.exists():
        output().print(f"Log: {log}", soft_wrap=True)


@main.command()
@store_option
@click.option("--repair", is_flag=True, help="Harvest the damaged shards again.")
@means_options
@device_option
def verify(store: str, repair: bool, workers: int, address: str | None, device: str) -> None:
    """Check the hash of every object; name each damaged one, and repair it with --repair.

    \b
    harvest verify --store runs/demo/store
    """
    from sae_harvest.common.errors import DamagedError, UnfinishedError
    from sae_harvest.store.maintenance.verify import verify as check
    from sae_harvest.store.objects import open_objects

    name = shown(store)
    if repair:
        report = repair_and_report(store, make_execution(workers, device, address))
    else:
        with Progress("bytes") as progress:
            show = progress.counting("verifying", lambda speed: f"{speed / 1e9:,.2f} GB/s")
            report = check(open_objects(store), show)
    for item in report.damage:
        click.echo(item.sentence, err=True)
    for key in report.leftovers:
        click.echo(f"{name}/{key} was left by a killed writer; it is not data.", err=True)
    if report.damage:
        raise DamagedError(
            f"{name} has {len(report.damage)} damaged objects, named above; `harvest verify "
            "--repair` harvests their shards again."
        )
    if not report.shards:
        raise UnfinishedError(
            f"{name} holds no shard: its harvest was stopped before the first one; run the same "
            "`harvest run` again."
        )
    digest = f"Digest {report.digest}." if report.digest else "Not sealed yet."
    beyond = f" {report.beyond_seal} of the shards are not sealed yet." * bool(
        report.digest and report.beyond_seal
    )
    output().print(
        f"{name}: {report.shards} shards, {report.objects} objects, {report.n_bytes:,} bytes, "
        f"all as committed. {digest}{beyond}",
        soft_wrap=True,
    )


def repair_and_report(store: str, execution: Any) -> Any:
    """Repair with progress shown, print what was done, and return the report after the repair."""
    from sae_harvest.harvest.run.driver import repair as mend
    from sae_harvest.harvest.run.progress import tokens_rate

    with when_interrupted(SAME_COMMAND), Progress("tokens") as progress:
        before, after = mend(store, execution, progress.counting("repairing", tokens_rate))
    for item in before.damage:
        click.echo(item.sentence, err=True)
    shards = sorted({item.shard for item in before.damage if item.shard is not None})
    place = shown(store)
    again = f"shards harvested again: {', '.join(map(str, shards)) or 'none'}"
    output().print(f"{place}: {len(before.damage)} damaged objects; {again}.", soft_wrap=True)
    if before.sealed_digest and after.digest and before.sealed_digest != after.digest:
        output().print(
            f"The digest changed from {before.sealed_digest}: this machine or its software "
            "computes values whose last bits differ from those of the lost ones.",
            soft_wrap=True,
        )
    return after


@main.command()
@store_option
@click.option(
    "--row", type=CountRange(min=0), help="Number of a row; prints the origin of that row."
)
def show(store: str, row: int | None) -> None:
    """Print the contents of a store: model, text, sites, statistics, outlier rows.

    \b
    harvest show --store runs/demo/store
    harvest show --store runs/demo/store --row 1234
    """
    if row is None:
        from sae_harvest.harvest.inspect.show import describe
    else:
        from sae_harvest.harvest.inspect.provenance import describe_row

    for table in describe(store) if row is None else describe_row(store, row):
        output().print(table)


main.add_command(merge)
main.add_command(export)
