"""A search for N2G programs that goes on after an interruption: a few latents at a time, kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.atomic import new_folder, write_text
from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.evaluate.programs import n2g
from sae_harvest.pipelines.evaluate.programs.n2g import Ask, Program
from sae_harvest.pipelines.evaluate.programs.sampled import FiringsOf
from sae_harvest.pipelines.evaluate.programs.suffixes import TokenRows
from sae_harvest.pipelines.features.tables.folder import read_record

LATENTS_AT_ONCE = 8  # latents whose examples are asked together
SETTINGS_FILE = "settings.json"


def sample(alive: npt.NDArray[np.int64], n: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw n of some latents, in increasing order; a larger sample contains a smaller one."""
    return np.sort(np.random.default_rng(seed).permutation(alive)[:n])


class FoundPrograms:
    """Programs of finished latents in a folder, one file each."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Take the folder, and what the programs depend on; other programs in it are removed."""
        self.folder = folder
        if read_record(folder / SETTINGS_FILE) != settings:
            self.remove()
            new_folder(folder)
            write_text(folder / SETTINGS_FILE, json.dumps(settings) + "\n")

    def get(self, latent: int) -> Program | None:
        """Return the program of a latent; None if it is not found yet."""
        path = self._path(latent)
        record = read_record(path)
        if record is None:
            return None
        try:
            patterns = tuple(tuple(map(int, pattern)) for pattern in record["patterns"])
            return Program(patterns, tuple(map(float, record["predictions"])))
        except (KeyError, TypeError, ValueError):
            raise RunError(f"{path} is damaged; remove it and run the same command.") from None

    def put(self, latent: int, program: Program) -> None:
        """Keep the program of a latent."""
        record = {"patterns": program.patterns, "predictions": program.predictions}
        write_text(self._path(latent), json.dumps(record) + "\n")

    def remove(self) -> None:
        """Remove the folder with its programs."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, latent: int) -> Path:
        return self.folder / f"{latent:09d}.json"


def find_programs(
    rows: TokenRows,
    latents: Sequence[int],
    firings_of: FiringsOf,
    ask: Callable[[], tuple[Ask, int]],
    kept: FoundPrograms,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[int, Program]]:
    """Find the N2G programs of latents. Those in `kept` are not searched again.

    Args:
        rows: rows of the store.
        latents: the latents.
        firings_of: gives the firings of a latent on training and on held-out rows.
        ask: returns the arguments `ask` and `padding` of `n2g.find`; called if a program is
            missing.
        kept: finished programs; each is added when it is finished.
        seed: seed of the draw of examples.
        progress: called with latents done and their number.

    Returns:
        the latents with their programs, in the order of `latents`.
    """
    found = {latent: kept.get(latent) for latent in latents}
    missing = [latent for latent, program in found.items() if program is None]
    done = len(latents) - len(missing)
    progress(done, len(latents))
    arguments = ask() if missing else None
    for first in range(0, len(missing), LATENTS_AT_ONCE):
        assert arguments is not None
        some = missing[first : first + LATENTS_AT_ONCE]
        examples = [
            example
            for latent in some
            for example in n2g.examples_of(rows, latent, firings_of(latent)[0], seed)
        ]
        programs = n2g.find(examples, *arguments)
        for latent in some:
            found[latent] = program = programs.get(latent, Program((), ()))
            kept.put(latent, program)
        done += len(some)
        progress(done, len(latents))
    return [(latent, program) for latent, program in found.items() if program is not None]
