"""Runs and sweeps, with progress in the terminal or the log, and warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sae_harvest.common.console import Progress
from sae_harvest.common.paths import shown


def train_with_progress(
    config: Any,
    store: str | Path,
    out: Path,
    site: str | None,
    device: str,
    cluster: dict[str, Any] | None = None,
) -> Any:
    """Train with progress; see `train.run.trainer.train` or, with `cluster`, `ray_train`."""
    with Progress() as progress:
        if cluster is None:
            from sae_harvest.train.run.trainer import train

            result = train(config, store, out, site, device, progress)
        else:
            from sae_harvest.train.parallel.ray_train import train_on_workers

            result = train_on_workers(config, store, out, site, device, report=progress, **cluster)
    warn({shown(out): result.evaluation})
    return result


def sweep_with_progress(found: Any, out: Path) -> Any:
    """Run a sweep with progress; see `train.sweeps.sweep.sweep`."""
    from sae_harvest.train.sweeps.sweep import sweep as train_all

    places = found.places
    with Progress() as progress:
        result = train_all(
            found.members,
            places.store,
            out,
            places.site,
            places.device,
            progress,
            progress.say,
        )
    warn({name: member.evaluation for name, member in result.members.items()})
    return result


def warn(evaluations: dict[str, Any]) -> None:
    """Print the problems that evaluations show on standard error."""
    from sae_harvest.train.evaluate import remarks

    for name, evaluation in evaluations.items():
        for sentence in remarks(evaluation) if evaluation is not None else ():
            click.echo(f"Warning: {name}: {sentence}", err=True)
