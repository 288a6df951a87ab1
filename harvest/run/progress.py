"""A harvest with its progress shown in the terminal or the log."""

from __future__ import annotations

from pathlib import Path

from sae_harvest.common.console import Progress, when_interrupted
from sae_harvest.common.errors import SaeHarvestError
from sae_harvest.common.paths import shown
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, Result, run
from sae_harvest.store.commits import committed_shards
from sae_harvest.store.objects import open_objects


def harvest_with_progress(
    config: HarvestConfig, store: str | Path, execution: Execution, only: range | None = None
) -> Result:
    """See `harvest.run.driver.run`."""
    with when_interrupted(lambda: interruption_note(store)), Progress("tokens") as progress:
        report = progress.counting("harvesting", tokens_rate)
        return run(config, store, execution, only, report, progress.say)


def tokens_rate(speed: float) -> str:
    """Format a speed."""
    return f"{speed:,.0f} tokens/s"


def interruption_note(store: str | Path) -> str:
    """Write the sentence about an interrupted harvest: its state, and how to continue."""
    try:
        n = len(committed_shards(open_objects(store)))
    except SaeHarvestError as error:  # a bucket that cannot be reached now
        return f"Committed shards are kept ({error}) The same command continues."
    return f"{n} shard{'s' * (n != 1)} committed in {shown(store)}; the same command continues."
