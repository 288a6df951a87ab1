"""`train-sae plan`: what a run would take, before it is begun."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from sae_harvest.common.console import output
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import PlaceOption
from sae_harvest.common.units import size_text

GPUS = ("a100", "h100", "h200", "b200")


@click.command()
@click.option(
    "--store",
    type=PlaceOption(),
    help="Activation store whose widths are taken, instead of --d-in.",
)
@click.option("--site", help="Site of the store. Default: the only one.")
@click.option("--d-in", type=CountRange(min=1), help="Width of the activations.")
@click.option("--d-out", type=CountRange(min=1), help="Width that a transcoder predicts.")
@click.option(
    "--n-latents",
    type=CountRange(min=1),
    default=8192,
    show_default=True,
    help="Number of latents.",
)
@click.option(
    "--k",
    type=CountRange(min=1),
    default=32,
    show_default=True,
    help="Active latents per row.",
)
@click.option(
    "--tokens",
    type=CountRange(min=1),
    default=10_000_000,
    show_default=True,
    help="Rows to train on.",
)
@click.option(
    "--batch-rows",
    type=CountRange(min=1),
    default=4096,
    show_default=True,
    help="Rows per step, of all devices together.",
)
@click.option(
    "--devices", type=CountRange(min=1), default=1, show_default=True, help="Number of devices."
)
@click.option(
    "--parallel",
    type=click.Choice(["data", "latents"]),
    default="latents",
    show_default=True,
    help="What devices share out: the rows of a batch, or the latents.",
)
@click.option(
    "--dead-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the latents that AuxK revives in a typical step.",
)
@click.option(
    "--gpu",
    type=click.Choice(GPUS),
    help="Estimate for this GPU from its data sheet, instead of measuring this machine.",
)
@click.option(
    "--link",
    type=click.FloatRange(min=0, min_open=True),
    help="Gigabytes a second between devices; default NVLink of the --gpu, else 1.25.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to measure.",
)
def plan(store: str | None, site: str | None, d_in: int | None, **given: Any) -> None:
    """Print the memory, operations, bytes and time of a training run.

    \b
    train-sae plan --d-in 768 --n-latents 24576 --tokens 50000000
    train-sae plan --d-in 12288 --n-latents 16777216 --k 256 --gpu h200 --devices 256 \\
        --parallel latents --batch-rows 131072 --tokens 40000000000
    """
    if (store is None) == (d_in is None):
        raise click.UsageError("Give --store, for the width of its activations, or --d-in.")
    if given["k"] > given["n_latents"]:
        raise click.UsageError(f"--k {given['k']} exceeds --n-latents {given['n_latents']}.")
    if given["tokens"] < given["batch_rows"]:
        raise click.UsageError(
            f"--tokens {given['tokens']} is less than one batch, --batch-rows "
            f"{given['batch_rows']}."
        )
    if given["gpu"] and given["device"] != "auto":
        raise click.UsageError("--gpu estimates and --device measures; give one of them.")
    from sae_harvest.train.config import TrainConfig
    from sae_harvest.train.planning.estimate import plan as make_plan

    stored_bytes = 2
    if store is not None:
        d_in, stored_bytes = _of_store(store, site)
    config = TrainConfig(
        n_latents=given["n_latents"],
        k=given["k"],
        tokens=given["tokens"],
        batch_rows=given["batch_rows"],
        # as good as a transcoder for what it takes
        target_site="mlp_out.0" if given["d_out"] else None,
    )
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
    """Width of a site's activations, and the bytes of one number."""
    from sae_harvest.store.reader import ActivationStore

    store = ActivationStore.open(place)
    site = store.site(site)
    return store.width(site), store.read(site, 0, 1).itemsize


def _rates(gpu: str | None, device: str, link: float | None) -> Any:
    """Published or measured rates."""
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
    """Memory of a device; a step by its parts; the whole run."""
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
    """`3 h 12 min`, `5 min 20 s` or `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:,.1f} days"
