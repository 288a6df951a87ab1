"""The safetensors files of a model's folder, and the hash that identifies them.

A folder has `model.safetensors`, or several files that `model.safetensors.index.json` names.
"""

from __future__ import annotations

from pathlib import Path

import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.common.parsing import first_line, parse_json, safe_name
from sae_harvest.store.objects import file_hash

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_index(folder: Path) -> None:
    """Check the files that the folder's index names, if the folder has and needs an index.

    Raises:
        InputError: the index cannot be read, or names a file that is missing or outside the folder.
    """
    if (folder / WHOLE).is_file():
        return
    try:
        content = parse_json((folder / INDEX).read_bytes())
        names = set(content["weight_map"].values())
        for name in sorted(map(safe_name, names)):
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder} lacks {name}, which {INDEX} names; copy or download it again."
                )
    except (OSError, ValueError) as error:
        raise _damaged(folder, first_line(error)) from None
    except (KeyError, TypeError, AttributeError):
        raise _damaged(folder, "it has no weight_map from tensors to files") from None


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder / INDEX} cannot be read as an index ({reason}); copy or download it again."
    )


def weights_hash(folder: Path) -> str:
    """Compute the xxh3-128, in hex, of the names and bytes of all weights in the folder.

    Raises:
        InputError: a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            digest.update(f"{file.name} {file_hash(file)}\n".encode())
        except OSError as error:
            raise InputError(
                f"{file} cannot be read ({error.strerror}); check its permissions, or copy or "
                "download it again."
            ) from error
    return digest.hexdigest()
