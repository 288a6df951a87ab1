"""Writing and reading small files so that a crash leaves the old one or the new one, whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from store.errors import RunError
from store.objects import sync_folder


def _replace(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes the file under a temporary name, syncs it, renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file under a temporary name, syncs it, renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    _replace(temporary, path)


def read_json(path: Path, what: str, remedy: str) -> Any:
    """The file's JSON; `RunError` naming the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{what} lacks {path.name} in {path.parent}; {remedy}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{what} has an unreadable file {path} ({error}); {remedy}.") from None


def read_tensors(path: Path, what: str, remedy: str, device: str = "cpu") -> dict[str, Tensor]:
    """The file's tensors; `RunError` naming the file if it is missing or damaged."""
    try:
        return load_file(path, device=device)
    except FileNotFoundError:
        raise RunError(f"{what} lacks {path.name} in {path.parent}; {remedy}.") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{what} has a damaged file {path} ({error}); {remedy}.") from None
