"""PyTorch's .pt files: written as dictionaries of tensors, read without running what they hold.

A .pt file is a pickle, a program that builds objects and may call anything. PyTorch's restricted
unpickler (weights_only) knows tensors and plain values only and refuses the rest.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from store.atomic import replacing
from store.errors import InputError, RunError, SaeHarvestError


def write_pt(path: Path, value: dict[str, Any]) -> None:
    """Writes the file. Raises RunError if it cannot be written."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # its writer complains of the end of a file that is cut
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def read_pt(path: Path) -> dict[str, Any]:
    """The dictionary in the file, its tensors on the CPU.

    Raises:
        InputError: there is no file, or it holds more than tensors and plain values.
        RunError: it is damaged.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a .pt file.")
    try:
        with warnings.catch_warnings(action="ignore"):  # about bytes that it then refuses
            value = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise _refusal(path) from None
    except Exception as error:  # what damaged bytes make of an unpickler is anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path} is damaged ({reason}); copy it again.") from None
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, expected a dictionary of tensors; give the "
            "file of an SAE."
        )
    return value


def _refusal(path: Path) -> SaeHarvestError:
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a file of torch.save, so that nothing in it has a name
        names = []
    if not names:
        return RunError(f"{path} is damaged, or not a .pt file; copy it again.")
    return InputError(
        f"{path} holds more than tensors and plain values ({', '.join(names[:3])}), which only "
        "unsafe pickle could load, and that can run any code; save its state_dict alone."
    )
