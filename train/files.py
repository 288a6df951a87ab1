"""Writing and reading small files so that a crash leaves the old one or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from store.atomic import replacing, write_text
from store.errors import RunError
from store.parsing import first_line


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON. Raises RunError if it cannot be written."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file. Raises RunError if it cannot be written."""
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(content, temporary)
        except SafetensorError as error:  # of the disk: "I/O error: … (os error 28)"
            raise os_error(error) from error


def os_error(error: SafetensorError) -> OSError:
    """The error of the system that safetensors reports in its text."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else first_line(error))


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
