"""PyTorch's .pt files: written as dictionaries of tensors, read without running code in them.

A .pt file is a pickle, a program that builds objects and may call anything. PyTorch's restricted
unpickler (weights_only) knows tensors and plain values only and refuses the rest.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from sae_harvest.common.atomic import replacing
from sae_harvest.common.errors import InputError, RunError, SaeHarvestError
from sae_harvest.common.parsing import first_line


def write_pt(path: Path, value: dict[str, Any]) -> None:
    """Write the file. Raises RunError if it cannot be written."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's writer reports a cut file instead of the cause
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def read_pt(path: Path) -> dict[str, Any]:
    """Return the dictionary in the file, its tensors on the CPU.

    Raises:
        InputError: there is no file, or it holds more than tensors and plain values.
        RunError: it is damaged.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a .pt file.")
    _check_size(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings about bytes that it then refuses
            value = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise _refusal(path) from None
    except Exception as error:  # damaged bytes can raise any exception
        raise RunError(f"{path} is damaged ({first_line(error)}); copy it again.") from None
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, expected a dictionary of tensors; give the "
            "file of an SAE."
        )
    return value


def _check_size(path: Path) -> None:
    """Raise `RunError` if the file has compressed entries.

    A .pt file is a zip archive; torch.save does not compress its entries. Compressed entries would
    be read as well, and may expand a thousandfold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type for entry in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return  # not an archive, or a damaged one: torch.load reports it
    if compressed:
        raise RunError(
            f"{path} has compressed entries, which torch.save does not write; save it "
            "again with torch.save."
        )


def _refusal(path: Path) -> SaeHarvestError:
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a file of torch.save
        names = []
    if not names:
        return RunError(f"{path} is damaged, or not a .pt file; copy it again.")
    shown = ", ".join(map(ascii, names[:3]))
    return InputError(
        f"{path} holds more than tensors and plain values ({shown}), which only unsafe "
        "pickle could load, and that can run any code; save its state_dict alone."
    )
