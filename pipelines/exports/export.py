"""Feature tables written in the format of another package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.exports import circuit_tracer, delphi, neuronpedia, openai
from pipelines.exports.selection import parse_latents
from pipelines.exports.tables import Tables
from store.errors import InputError, RunError
from store.objects import make_folder

BY_LATENT = {
    "neuronpedia": neuronpedia.write,
    "openai": openai.write,
    "circuit-tracer": circuit_tracer.write,
}

Progress = Callable[[int, int], None]  # how many are done, of how many


def export(
    features: Sequence[Path],
    out: Path,
    format_name: str,
    *,
    latents: str | None = None,
    name: str | None = None,
    store: str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> int:
    """Write the tables of one or more folders into a new folder; the number of latents.

    Args:
        format_name: delphi, neuronpedia, openai or circuit-tracer.
        latents: `0-99,512`; None for all.
        name: what the SAE is called there.
        store: place of the store, for delphi, if it is not where it was when the tables were built.

    Raises:
        InputError: an option does not fit.
        RunError: no tables, damaged ones, or `out` holds something or cannot be written.
    """
    if name is not None and (Path(name).name != name or name in (".", "..")):
        raise InputError(f"--name {name!r} cannot be the name of a folder; leave slashes out.")
    all_tables = [Tables(folder) for folder in features]
    ranges = [parse_latents(latents, tables.n_latents) for tables in all_tables]
    n_latents = sum(len(some) for each in ranges for some in each)
    done = 0
    total = n_latents
    if format_name == "delphi":
        total = sum(len(tables.firing_files()) for tables in all_tables)

    def on_one() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    with new_folder(out) as folder:
        on_progress(0, total)
        if format_name == "delphi":
            delphi.write(all_tables, ranges, folder, name, on_one, store)
        else:
            BY_LATENT[format_name](all_tables, ranges, folder, name, on_one)
    return n_latents


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which is called `out` once all of it is there.

    Raises:
        RunError: there is something, or it cannot be written.
    """
    refusal = f"{out} holds something already; choose another --out."
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(refusal)
    folder = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}")
    try:
        make_folder(folder)
        yield folder
        folder.rename(out.absolute())
    except OSError as error:
        raise RunError(
            f"Cannot write the export into {out}: {error.strerror or error}; "
            "choose another --out or make room there."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
