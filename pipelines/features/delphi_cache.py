"""Caches that delphi has written, some contexts at a time.

    CACHE/0_1023.safetensors, ...    of one hookpoint: see `pipelines.exports.delphi`

What a cache holds is enough for all that is counted from firings and tokens. It says nothing of
documents, and nothing of the SAE's weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open

from pipelines.features.firings import Firings
from store.errors import InputError

CONFIG = "config.json"
PIECE = 1 << 24  # bytes of a file in memory, where it is read for its digest


@dataclass(frozen=True)
class _Split:
    """A file: latents [first, end), firings sorted by context."""

    path: Path
    first: int
    end: int
    n_firings: int

    def below(self, context: int) -> int:
        """Firings in the contexts before this one."""
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
        """Locations [firings, 3] and activations of the firings [low, high)."""
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
        for path in folder.glob("*.safetensors") if folder.is_dir() else ():
            if match := re.fullmatch(r"(\d+)_(\d+)", path.stem):
                paths[int(match[1])] = path, int(match[2]) + 1
        if not paths:
            raise InputError(
                f"{folder} holds no cache of delphi's (files such as 0_1023.safetensors); "
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
                    n_firings = file.get_slice("locations").get_shape()[0]
                    if tokens is None and "tokens" in file.keys():  # noqa: SIM118
                        tokens = file.get_tensor("tokens").astype(np.int32)
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{path} is damaged ({error}); have delphi write the cache again."
                ) from error
            self._splits.append(_Split(path, first, end, n_firings))
        if tokens is None:
            raise InputError(
                f"{folder} holds no tokens; have delphi write the cache with save_tokens=True."
            )
        self.tokens: npt.NDArray[np.int32] = tokens
        config = self._config()
        self.model_name: str | None = config.get("model_name")

    @property
    def n_latents(self) -> int:
        """Up to the last one that a file is called after."""
        return self._splits[-1].end

    @property
    def n_rows(self) -> int:
        return self.tokens.size

    @property
    def n_firings(self) -> int:
        """Negative ones as well."""
        return sum(split.n_firings for split in self._splits)

    @property
    def context_length(self) -> int:
        return self.tokens.shape[1]

    def digest(self) -> str:
        """Of the files, whatever the folder is called."""
        state = xxhash.xxh3_128()
        for split in self._splits:
            state.update(split.path.name.encode())
            with split.path.open("rb") as file:
                while piece := file.read(PIECE):
                    state.update(piece)
        return state.hexdigest()

    def firings(self, first: int, last: int) -> Firings:
        """What fires in the contexts [first, last).

        delphi keeps negative activations as well; here only those above 0 are firings.

        Raises:
            InputError: a file is not sorted by context, as delphi's are.
        """
        parts = []
        for split in self._splits:
            low = split.below(first) if first > 0 else 0
            high = split.below(last) if last < len(self.tokens) else split.n_firings
            locations, value = split.read(low, high)
            inside = (locations[:, 0] >= first) & (locations[:, 0] < last)
            if not inside.all() or (locations[:, 1] >= self.context_length).any():
                raise InputError(
                    f"{split.path} is not sorted by context, or says more than its tokens do; "
                    "have delphi write the cache again."
                )
            row = (locations[:, 0] - first) * self.context_length + locations[:, 1]
            parts.append((locations[:, 2] + split.first, row, value))
        latent, row, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        fires = value > 0
        latent, row, value = latent[fires], row[fires], value[fires]
        order = np.lexsort((row, latent))
        starts = np.searchsorted(latent[order], np.arange(self.n_latents + 1))
        first_row = first * self.context_length
        return Firings(first_row, 0, starts, row[order].astype(np.int32), value[order])

    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / CONFIG).read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder / CONFIG} is damaged ({error}); mend it.") from None
        return config if isinstance(config, dict) else {}
