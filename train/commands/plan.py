"""`train-sae plan`: the cost of a run before it begins."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from sae_harvest.common.console import output
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import Command, PlaceOption, grouped
from sae_harvest.common.settings import options_for, settings_of
from sae_harvest.common.units import size_text
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.options import DEFAULTS, RunSettings

GPUS = ("a100", "h100", "h200", "b200")
ASKED = ("n_latents", "k", "tokens", "batch_rows")  # settings of a run that a plan needs


@click.command(cls=Command)
@grouped(
    "Activations",
    "--store",
    type=PlaceOption(),
    help="Activation store from which the widths are read, in place of --d-in.",
)
@grouped("Activations", "--site", help="Site of the store. Default: the only one.")
@grouped("Activations", "--d-in", type=CountRange(min=1), help="Width of the activations.")
@grouped("Activations", "--d-out", type=CountRange(min=1), help="Width that a transcoder predicts.")
@options_for([s for s in settings_of(TrainConfig) if s.path[0] in ASKED], DEFAULTS)
@grouped(
    "Execution",
    "--devices",
    type=CountRange(min=1),
    default=1,
    show_default=True,
    help="Number of devices.",
)
@grouped(
    "Execution",
    "--parallel",
    type=click.Choice(["data", "latents"]),
    default="latents",
    show_default=True,
    help="What devices divide: the rows of a batch, or the latents.",
)
@grouped(
    "Execution",
    "--dead-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the latents that AuxK revives in a typical step.",
)
@grouped(
    "Execution",
    "--gpu",
    type=click.Choice(GPUS),
    help="Estimate for this GPU from its data sheet, instead of measuring this machine.",
)
@grouped(
    "Execution",
    "--link",
    type=click.FloatRange(min=0, min_open=True),
    help="Gigabytes a second between devices; default NVLink of the --gpu, else 1.25.",
)
@grouped(
    "Execution",
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to measure.",
)
@click.pass_context
def plan(
    context: click.Context, store: str | None, site: str | None, d_in: int | None, **given: Any
) -> None:
    """Print the memory, operations, bytes and time of a training run.

    \b
    train-sae plan --d-in 768 --n-latents 24576 --tokens 50000000
    train-sae plan --d-in 12288 --n-latents 16777216 --k 256 --gpu h200 --devices 256 \\
        --parallel latents --batch-rows 131072 --tokens 40000000000
    """
    if (store is None) == (d_in is None):
        raise click.UsageError("Give --store, for the width of its activations, or --d-in.")
    if given["gpu"] and given["device"] != "auto":
        raise click.UsageError("--gpu estimates and --device measures; give one of them.")
    config = RunSettings({}, "", RunSettings.typed(context)).config()
    from sae_harvest.train.planning.estimate import plan as make_plan

    stored_bytes = 2
    if store is not None:
        d_in, stored_bytes = _of_store(store, site)
    if given["d_out"]:  # any site makes a transcoder; its name does not matter here
        config = config.model_copy(update={"target_site": "mlp_out.0"})
    assert d_in is not None
    found = make_plan(
        config,
        _rates(given["gpu"], given["device"], given["link"]),
        d_in,
        given["d_out"],
        devices=given["devices"],
        parallel=given["parallel"],
        dead_share=given["dead_share"],
        stored_bytes=stored_bytes,
    )
    for table in _tables(found):
        output().print(table)


def _of_store(place: str, site: str | None) -> tuple[int, int]:
    """Return the width of a site's activations, and the bytes of one number."""
    from sae_harvest.store.reader import ActivationStore

    store = ActivationStore.open(place)
    site = store.site(site)
    return store.width(site), store.read(site, 0, 1).itemsize


def _rates(gpu: str | None, device: str, link: float | None) -> Any:
    """Return the published rates of a GPU, or measured ones."""
    from dataclasses import replace

    from sae_harvest.train.planning.estimate import published_rates

    if gpu is not None:
        rates = published_rates(gpu)
    else:
        import torch

        from sae_harvest.common.device import choose_device
        from sae_harvest.train.planning.measure import measure_rates

        rates = measure_rates(torch.device(choose_device(device)))
    return rates if link is None else replace(rates, link=link * 1e9)


def _tables(plan: Any) -> list[Table]:
    """Return three tables: memory of a device, parts of a step, the whole run."""
    rates, each = plan.rates, " of each device" if plan.devices > 1 else ""
    how = "estimated from its data sheet" if rates.estimate else "measured just now"
    memory = Table("memory" + each, "GB", box=None)
    for name, n_bytes in plan.memory.items():
        memory.add_row(name, f"{n_bytes / 1e9:,.3f}")
    memory.add_row("together", f"{plan.memory_total / 1e9:,.3f}")
    memory.add_row(f"available ({rates.name})", f"{rates.memory / 1e9:,.3f}")
    step = Table("a step" + each, "GFLOP", "GB moved", "ms", box=None)
    for name, seconds in plan.seconds.items():
        flops, moved = plan.flops.get(name), plan.moved.get(name)
        if name == "exchange":
            moved = plan.exchanged
        step.add_row(
            name,
            "" if flops is None else f"{flops / 1e9:,.2f}",
            "" if moved is None else f"{moved / 1e9:,.3f}",
            f"{1e3 * seconds:,.1f}",
        )
    step.add_row(
        "together",
        f"{sum(plan.flops.values()) / 1e9:,.2f}",
        f"{(sum(plan.moved.values()) + plan.exchanged) / 1e9:,.3f}",
        f"{1e3 * plan.step_seconds:,.1f}",
    )
    run = Table("the run", f"on {rates.name}, {how}", box=None)
    flops = plan.devices * plan.steps * sum(plan.flops.values())
    run.add_row("steps", f"{plan.steps:,} of {plan.tokens // plan.steps:,} rows")
    run.add_row("FLOPs of all devices", f"{flops:.3g}")
    run.add_row("read from the store", size_text(plan.read))
    run.add_row("which the store must give at", f"{plan.read / plan.run_seconds / 1e6:,.0f} MB/s")
    run.add_row("rows per second", f"{plan.tokens / plan.run_seconds:,.0f}")
    run.add_row("time", _duration(plan.run_seconds))
    if not plan.fits:
        run.add_row("memory", "does not fit: smaller batches, or latents shared by more devices")
    return [memory, step, run]


def _duration(seconds: float) -> str:
    """Return a duration such as `3 h 12 min`, `5 min 20 s` or `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:,.1f} days"
