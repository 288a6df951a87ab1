"""Caches that delphi has written, read some contexts at a time.

    CACHE/0_1023.safetensors, ...    one hookpoint: see `pipelines.exports.delphi`

A cache is enough for everything that is counted from firings and tokens. It holds neither documents
nor the SAE's weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from sae_harvest.common.errors import InputError
from sae_harvest.common.finite import all_finite
from sae_harvest.common.parsing import first_line, parse_json
from sae_harvest.pipelines.features.encoding.firings import Firings
from sae_harvest.pipelines.features.tables.folder import MAX_LATENTS, Text

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
PIECE = 1 << 24  # bytes of a file in memory during hashing


class _Config(BaseModel):
    """The fields of delphi's CacheConfig that are read."""

    model_name: Text | None = None


@dataclass(frozen=True)
class _Split:
    """A file of the latents [first, end), with firings sorted by context."""

    path: Path
    first: int
    end: int
    n_firings: int

    def below(self, context: int) -> int:
        """Count the firings in the contexts before this one."""
        low, high = 0, self.n_firings
        with safe_open(self.path, "np") as file:
            locations = file.get_slice("locations")
            while low < high:
                middle = (low + high) // 2
                if int(locations[middle : middle + 1][0, 0]) < context:
                    low = middle + 1
                else:
                    high = middle
        return low

    def read(self, low: int, high: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Read locations [firings, 3] and activations of the firings [low, high)."""
        with safe_open(self.path, "np") as file:
            locations = file.get_slice("locations")[low:high].astype(np.int64)
            activations = file.get_slice("activations")[low:high].astype(np.float32)
        return locations, activations


class DelphiCache:
    """The cache of one hookpoint.

    tokens: int32 [contexts, context length]; model_name: as in config.json, None without one.

    Raises:
        InputError: the folder holds no such cache, or one without tokens, or files are damaged or
            missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = {}
        for path in folder.iterdir() if folder.is_dir() else ():
            if match := re.fullmatch(r"(\d{1,10})_(\d{1,10})\.safetensors", path.name, re.ASCII):
                paths[int(match[1])] = path, int(match[2]) + 1
        if not paths:
            raise InputError(
                f"{folder} holds no cache of delphi (files such as 0_1023.safetensors); "
                "give the folder of one hookpoint."
            )
        self._splits: list[_Split] = []
        tokens = None
        for first, (path, end) in sorted(paths.items()):
            if self._splits and first != self._splits[-1].end:
                raise InputError(
                    f"{folder} lacks the file of latent {self._splits[-1].end}; "
                    "have delphi write the cache again."
                )
            try:
                with safe_open(path, "np") as file:
                    n_firings = _n_firings(file)
                    if tokens is None and "tokens" in file.keys():  # noqa: SIM118
                        tokens = _tokens(file.get_tensor("tokens"))
                if not first < end <= MAX_LATENTS:
                    raise ValueError("its name has latent numbers that are not possible")
            except (OSError, SafetensorError, ValueError) as error:
                raise InputError(
                    f"{path} is damaged ({first_line(error)}); have delphi write the cache again."
                ) from error
            self._splits.append(_Split(path, first, end, n_firings))
        if tokens is None:
            raise InputError(
                f"{folder} holds no tokens; have delphi write the cache with save_tokens=True."
            )
        self.tokens: npt.NDArray[np.int32] = tokens
        self.model_name: str | None = self._config().model_name

    @property
    def n_latents(self) -> int:
        """Number of latents, from the names of the files."""
        return self._splits[-1].end

    @property
    def n_rows(self) -> int:
        return self.tokens.size

    @property
    def n_firings(self) -> int:
        """Number of stored activations, including negative ones."""
        return sum(split.n_firings for split in self._splits)

    @property
    def context_length(self) -> int:
        return self.tokens.shape[1]

    def digest(self) -> str:
        """Hash of the cache's files; the folder's name does not matter."""
        state = xxhash.xxh3_128()
        for split in self._splits:
            state.update(split.path.name.encode())
            with split.path.open("rb") as file:
                while piece := file.read(PIECE):
                    state.update(piece)
        return state.hexdigest()

    def firings(self, first: int, last: int) -> Firings:
        """Return the firings in the contexts [first, last).

        delphi stores negative activations as well; here only those above 0 are firings.

        Raises:
            InputError: a file is not sorted by context, as delphi's are, or has impossible values.
        """
        parts = []
        for split in self._splits:
            low = split.below(first) if first > 0 else 0
            high = split.below(last) if last < len(self.tokens) else split.n_firings
            locations, value = split.read(low, high)
            inside = (locations >= 0).all(axis=1)
            inside &= (locations[:, 0] >= first) & (locations[:, 0] < last)
            inside &= locations[:, 1] < self.context_length
            inside &= locations[:, 2] < split.end - split.first
            if not inside.all():
                raise InputError(
                    f"{split.path} is not sorted by context, or has firings past its tokens; "
                    "have delphi write the cache again."
                )
            if not all_finite(value):
                raise InputError(f"{split.path} holds activations that are not finite numbers.")
            row = (locations[:, 0] - first) * self.context_length + locations[:, 1]
            parts.append((locations[:, 2] + split.first, row, value))
        latent, row, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        fires = value > 0
        latent, row, value = latent[fires], row[fires], value[fires]
        order = np.lexsort((row, latent))
        starts = np.searchsorted(latent[order], np.arange(self.n_latents + 1))
        first_row = first * self.context_length
        return Firings(first_row, 0, starts, row[order].astype(np.int32), value[order])

    def _config(self) -> _Config:
        path = self.folder / CONFIG
        try:
            return _Config.model_validate(parse_json(path.read_bytes(), MAX_CONFIG_BYTES))
        except FileNotFoundError:
            return _Config()
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({first_line(error)}); repair it.") from None


def _n_firings(file: Any) -> int:
    """Count the firings of an open file; `ValueError` if its tensors are not a cache's."""
    locations, activations = file.get_slice("locations"), file.get_slice("activations")
    shape, n = locations.get_shape(), activations.get_shape()
    if len(shape) != 2 or shape[1] != 3 or locations.get_dtype()[0] not in "IU":
        raise ValueError(f"its locations are {locations.get_dtype()} {shape}")
    if n != shape[:1] or activations.get_dtype() not in ("F16", "F32"):
        raise ValueError(f"its activations are {activations.get_dtype()} {n}")
    return int(shape[0])


def _tokens(tokens: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Check token ids [contexts, context length]; `ValueError` if they are not valid."""
    whole = tokens.ndim == 2 and tokens.size and np.issubdtype(tokens.dtype, np.integer)
    if not whole or tokens.min() < 0 or tokens.max() >= 2**31:
        raise ValueError(f"its tokens are {tokens.dtype} {list(tokens.shape)}, or negative")
    return tokens.astype(np.int32)
