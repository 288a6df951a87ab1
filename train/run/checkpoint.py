"""Checkpoints: whole or absent, checked when read; the newest two are kept.

The files are the same for any number of processes. Each process writes and reads its part of them
(`train.parallel.checkpoint_shards`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_harvest.common.atomic import sync_folder
from sae_harvest.common.errors import RunError
from sae_harvest.train.parallel.checkpoint_shards import hash_files, read_slices, write_slices
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.run.files import read_record, write_json
from sae_harvest.train.run.records import State
from sae_harvest.train.sae.sae import CONFIG_FILE, SAE, TENSORS_FILE
from sae_harvest.train.sae.sharded_sae import load_part, save_part

FOLDER, STATE_FILE, OPTIMIZER_FILE = "checkpoints", "state.json", "optimizer.safetensors"
TEMPORARY = ".unfinished-"
NAME = re.compile(r"[0-9]{6}|[1-9][0-9]{6,17}")  # of a step, as `_folder` spells it
KEPT = 2
HASHED = (CONFIG_FILE, TENSORS_FILE, OPTIMIZER_FILE)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was read."""

    sae: SAE
    """The last weights."""
    tensors: dict[str, Tensor]
    """Tensors of the optimizer."""
    state: dict[str, Any]
    """Numbers of the run."""


def saved_steps(out: Path) -> list[int]:
    """Return the steps of the finished checkpoints of a run, oldest first."""
    found = (path.name for path in (out / FOLDER).glob("*"))
    return sorted(int(name) for name in found if NAME.fullmatch(name))


def _folder(out: Path, step: int) -> Path:
    return out / FOLDER / f"{step:06d}"


def discard_after(out: Path, step: int) -> None:
    """Remove newer checkpoints: their steps will be done again."""
    for newer in saved_steps(out):
        if newer > step:
            _remove(_folder(out, newer))


def _remove(folder: Path) -> None:
    """Remove a checkpoint. The first rename already makes it invalid."""
    aside = folder.with_name(f"{TEMPORARY}{folder.name}")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    shutil.rmtree(aside)


def save_checkpoint(
    out: Path,
    step: int,
    sae: SAE,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    n_latents: int | None = None,
    group: ProcessGroup | None = None,
) -> Path:
    """Write `OUT/checkpoints/<step>` under a temporary name, rename it, remove older ones.

    Args:
        sae, tensors: this process's part of the tensors that are divided by latents.
        n_latents: number of latents of all processes; None for that of `sae`.
        group: the processes that train together; all call this. None for this process alone.
    """
    group = group or ProcessGroup()
    n_latents = sae.config.n_latents if n_latents is None else n_latents
    folder = out / FOLDER
    final = _folder(out, step)
    temporary = folder / f"{TEMPORARY}{final.name}"

    def begin() -> None:
        if group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob(f"{TEMPORARY}*"):  # left by a run that was killed
                shutil.rmtree(left_over)
            temporary.mkdir()

    def end() -> None:
        if group.rank == 0:
            write_json(temporary / STATE_FILE, {"step": step, **state, "xxh3": hashes})
            temporary.rename(final)
            sync_folder(folder)
            for old in saved_steps(out)[:-KEPT]:
                _remove(_folder(out, old))

    group.together(begin)
    save_part(temporary, sae, n_latents, group)
    write_slices(temporary / OPTIMIZER_FILE, tensors, n_latents, group)
    hashes = hash_files([temporary / name for name in HASHED], group)
    group.together(end)
    return final


def load_checkpoint(
    out: Path, step: int, device: str, group: ProcessGroup | None = None
) -> Checkpoint:
    """Return the checkpoint of a run at a step, with this process's part of divided tensors.

    Raises:
        RunError: the checkpoint is damaged; names the file.
    """
    group = group or ProcessGroup()
    folder = _folder(out, step)
    earlier = [other for other in saved_steps(out) if other < step]
    go_on = f"from {_folder(out, earlier[-1]).name}" if earlier else "from the start"
    what, remedy = f"Checkpoint {folder}", f"delete that folder to go on {go_on}"
    state = group.together(lambda: _read_state(folder, what, remedy))
    hashes = hash_files([folder / name for name in HASHED], group)
    for name in HASHED:
        if hashes[name] != state["xxh3"][name]:
            raise RunError(f"{what} has a damaged {name}; {remedy}.")
    sae, n_latents = load_part(folder, device, group)
    tensors = read_slices(folder / OPTIMIZER_FILE, what, remedy, device, n_latents, group)
    return Checkpoint(sae, tensors, state)


def _read_state(folder: Path, what: str, remedy: str) -> dict[str, Any]:
    state = read_record(folder / STATE_FILE, State, what, remedy)
    if state["step"] != int(folder.name) or set(state["xxh3"]) != set(HASHED):
        raise RunError(f"{what} has a {STATE_FILE} that is not its own; {remedy}.")
    for name in HASHED:
        if not (folder / name).is_file():
            raise RunError(f"{what} lacks {name}; {remedy}.")
    return state
