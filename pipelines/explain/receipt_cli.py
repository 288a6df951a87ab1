"""`sae-features receipt`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from sae_harvest.common.console import output
from sae_harvest.common.errors import RunError
from sae_harvest.common.options import Command, PlaceOption, grouped
from sae_harvest.pipelines.options import features_option

SHOWN_ROWS = 10


@click.command(cls=Command)
@click.argument("identity", metavar="ID")
@features_option
@grouped("Moved", "--store", type=PlaceOption(), help="The store, if it has moved.")
def receipt(identity: str, features: Path, store: str | None) -> None:
    """Compute the scores of an explanation again, and say whether they still hold.

    ID is the column id of explanations.parquet, or its beginning. Activations and documents are
    read from the firings and the store; the answers of the language model are those in the tables.
    The command fails if anything differs.

    \b
    sae-features query "SELECT id, explanation FROM explanations WHERE latent = 2 AND chosen"
    """
    from sae_harvest.pipelines.explain.receipts import receipt as derive
    from sae_harvest.pipelines.source import Locations

    found = derive(features, identity, Locations(stores=() if store is None else [store]))
    row = found.explanation
    say = output().print
    say(f"Latent {row['latent']}: {row['explanation']}", soft_wrap=True, markup=False)
    rows = ", ".join(f"{number:,}" for number in row["rows"][:SHOWN_ROWS])
    more = len(row["rows"]) - SHOWN_ROWS
    say(
        f"Written by {row['model']}, prompt {row['prompt']}, from the excerpts at rows {rows}"
        + (f" and {more} more." if more > 0 else "."),
        soft_wrap=True,
        markup=False,
    )
    table = Table(box=None)
    for heading in ("score", "in the table", "computed again", "95 % interval", ""):
        table.add_column(heading)
    for score in found.scores:
        derived = score.derived
        limits = "" if derived.low is None else f"{derived.low:.3f} to {derived.high:.3f}"
        table.add_row(
            f"{score.task}, {score.part}: {score.metric}",
            _number(score.recorded),
            _number(derived.value),
            limits,
            "" if score.holds else "differs",
        )
    say(table)
    for sentence in found.differences:
        say(sentence, soft_wrap=True)
    if not found.holds:
        raise RunError(
            "The receipt does not hold: store, firings or tables changed after the explanation "
            "was scored; explain the latent again."
        )
    say("Everything holds.")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
