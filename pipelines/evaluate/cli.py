"""The `train-sae` command with its evaluation, which needs the model and the feature tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from sae_harvest.common.console import Progress, device_option, output, store_option
from sae_harvest.common.options import Command, PathOption
from sae_harvest.common.paths import shown
from sae_harvest.common.settings import options_for, settings_of
from sae_harvest.pipelines.evaluate.report.settings import EvaluationSettings
from sae_harvest.train.commands.cli import main
from sae_harvest.train.commands.summary import summary
from sae_harvest.train.run.progress import warn

if TYPE_CHECKING:
    from sae_harvest.pipelines.evaluate.figures import Figure
    from sae_harvest.pipelines.evaluate.report.measure import Evaluation


@main.command("eval", cls=Command)
@click.option(
    "--sae",
    "saes",
    type=PathOption(file_okay=False),
    required=True,
    multiple=True,
    help="Folder of a trained SAE. Several may be given, to compare them.",
)
@store_option
@click.option(
    "--features",
    type=PathOption(file_okay=False),
    multiple=True,
    help="Folder of the SAE's feature tables over the store, for programs; needs --report.",
)
@options_for(settings_of(EvaluationSettings))
@device_option
@click.option(
    "--report",
    type=PathOption(file_okay=False),
    help="Folder of a report: metrics.parquet and report.html, with baselines and intervals. An "
    "evaluation that was stopped continues.",
)
@click.option(
    "--out",
    type=PathOption(dir_okay=False),
    help="JSON file for the reconstruction figures; for one SAE.",
)
def evaluation(
    saes: tuple[Path, ...],
    store: str,
    features: tuple[Path, ...],
    device: str,
    report: Path | None,
    out: Path | None,
    **given: Any,
) -> None:
    """Evaluate SAEs on held-out rows of a store, and in the model.

    Without --report, only the reconstruction is evaluated.

    \b
    train-sae eval --sae runs/demo/sae --store runs/demo/store
    train-sae eval --sae runs/demo/sae --store runs/demo/store --features runs/demo/features \\
        --report runs/demo/report
    """
    settings = EvaluationSettings(**{name: v for name, v in given.items() if v is not None})
    if out is not None and (len(saes) > 1 or report is not None):
        raise click.UsageError("--out takes one SAE and no --report; give one of both.")
    if report is None:
        if features:
            raise click.UsageError("--features needs --report; give both.")
        found = reconstruction_only(saes, store, settings.rows, device)
        if out is not None:
            from sae_harvest.train.run.files import write_json

            write_json(out, found[shown(saes[0])])
        warn(found)
        output().print(summary(found))
        return
    from sae_harvest.pipelines.evaluate.report.write import PAGE, write_report

    command = repeated(saes, store, features, settings, report)
    with Progress() as progress:
        evaluations = write_report(
            report, store, saes, features, settings, device, progress.counting, command
        )
    output().print(headlines(evaluations))
    click.echo(f"The report is in {shown(report / PAGE)}.")


def repeated(
    saes: Sequence[Path],
    store: str,
    features: Sequence[Path],
    settings: EvaluationSettings,
    report: Path,
) -> str:
    """Return the command that makes the same report."""
    words = ["train-sae", "eval", *(word for sae in saes for word in ("--sae", shown(sae)))]
    words += [word for folder in features for word in ("--features", shown(folder))]
    words += ["--store", store, "--report", shown(report)]
    for name, value in settings.model_dump(exclude_defaults=True).items():
        option = name.replace("_", "-")
        words += [f"--no-{option}"] if value is False else [f"--{option}", str(value)]
    return shlex.join(words)


def reconstruction_only(
    saes: Sequence[Path], store: str, rows: int, device: str
) -> dict[str, dict[str, Any]]:
    """Evaluate each SAE's reconstruction as training does; return the figures by name."""
    from sae_harvest.common.device import choose_device
    from sae_harvest.store.reader import ActivationStore
    from sae_harvest.train.evaluate import evaluate
    from sae_harvest.train.sae.sae import SAE

    found = {}
    with Progress("rows") as progress:
        opened = None
        for path in saes:
            sae = SAE.load(path, choose_device(device))
            opened = opened or ActivationStore.open(store)
            count = progress.counting("evaluating")
            found[shown(path)] = evaluate(sae, opened, sae.config.rule, rows, count)
    return found


HEADLINES = (("fvu", "without outliers"), ("l0", "without outliers"), ("delta_ce", None))


def headlines(evaluations: Sequence[Evaluation]) -> Table:
    """Return the most quoted figures of each SAE and its baselines as a table."""
    from sae_harvest.pipelines.evaluate.report.definitions import DEFINITIONS

    single = len(evaluations) == 1
    table = Table("judged", title=evaluations[0].name if single else None, box=None)
    for metric, _ in HEADLINES:
        table.add_column(DEFINITIONS[metric].title)
    for evaluation in evaluations:
        figures = [figure for part in evaluation.parts.values() for figure in part.figures]
        shown_metrics = {metric for metric, _ in HEADLINES}
        judged = (figure.subject for figure in figures if figure.metric in shown_metrics)
        for subject in dict.fromkeys(judged):
            cells = [_value(figures, subject, metric, part) for metric, part in HEADLINES]
            table.add_row(subject if single else f"{evaluation.name}: {subject}", *cells)
    return table


def _value(figures: Sequence[Figure], subject: str, metric: str, part: str | None) -> str:
    """Return a figure with its interval as text."""
    from sae_harvest.pipelines.evaluate.report.definitions import DEFINITIONS

    form = DEFINITIONS[metric].form
    for figure in figures:
        wanted = (figure.subject, figure.metric) == (subject, metric)
        if wanted and part in (None, figure.part) and figure.value is not None:
            value = format(figure.value, form)
            if figure.low is None or figure.high is None:
                return value
            return f"{value} ({figure.low:{form}}–{figure.high:{form}})"
    return "-"


if __name__ == "__main__":
    main()
