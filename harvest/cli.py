"""The `harvest` command: plan, run, status, verify, show."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from store.console import Commands, output, progress

DEFAULT_TOKENS = 1_048_576
DEFAULT_CORPUS = "news"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Activations of a language model over text, in a store that zarr and dask can read.

    \b
    harvest run --model gpt2 --layer 8
    harvest run --model smollm2-135m --corpus news --layer 12 --tokens 262144
    """


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `plan` and `run` share."""
    options = [
        click.option("--model", required=True, help="Hub id, folder, .gguf file or smollm2-135m."),
        click.option(
            "--corpus",
            default=DEFAULT_CORPUS,
            show_default=True,
            help="Hub dataset id; a text, JSONL, CSV or Parquet file or a folder of them; or "
            "news, the packaged one.",
        ),
        click.option("--dataset-config", help="Configuration of a hub dataset."),
        click.option("--split", default="train", show_default=True, help="Of a hub dataset."),
        click.option("--revision", help="Of a hub dataset."),
        click.option("--text-column", help="Column of the text; found by itself if usual."),
        click.option("--layer", type=int, multiple=True, help="N means the site resid_post.N."),
        click.option(
            "--site",
            multiple=True,
            help="KIND.LAYER, several times for several; kinds: resid_pre, resid_mid, resid_post, "
            "attn_out, mlp_out, mlp_act (the neurons).",
        ),
        click.option(
            "--tokens",
            type=click.IntRange(min=1),
            default=DEFAULT_TOKENS,
            show_default=True,
            help="Tokens to store.",
        ),
        click.option(
            "--context-length",
            type=click.IntRange(min=2),
            default=128,
            show_default=True,
            help="Tokens the model sees at a time.",
        ),
        click.option(
            "--bos",
            type=click.Choice(["auto", "none", "context"]),
            default="auto",
            show_default=True,
            help="BOS token at position 0 of each context?",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Of the shuffling of contexts.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float16", "float32"]),
            default="float16",
            show_default=True,
            help="Of the stored activations.",
        ),
        click.option(
            "--compute-dtype",
            type=click.Choice(["auto", "bfloat16", "float32"]),
            default="auto",
            show_default=True,
            help="Of the forward pass.",
        ),
        click.option(
            "--shard-rows",
            type=click.IntRange(min=1),
            default=65_536,
            show_default=True,
            help="Rows per shard: what a killed worker loses.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def make_config(given: dict[str, Any]) -> Any:
    """The HarvestConfig of the options; a usage error if no site was named."""
    from harvest.config import HarvestConfig
    from harvest.corpus import CorpusSpec

    sites = tuple(given["site"]) + tuple(f"resid_post.{layer}" for layer in given["layer"])
    if not sites:
        raise click.UsageError("Name what to record: --layer 8, or --site mlp_out.8.")
    corpus = CorpusSpec(
        name=given["corpus"],
        config=given["dataset_config"],
        split=given["split"],
        revision=given["revision"],
        text_column=given["text_column"],
    )
    same = (
        "model",
        "tokens",
        "context_length",
        "bos",
        "seed",
        "dtype",
        "compute_dtype",
        "shard_rows",
    )
    return HarvestConfig(corpus=corpus, sites=sites, **{name: given[name] for name in same})


@main.command()
@request_options
def plan(**given: Any) -> None:
    """Print what a harvest would take, before any work.

    \b
    harvest plan --model smollm2-135m --layer 12 --tokens 262144
    """
    from harvest.plan import estimate

    table = Table("what", Column("value", overflow="fold"), box=None)
    for name, value in estimate(make_config(given), given["device"]).items():
        table.add_row(name, value)
    output().print(table)


@main.command()
@request_options
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Folder to write; default runs/MODEL-SITE/store.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Ray workers; 0 runs in this process without Ray.",
)
def run(store: Path | None, workers: int, **given: Any) -> None:
    """Harvest activations; the same command, run again, continues.

    \b
    harvest run --model gpt2 --layer 8
    """
    config = make_config(given)
    if store is None:
        name = Path(given["model"]).resolve().name
        store = Path("runs") / f"{name}-{'-'.join(config.sites)}" / "store"
    result = harvest_with_bar(config, store, workers, given["device"])
    rate = f", {result.rows_run / result.seconds:,.0f} tokens/s" if result.rows_run else ""
    output().print(
        f"{store}: {result.plan.n_rows:,} rows of {', '.join(config.sites)}, "
        f"{result.rows_run:,} of them now{rate}. Digest {result.digest}.",
        soft_wrap=True,
    )


def harvest_with_bar(config: Any, store: Path, workers: int, device: str) -> Any:
    """`harvest.run.run` under a progress bar."""
    from harvest.run import run as harvest

    with progress("tokens") as bar:
        task = bar.add_task("preparing", total=None, rate="")
        start = 0.0

        def show(done: int, todo: int) -> None:
            nonlocal start
            start = start or time.perf_counter()
            seconds = time.perf_counter() - start
            rate = f"{done / seconds:,.0f} tokens/s" if seconds > 1 else ""
            bar.update(task, description="harvesting", completed=done, total=todo, rate=rate)

        return harvest(config, store, workers, device, show)


store_option = click.option(
    "--store", type=click.Path(path_type=Path), required=True, help="The store's folder."
)


@main.command()
@store_option
def status(store: Path) -> None:
    """How far a harvest is.

    \b
    harvest status --store runs/demo/store
    """
    from store.layout import SEALED_KEY, Plan
    from store.writer import committed_shards, read_plan_record

    the_plan = Plan.model_validate(read_plan_record(store)["plan"])
    done = len(committed_shards(store, the_plan))
    state = "sealed" if (store / SEALED_KEY).exists() else "unfinished"
    output().print(
        f"{store}: {done} of {the_plan.n_shards} shards committed, {state}.", soft_wrap=True
    )


@main.command()
@store_option
def verify(store: Path) -> None:
    """Re-read and re-hash every object; name each damaged one.

    \b
    harvest verify --store runs/demo/store
    """
    from store.errors import DamagedError
    from store.verify import verify as check

    with progress("shards") as bar:
        task = bar.add_task("verifying", total=None, rate="")
        report = check(store, lambda done, total: bar.update(task, completed=done, total=total))
    for sentence in report.damage:
        click.echo(sentence, err=True)
    for path in report.leftovers:
        click.echo(f"{path} is left over from a killed writer; it is not data.", err=True)
    if report.damage:
        raise DamagedError(f"{store} has {len(report.damage)} damaged objects, named above.")
    digest = f"Digest {report.digest}." if report.digest else "Not sealed yet."
    output().print(
        f"{store}: {report.shards} shards, {report.objects} objects, {report.n_bytes:,} bytes, "
        f"all as committed. {digest}",
        soft_wrap=True,
    )


@main.command()
@store_option
def show(store: Path) -> None:
    """What a store holds: model, text, sites, statistics, outlier rows.

    \b
    harvest show --store runs/demo/store
    """
    from harvest.show import describe

    for table in describe(store):
        output().print(table)
