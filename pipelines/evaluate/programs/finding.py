"""A search for N2G programs that goes on after an interruption: a few latents at a time, kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
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

Found = tuple[Program, Program]  # without and with exceptions
KEYS = ("program", "with_exceptions")
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

    def get(self, latent: int) -> Found | None:
        """Return the programs of a latent; None if they are not found yet."""
        path = self._path(latent)
        record = read_record(path)
        if record is None:
            return None
        try:
            plain, extended = (_parsed(record[key]) for key in KEYS)
            return plain, extended
        except (KeyError, TypeError, ValueError):
            raise RunError(f"{path} is damaged; remove it and run the same command.") from None

    def put(self, latent: int, found: Found) -> None:
        """Keep the programs of a latent."""
        record = {key: asdict(program) for key, program in zip(KEYS, found, strict=True)}
        write_text(self._path(latent), json.dumps(record) + "\n")

    def remove(self) -> None:
        """Remove the folder with its programs."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, latent: int) -> Path:
        return self.folder / f"{latent:09d}.json"


def _parsed(record: dict[str, Any]) -> Program:
    """Return a program from JSON; KeyError, TypeError or ValueError if it is none."""
    patterns = tuple(tuple(map(int, pattern)) for pattern in record["patterns"])
    predictions = tuple(map(float, record["predictions"]))
    if len(patterns) != len(predictions) or not all(patterns):
        raise ValueError
    return Program(patterns, predictions)


def find_programs(
    rows: TokenRows,
    latents: Sequence[int],
    firings_of: FiringsOf,
    ask: Callable[[], tuple[Ask, int]],
    kept: FoundPrograms,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, Found]:
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
        the programs of each latent, without and with exceptions, in the order of `latents`.
    """
    found = {latent: kept.get(latent) for latent in latents}
    missing = [latent for latent, one in found.items() if one is None]
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
        programs = {latent: Program((), ()) for latent in some} | n2g.find(examples, *arguments)
        counterexamples = [
            example
            for latent in some
            for example in n2g.counterexamples_of(
                rows, latent, firings_of(latent)[0], programs[latent], seed
            )
        ]
        extended = n2g.with_exceptions(programs, counterexamples, *arguments)
        for latent in some:
            found[latent] = one = programs[latent], extended[latent]
            kept.put(latent, one)
        done += len(some)
        progress(done, len(latents))
    return {latent: one for latent, one in found.items() if one is not None}
