"""The report as one HTML page: tables, plots, and a sentence for each metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from sae_harvest.pipelines.evaluate.baselines import RANDOM
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF, Figure
from sae_harvest.pipelines.evaluate.probing.summary import EVERY_TASK
from sae_harvest.pipelines.evaluate.report.definitions import DEFINITIONS, SECTIONS, Definition
from sae_harvest.pipelines.evaluate.report.measure import Evaluation
from sae_harvest.pipelines.evaluate.report.parts import Curve
from sae_harvest.pipelines.evaluate.report.sentences import sentences
from sae_harvest.pipelines.evaluate.report.svg import COLOURS, Series, plot


@dataclass(frozen=True, slots=True)
class CurvePlot:
    """A plot of one kind of curve, with a line for each subject."""

    curve: str
    """Name of the curves."""

    section: str
    """Section of the page."""

    title: str
    """Heading."""

    x_label: str
    """Horizontal axis."""

    y_label: str
    """Vertical axis."""

    log_y: bool = False
    """True if the vertical axis is logarithmic."""


LOSS = "Downstream loss"
L0, N = "L0", "number of latents"
PLOTS = (
    CurvePlot("fvu by position", "Reconstruction", "FVU by position", "position", "FVU"),
    CurvePlot(
        "fvu by dimension", "Reconstruction", "FVU of each dimension, sorted",
        "share of dimensions", "FVU",
    ),
    CurvePlot(
        "density", "Reconstruction", "How often latents fire",
        "log10 of the share of rows", "number of latents",
    ),
    CurvePlot("l0", "Reconstruction", "Active latents per row", "active latents", "share of rows"),
    CurvePlot("delta_ce by position", LOSS, "ΔCE by position", "position", "ΔCE (nats)"),
    CurvePlot("kl by position", LOSS, "KL by position", "position", "KL (nats)", log_y=True),
)  # fmt: skip
# section, metric, part, horizontal axis, heading
FRONTIERS = (
    ("Reconstruction", "fvu", "without outliers", L0, "FVU against L0"),
    ("Downstream loss", "delta_ce", "predicted tokens", L0, "ΔCE against L0"),
    ("Probe loss", "probe_loss_relative", EVERY_TASK, N, "Probe loss against n"),
)
HIDDEN = ("mean", "zero")  # curves that would flatten the others


def page(evaluations: Sequence[Evaluation], title: str, command: str) -> str:
    """Return the page of some evaluated SAEs as HTML text.

    Args:
        evaluations: the SAEs with their parts.
        title: heading of the page.
        command: the command that makes the page again.
    """
    names = _subjects(evaluations)
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    body = [
        f"<h1>{escape(title)}</h1>",
        *(line for evaluation in evaluations for line in _introduction(evaluation)),
        "<p>Each value has its 95 % interval below it, from a bootstrap over documents. Values "
        "without an interval are exact counts. Beside each SAE stand baselines that know nothing: "
        "a metric in which they do as well says nothing about the SAE.</p>",
    ]
    measured = {
        figure.metric
        for evaluation in evaluations
        for part in evaluation.parts.values()
        for figure in part.figures
    }
    for section, metrics in SECTIONS.items():
        if not measured & set(metrics):
            continue
        body += [f"<h2>{escape(section)}</h2>", *_notes(evaluations, section)]
        body += [_meanings(measured, metrics), _table(evaluations, metrics)]
        body.append(_plots(evaluations, section, colours))
    body.append(f"<h2>Made by</h2><p><code>{escape(command)}</code></p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{files(__package__).joinpath('page.css').read_text()}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def label_of(evaluation: Evaluation, subject: str, single: bool) -> str:
    """Return the name of a subject in tables and legends."""
    if single:
        return subject
    return evaluation.name if subject == SAE_ITSELF else f"{evaluation.name}: {subject}"


def _subjects(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the names of all subjects in order, without repetition."""
    single = len(evaluations) == 1
    found = [
        label_of(evaluation, figure.subject, single)
        for evaluation in evaluations
        for part in evaluation.parts.values()
        for figure in part.figures
    ]
    return list(dict.fromkeys(found))


def _introduction(evaluation: Evaluation) -> Iterator[str]:
    """Yield the SAE's origin, and what its figures say."""
    yield f'<p class="quiet">{escape(_origin(evaluation))}</p>'
    yield f"<p>{escape(' '.join(sentences(evaluation)))}</p>"


def _origin(evaluation: Evaluation) -> str:
    if len(evaluation.saes) > 1:
        return f"{evaluation.name}: all of them in one forward pass, each at its own site."
    [sae] = evaluation.saes
    config = sae.config
    target = "" if config.target_site is None else f", predicts {config.target_site}"
    k = "" if config.k is None else f", k {config.k}"
    return (
        f"{evaluation.name}: {config.activation}, {config.n_latents:,} latents{k}, "
        f"{config.site}{target} of {config.model or 'an unnamed model'}, digest {sae.digest[:12]}"
    )


PARTS_OF = {
    "Reconstruction": ("reconstruction",),
    "Downstream loss": ("downstream", "compute"),
    "Ablations": ("ablation",),
    "Recovery of known features": ("recovery",),
    "Probe loss": ("probes", "tasks"),
    "Programs": ("programs",),
}


def _notes(evaluations: Sequence[Evaluation], section: str) -> Iterator[str]:
    """Yield what was measured for a section: sample sizes, rows left out."""
    for evaluation in evaluations:
        for name in PARTS_OF.get(section, ()):
            part = evaluation.parts.get(name)
            for note in [] if part is None else part.notes:
                whose = "" if len(evaluations) == 1 else f"{evaluation.name}: "
                yield f'<p class="quiet">{escape(whose + note)}</p>'


def _table(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> str:
    """Return a table: a line for each subject, a column for each metric, by part of the data."""
    single = len(evaluations) == 1
    found: dict[str, dict[str, dict[str, Figure]]] = {}  # part → subject → metric → figure
    for evaluation in evaluations:
        for part in evaluation.parts.values():
            for figure in part.figures:
                if figure.metric in metrics:
                    subject = label_of(evaluation, figure.subject, single)
                    of_part = found.setdefault(figure.part, {})
                    of_part.setdefault(subject, {})[figure.metric] = figure
    shown = [
        m for m in metrics if any(m in row for part in found.values() for row in part.values())
    ]
    head = "".join(f"<th>{escape(_heading(DEFINITIONS[metric]))}</th>" for metric in shown)
    lines = []
    for name, subjects in found.items():
        count = next(iter(next(iter(subjects.values())).values()))
        what = f"{name}" if name == "weights" else f"{name}: {count.count:,} {count.unit}"
        lines.append(f'<tr class="part"><td colspan="{len(shown) + 1}">{escape(what)}</td></tr>')
        for subject, figures in subjects.items():
            cells = "".join(_cell(figures.get(metric), DEFINITIONS[metric]) for metric in shown)
            lines.append(f"<tr><td>{escape(subject)}</td>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _heading(definition: Definition) -> str:
    arrow = {"lower": " ↓", "higher": " ↑", "": ""}[definition.better]
    return definition.title + arrow


def _cell(figure: Figure | None, definition: Definition) -> str:
    if figure is None or figure.value is None:
        return "<td>–</td>"
    text = format(figure.value, definition.form)
    if figure.low is not None and figure.high is not None:
        low, high = (format(limit, definition.form) for limit in (figure.low, figure.high))
        return f"<td>{text}<small>{low} to {high}</small></td>"
    return f"<td>{text}</td>"


def _plots(evaluations: Sequence[Evaluation], section: str, colours: dict[str, str]) -> str:
    single = len(evaluations) == 1
    figures = []
    for of_section, metric, part, x_label, title in FRONTIERS:
        if of_section == section and not single:  # baselines of one SAE all have its L0
            series = list(_frontier(evaluations, metric, part, x_label))
            if not series:
                continue
            definition = DEFINITIONS[metric]
            log = min((y for one in series for y in one.y if y is not None), default=0) > 0
            drawn = plot(series, x_label, definition.title, colours, log_x=x_label == N, log_y=log)
            figures.append(_figure(title, drawn, series, colours))
    for wanted in PLOTS:
        series = [
            Series(label_of(evaluation, curve.subject, single), curve.x, curve.y)
            for evaluation in evaluations
            for part_ in evaluation.parts.values()
            for curve in part_.curves
            if curve.name == wanted.curve and curve.subject not in HIDDEN and _varies(curve)
        ]
        if wanted.section == section and series:
            drawn = plot(series, wanted.x_label, wanted.y_label, colours, log_y=wanted.log_y)
            figures.append(_figure(wanted.title, drawn, series, colours))
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _varies(curve: Curve) -> bool:
    """Return whether a curve shows more than one number; the L0 of TopK SAEs does not."""
    return curve.name != "l0" or sum(value is not None and value > 0 for value in curve.y) > 1


def _frontier(
    evaluations: Sequence[Evaluation], metric: str, part: str, x_label: str
) -> Iterator[Series]:
    """Yield a point for each subject that has both a value of the metric and a place on the axis.

    The number of latents is that of the SAE and of random directions; other baselines have another.
    """
    single = len(evaluations) == 1
    for evaluation in evaluations:
        figures = [figure for part_ in evaluation.parts.values() for figure in part_.figures]
        if x_label == L0:
            places = {
                f.subject: f.value
                for f in figures
                if (f.metric, f.part) == ("l0", "without outliers")
            }
        else:
            places = dict.fromkeys((SAE_ITSELF, RANDOM), evaluation.saes[0].config.n_latents)
        for figure in figures:
            x = places.get(figure.subject)
            if (figure.metric, figure.part) == (metric, part) and x and figure.value is not None:
                name = label_of(evaluation, figure.subject, single)
                yield Series(name, [x], [figure.value], points=True)


def _figure(title: str, drawn: str, series: Sequence[Series], colours: dict[str, str]) -> str:
    legend = "".join(
        f'<span><i style="background:{colours[one.name]}"></i>{escape(one.name)}</span>'
        for one in series
    )
    return f'<figure><h3>{escape(title)}</h3>{drawn}<div class="legend">{legend}</div></figure>'


def _meanings(measured: set[str], metrics: Sequence[str]) -> str:
    """Return what each measured metric of a section says."""
    terms = [
        f"<dt>{escape(DEFINITIONS[metric].title)}</dt><dd>{escape(DEFINITIONS[metric].meaning)}</dd>"
        for metric in metrics
        if metric in measured
    ]
    return f"<dl>{''.join(terms)}</dl>"
