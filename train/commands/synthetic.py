"""`train-sae synthetic`: a store of known features, to judge SAEs by what they should learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sae_harvest.common.console import Progress
from sae_harvest.common.options import Command
from sae_harvest.common.paths import shown
from sae_harvest.common.settings import config_file_option, options_for, settings_of
from sae_harvest.train.synthetic.config import (
    SyntheticConfig,
    SyntheticPlaces,
    SyntheticSettings,
)


@click.command(cls=Command)
@config_file_option
@options_for(settings_of(SyntheticPlaces))
@options_for(settings_of(SyntheticConfig))
@click.pass_context
def synthetic(context: click.Context, file: Path | None, **given: Any) -> None:
    """Write a store of known features, with every firing of them, or continue it.

    Train on OUT/store. OUT/ground_truth has the features' directions, their hierarchy, and the
    rows on which each fires.

    \b
    train-sae synthetic --out runs/synthetic --features 512 --width 128 --rows 65536
    """
    settings = SyntheticSettings.of(context, file)
    out, config = Path(settings.places().out), settings.config()
    from sae_harvest.train.synthetic.store import GROUND_TRUTH, STORE, make

    with Progress("rows") as progress:
        made = make(config, out, progress.counting("writing"))
    store = made.store
    click.echo(
        f"Wrote {store.n_rows:,} rows of {config.features:,} features in {config.width:,} "
        f"dimensions to {shown(out / STORE)}; {shown(out / GROUND_TRUTH)} says what is true of "
        "them."
    )
