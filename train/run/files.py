"""Writing and reading small files so that a crash leaves the old one or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_harvest.common.atomic import replacing, write_text
from sae_harvest.common.errors import RunError
from sae_harvest.common.parsing import first_line, parse_json

MAX_RECORD_BYTES = 64 << 20  # sweep.json of 10,000 members has a quarter


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON. Raises RunError if it cannot be written."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file. Raises RunError if it cannot be written."""
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(content, temporary)
        except SafetensorError as error:  # a fault of the disk: "I/O error: … (os error 28)"
            raise os_error(error) from error


def os_error(error: SafetensorError) -> OSError:
    """Return the system's error that safetensors reports in its text."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else first_line(error))


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Return the file's JSON. Raise `RunError`, naming the file, if it is missing or not JSON."""
    try:
        with path.open("rb") as file:
            return parse_json(file.read(MAX_RECORD_BYTES + 1), MAX_RECORD_BYTES)
    except FileNotFoundError:
        raise RunError(f"{what} lacks {path.name} in {path.parent}; {remedy}.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{what} has an unreadable file {path} ({error}); {remedy}.") from None


def read_record(path: Path, kind: type[BaseModel], what: str, remedy: str) -> dict[str, Any]:
    """Return the file's JSON object. Raise `RunError` if it is not a record of the kind."""
    values = read_json(path, what, remedy)
    try:
        kind.model_validate(values)
    except ValidationError as error:
        raise RunError(f"{what} has a damaged {path} ({first_line(error)}); {remedy}.") from None
    found: dict[str, Any] = values
    return found


def read_tensors(path: Path, what: str, remedy: str, device: str = "cpu") -> dict[str, Tensor]:
    """Return the file's tensors. Raise `RunError`, naming the file, if it is missing or damaged."""
    with reading_tensors(path, what, remedy):
        return load_file(path, device=device)


@contextmanager
def reading_tensors(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Report that a safetensors file is missing or damaged, in a RunError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise RunError(f"{what} lacks {path.name} in {path.parent}; {remedy}.") from None
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{what} has a damaged file {path} ({first_line(error)}); {remedy}."
        ) from None


def require_finite(tensors: Mapping[str, Tensor], path: Path, remedy: str) -> None:
    """Raise `RunError` if one of the float32 tensors of a file has infinity or NaN."""
    for name, tensor in tensors.items():
        # infinity and NaN are the largest and the smallest, and NaN is both
        if tensor.numel() and not all(map(isfinite, map(float, tensor.aminmax()))):
            raise RunError(f"{path} has numbers in {name} that are not finite; {remedy}.")
