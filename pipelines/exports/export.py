"""Feature tables written in the format of another package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sae_harvest.common.errors import InputError
from sae_harvest.common.parsing import safe_name
from sae_harvest.pipelines.exports import circuit_tracer, delphi, neuronpedia, openai
from sae_harvest.pipelines.exports.files import new_folder
from sae_harvest.pipelines.exports.selection import parse_latents
from sae_harvest.pipelines.exports.tables import Tables
from sae_harvest.pipelines.features.tables.folder import firing_files
from sae_harvest.pipelines.source import Locations

BY_LATENT = {
    "neuronpedia": neuronpedia.write,
    "openai": openai.write,
    "circuit-tracer": circuit_tracer.write,
}

OnProgress = Callable[[int, int], None]  # number done, number in all


def export(
    features: Sequence[Path],
    out: Path,
    format_name: str,
    *,
    latents: str | None = None,
    name: str | None = None,
    store: str | None = None,
    model: str | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> int:
    """Write the tables of one or more folders into a new folder; return the number of latents.

    Args:
        format_name: delphi, neuronpedia, openai or circuit-tracer.
        latents: `0-99,512`; None for all.
        name: name of the SAE in the export.
        store, model: places of the store and its model, for delphi, if they have moved since the
            tables were built.

    Raises:
        InputError: an option does not fit.
        RunError: tables are missing or damaged, or `out` is not empty or cannot be written.
    """
    if name is not None:
        _check_name(name)
    all_tables = [Tables(folder) for folder in features]
    ranges = [parse_latents(latents, tables.n_latents) for tables in all_tables]
    n_latents = sum(len(some) for each in ranges for some in each)
    done = 0
    total = n_latents
    if format_name == "delphi":
        total = sum(len(firing_files(tables.features)) for tables in all_tables)

    def on_one() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    with new_folder(out) as folder:
        on_progress(0, total)
        if format_name == "delphi":
            moved = Locations(stores=[store] if store else [], models=[model] if model else [])
            delphi.write(all_tables, ranges, folder, name, on_one, moved)
        else:
            BY_LATENT[format_name](all_tables, ranges, folder, name, on_one)
    return n_latents


def _check_name(name: str) -> None:
    """Raise `InputError` if a name cannot be the name of a folder."""
    try:
        if "/" in safe_name(name):
            raise ValueError("it has a slash")
    except ValueError as error:
        raise InputError(
            f"--name {name!a:.80} cannot be the name of a folder ({error}); leave slashes out."
        ) from None
