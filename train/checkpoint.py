"""Checkpoints: whole or absent, checked when read, the newest two kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from store.errors import RunError
from store.objects import file_hash, sync_folder
from train.files import (
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from train.sae import CONFIG_FILE, SAE, TENSORS_FILE

FOLDER, STATE_FILE, OPTIMIZER_FILE = "checkpoints", "state.json", "optimizer.safetensors"
TEMPORARY = ".unfinished-"
KEPT = 2
HASHED = (CONFIG_FILE, TENSORS_FILE, OPTIMIZER_FILE)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back: the last weights, tensors of the optimiser, numbers of the run."""

    sae: SAE
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def _checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = (path for path in (out / FOLDER).glob("*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))


def save_checkpoint(
    out: Path, step: int, sae: SAE, tensors: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Writes `OUT/checkpoints/<step>` under a temporary name, renames it, drops older ones."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{TEMPORARY}*"):  # of a run that was killed while writing
        shutil.rmtree(left_over)
    final = folder / f"{step:06d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    temporary.mkdir()
    sae.save(temporary)
    write_tensors(temporary / OPTIMIZER_FILE, tensors)
    hashes = {name: file_hash(temporary / name) for name in HASHED}
    write_json(temporary / STATE_FILE, {"step": step, **state, "xxh3": hashes})
    temporary.rename(final)
    sync_folder(folder)
    for old in _checkpoints(out)[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_newest(out: Path, device: str) -> Checkpoint | None:
    """The newest checkpoint of a run, or None if it has none yet.

    Raises:
        RunError: it is damaged; names the file.
    """
    found = _checkpoints(out)
    if not found:
        return None
    folder = found[-1]
    go_on = f"from {found[-2].name}" if len(found) > 1 else "from the start"
    what, remedy = f"Checkpoint {folder}", f"delete that folder to go on {go_on}"
    state = read_json(folder / STATE_FILE, what, remedy)
    if not isinstance(state, dict) or "xxh3" not in state or state.get("step") != int(folder.name):
        raise RunError(f"{what} has a {STATE_FILE} that is not its own; {remedy}.")
    for name, expected in state["xxh3"].items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"{what} lacks {name}; {remedy}.")
        if file_hash(path) != expected:
            raise RunError(f"{what} has a damaged {name}; {remedy}.")
    tensors = read_tensors(folder / OPTIMIZER_FILE, what, remedy, device)
    return Checkpoint(SAE.load(folder, device), tensors, state)
