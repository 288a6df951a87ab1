"""An evaluation in a few sentences, for a reader who has never seen the metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sae_harvest.pipelines.evaluate.baselines import CHANNELS, PCA, RANDOM
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF, Figure
from sae_harvest.pipelines.evaluate.probing.summary import EVERY_TASK
from sae_harvest.pipelines.evaluate.programs.scoring import NGRAMS
from sae_harvest.pipelines.evaluate.report.measure import Evaluation

RIVALS = (PCA, CHANNELS, RANDOM)  # baselines that an SAE should beat


def sentences(evaluation: Evaluation) -> Iterator[str]:
    """Yield what the figures of an SAE say; a sentence for each kind of metric."""
    found = {
        (figure.metric, figure.part, figure.subject): figure
        for part in evaluation.parts.values()
        for figure in part.figures
    }
    fvu = _of(found, "fvu", "without outliers")
    l0 = _of(found, "l0", "without outliers").get(SAE_ITSELF)
    if SAE_ITSELF in fvu and l0 is not None:
        yield (
            f"With {l0.value:.1f} active latents per row, the SAE leaves "
            f"{_percent(fvu[SAE_ITSELF])} of the variance unexplained; "
            f"{_rivals(fvu, 'leaves', _percent)}."
        )
    delta = _of(found, "delta_ce", "predicted tokens")
    if SAE_ITSELF in delta:
        zeros = f"; zeros cost {_number(delta['zero'])}" if "zero" in delta else ""
        yield (
            f"In place of the activations, its output costs the model {_number(delta[SAE_ITSELF])} "
            f"nats per token; {_rivals(delta, 'costs', _number)}{zeros}."
        )
    share = _of(found, "compute_share", "predicted tokens").get(SAE_ITSELF)
    if share is not None:
        yield (
            f"That is the loss of a model trained with {_percent(share)} of the compute, by the "
            "table of compute and loss."
        )
    probes = _of(found, "probe_loss_test_relative", EVERY_TASK)
    if SAE_ITSELF in probes:
        yield (
            "On other documents, a probe on its best latent has on average "
            f"{_percent(probes[SAE_ITSELF])} of the loss of a constant; "
            f"{_rivals(probes, 'has', _percent)}."
        )
    programs = _of(found, "program_f1", NGRAMS)
    if {SAE_ITSELF, RANDOM} <= set(programs):
        yield (
            "The tokens before a row predict where its latents fire with a mean F1 of "
            f"{_number(programs[SAE_ITSELF])}, those of a random dictionary with "
            f"{_number(programs[RANDOM])}."
        )
    recovered = _of(found, "found_share", "without outliers").get(SAE_ITSELF)
    if recovered is not None:
        yield f"It has found {_percent(recovered)} of the known features."
    dead = _of(found, "dead_share", "without outliers").get(SAE_ITSELF)
    if dead is not None:
        yield f"{_percent(dead)} of its latents fired on none of {dead.count:,} rows."


def _of(found: dict[tuple[str, str, str], Figure], metric: str, part: str) -> dict[str, Figure]:
    """Return the figures of one metric that have a value, by subject."""
    return {
        subject: figure
        for (name, of_part, subject), figure in found.items()
        if (name, of_part) == (metric, part) and figure.value is not None
    }


def _rivals(figures: dict[str, Figure], verb: str, form: Callable[[Figure], str]) -> str:
    """Return what the best baseline does, in words."""
    rivals = [figures[name] for name in RIVALS if name in figures]
    if not rivals:
        return "no baseline was measured"
    best = min(rivals, key=lambda figure: figure.value or 0.0)
    return f"the best baseline, {best.subject}, {verb} {form(best)}"


def _percent(figure: Figure) -> str:
    assert figure.value is not None
    return f"{100 * figure.value:.3g} %" + _limits(figure, 100, ".3g")


def _number(figure: Figure) -> str:
    assert figure.value is not None
    return f"{figure.value:.3f}" + _limits(figure, 1, ".3f")


def _limits(figure: Figure, factor: float, form: str) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f" ({factor * figure.low:{form}} to {factor * figure.high:{form}})"
