"""`sae-features explain`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from sae_harvest.common.console import (
    SAME_COMMAND,
    Progress,
    output,
    when_interrupted,
)
from sae_harvest.common.options import Command, PathOption, PlaceOption, grouped
from sae_harvest.common.paths import shown
from sae_harvest.common.settings import options_for, settings_of
from sae_harvest.pipelines.explain.config import ExplainConfig
from sae_harvest.pipelines.explain.options import client_options, open_client
from sae_harvest.pipelines.options import features_option

if TYPE_CHECKING:
    from sae_harvest.pipelines.explain.client.estimate import Estimate
    from sae_harvest.pipelines.explain.client.interface import Client, Tally
    from sae_harvest.pipelines.explain.run import Summary

ANSWERS = "answers.sqlite"
LATENTS = "0:40"
HEADLINES = (
    ("simulation", "all firings", "pearson"),
    ("simulation", "top firings", "pearson"),
    ("detection", "random", "auprc"),
    ("detection", "token", "auprc"),
    ("detection", "neighbour", "auprc"),
    ("fuzzing", "wrong tokens", "auprc"),
    ("intruder", "random", "accuracy"),
)

# heading → subjects; the best of them is shown
COLUMNS = {
    "score": ("explanation", "latent"),
    "program": ("tokens", "ngrams", "n2g", "n2g_exceptions"),
    "other": ("another latent's explanation",),
    "shuffled": ("shuffled labels",),
    "constant": ("constant",),
}


@click.command(cls=Command)
@features_option
@click.option(
    "--latents",
    default=LATENTS,
    show_default=True,
    help="Latents: numbers and ranges such as 3,5,10:20 (20 is left out); random:100; or all.",
)
@options_for(settings_of(ExplainConfig))
@client_options
@grouped(
    "Language model",
    "--prompts",
    type=PathOption(file_okay=False),
    help="Folder of prompts that take the place of packaged ones, such as explain.txt.",
)
@grouped("Moved", "--store", type=PlaceOption(), help="The store, if it has moved.")
@grouped("Moved", "--sae", type=PathOption(), help="The SAE, if it has moved; for revisions.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Ask nothing, write nothing; print how many tokens would be read and written.",
)
@click.option(
    "--prices",
    metavar="READ,WRITTEN",
    help="Prices of a million tokens, such as 0.15,0.60; --dry-run prints the cost.",
)
def explain(
    features: Path,
    latents: str,
    prompts: Path | None,
    store: str | None,
    sae: Path | None,
    dry_run: bool,
    prices: str | None,
    **given: Any,
) -> None:
    """Explain latents by a language model, and score the explanations: explanations.parquet.

    Every answer is kept in FEATURES/answers.sqlite, so the same command continues after an
    interruption, and asks nothing twice.

    \b
    sae-features explain --features runs/demo/features --latents 0:4
    sae-features query "SELECT latent, explanation, useful FROM explanations WHERE chosen"
    """
    from sae_harvest.pipelines.explain.client.cache import CachedClient
    from sae_harvest.pipelines.explain.dry import DryClient
    from sae_harvest.pipelines.explain.excerpts import EvidenceSource
    from sae_harvest.pipelines.explain.latents import chosen_latents
    from sae_harvest.pipelines.explain.prompts import load_prompts
    from sae_harvest.pipelines.explain.revising import LiveReader
    from sae_harvest.pipelines.explain.run import explain as run
    from sae_harvest.pipelines.source import Locations

    device = given["device"]
    asked_client = open_client(given)
    config = ExplainConfig(**{name: v for name, v in given.items() if v is not None})
    moved = Locations(saes=() if sae is None else [sae], stores=() if store is None else [store])
    source = EvidenceSource(features, config.excerpt_tokens, moved)
    wanted = chosen_latents(latents, source.alive(), source.n_latents)
    read_prompts = load_prompts(prompts)
    if dry_run:
        dry = DryClient(asked_client.reads, getattr(asked_client, "n_tokens", None))
        config = config.model_copy(update={"revisions": 0})
        run(features, dry, wanted, config, read_prompts, moved, write=False)
        say_estimate(dry.estimate, len(wanted), prices)
        return
    client = CachedClient(asked_client, features / ANSWERS)
    reader = LiveReader(features, device, moved) if config.revisions else None
    with when_interrupted(SAME_COMMAND), Progress() as progress:
        summary = run(
            features,
            client,
            wanted,
            config,
            read_prompts,
            moved,
            lambda stage, done, total: progress(stage, done, total, ""),
            reader,
        )
    report(features, client, summary)


def say_estimate(estimate: Estimate, n_latents: int, prices: str | None) -> None:
    """Print what a run would ask, and its cost."""
    from sae_harvest.pipelines.explain.client.estimate import Prices

    output().print(f"{n_latents:,} latents: {estimate}", soft_wrap=True)
    if prices is None:
        return
    try:
        read, written = map(float, prices.split(","))
    except ValueError:
        raise click.UsageError(
            f"--prices {prices!r:.40} is not understood; give two numbers such as 0.15,0.60."
        ) from None
    cost = estimate.cost(Prices(read, written))
    output().print(f"At these prices, at most {cost:,.2f}.")


def report(features: Path, client: Client, summary: Summary) -> None:
    """Print what was done, the mean scores beside their floors, and failures."""
    say = output().print
    if summary.scores:
        say(means(summary.scores))
    parts = [f"{summary.explained:,} latents have an explanation"]
    parts += [f"{summary.useful:,} of them beat their programs"] if summary.useful else []
    parts += [f"{summary.revised:,} were revised"] if summary.revised else []
    for numbers, what in (
        (summary.silent, "have no active excerpt to explain from"),
        (summary.failed, "have none, since every request failed"),
    ):
        if numbers:
            parts.append(f"{len(numbers):,} {what} ({', '.join(map(str, numbers[:10]))})")
    say(f"{'; '.join(parts)}.", soft_wrap=True)
    say(f"{asked(client.tally)} The tables are in {shown(features)}.", soft_wrap=True)


def asked(tally: Tally) -> str:
    """Return what a client has done as sentences."""
    text = (
        f"{tally.asked:,} requests were sent, {tally.cached:,} answered from the cache; "
        f"{tally.prompt_tokens:,} tokens read, {tally.new_tokens:,} written."
    )
    if failures := sum(tally.failures.values()):
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in tally.failures.most_common())
        text += f" {failures:,} requests failed: {kinds}. No score contains them."
    return text


def means(rows: list[dict[str, Any]]) -> Table:
    """Return the means over latents of the most quoted scores, each beside its floors."""
    table = Table(box=None, title="means over latents")
    table.add_column("", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    values: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row["value"] is not None:
            values[row["task"], row["part"], row["metric"], row["subject"]].append(row["value"])
    for headline in HEADLINES:
        cells = []
        for subjects in COLUMNS.values():
            known = (values[*headline, subject] for subject in subjects)
            found = [mean(some) for some in known if some]
            cells.append(f"{max(found):.3f}" if found else "")
        if any(cells):
            task, part, metric = headline
            table.add_row(f"{task}, {part}: {metric}", *cells)
    return table
