"""An SAE with latents divided among processes: saving, loading, and use as a whole."""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from sae_harvest.common.atomic import new_folder, write_text
from sae_harvest.common.errors import RunError
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.parallel.checkpoint_shards import read_slices, write_slices
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.run.files import reading_tensors, require_finite
from sae_harvest.train.sae.normalization import restore
from sae_harvest.train.sae.sae import CONFIG_FILE, REMEDY, SAE, TENSORS_FILE

READ_BYTES = 64 << 20


def whole_config(sae: SAE, n_latents: int) -> SAEConfig:
    """Return the configuration of the whole SAE, from one part."""
    return sae.config.model_copy(update={"n_latents": n_latents})


def save_part(folder: Path, sae: SAE, n_latents: int, group: ProcessGroup) -> None:
    """Save the SAE; each process writes its part. The bytes are those of `SAE.save`."""
    group.together(lambda: new_folder(folder))
    write_slices(folder / TENSORS_FILE, sae.tensors(), n_latents, group)
    config = whole_config(sae, n_latents)

    def end() -> None:
        if group.rank == 0:
            write_text(folder / CONFIG_FILE, config.model_dump_json(indent=2) + "\n")

    group.together(end)


def load_part(folder: Path, device: str, group: ProcessGroup) -> tuple[SAE, int]:
    """Return this process's part of the SAE in a folder, and the number of all its latents.

    Raises:
        InputError, RunError: see `SAE.load`.
    """
    config = SAE.read_config(folder)
    tensors = read_slices(folder / TENSORS_FILE, "The SAE", REMEDY, device, config.n_latents, group)
    require_finite(tensors, folder / TENSORS_FILE, REMEDY)
    first, last = group.latents(config.n_latents)
    # a part may have fewer latents than k: not validated again
    part = config.model_copy(update={"n_latents": last - first})
    return SAE(part, **tensors), config.n_latents


def digest_of(folder: Path) -> str:
    """Return the `SAE.digest` of the SAE in a folder, read piece by piece.

    Raises:
        InputError, RunError: see `SAE.load`.
    """
    config = SAE.read_config(folder)
    state = xxhash.xxh3_128(config.model_dump_json().encode())
    path, shapes = folder / TENSORS_FILE, SAE.shapes(config)
    with reading_tensors(path, "The SAE", REMEDY), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        found = {name: tuple(whole.get_shape()) for name, whole in slices.items()}
        if found != shapes or any(whole.get_dtype() != "F32" for whole in slices.values()):
            raise RunError(
                f"{path} has tensors {found}, expected float32 {shapes} as {CONFIG_FILE} says; "
                f"{REMEDY}."
            )
        for name, whole in slices.items():
            state.update(name.encode())
            rows, *width = found[name]
            step = max(1, READ_BYTES // (4 * (width[0] if width else 1)))
            for first in range(0, rows, step):
                state.update(whole[first : first + step].contiguous().numpy().data)
    return state.hexdigest()


class ShardedSAE:
    """An SAE with latents divided among processes, used like a whole `SAE`.

    All processes call its methods with the same rows and get the same results, for all latents.
    """

    def __init__(self, part: SAE, n_latents: int, group: ProcessGroup, digest: str = "") -> None:
        """`digest` is that of the whole SAE, needed only in the process that records it."""
        self.config, self.digest = whole_config(part, n_latents), digest
        k = part.config.k and min(part.config.k, part.config.n_latents)
        self._part = SAE(part.config.model_copy(update={"k": k}), **part.tensors())
        self._group = group
        self._first, self._last = group.latents(n_latents)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices int32 [batch, w] and values float32 [batch, w], as `SAE.encode` does."""
        indices, values = self._part.encode(x)  # [batch, own w]
        indices = indices + self._first
        indices, values = self._group.gather_pairs(indices, values)  # [batch, all w]
        # parts are in order, so the lower of two latents with equal values is first
        values, order = values.sort(dim=1, descending=True, stable=True)
        width = max(1, int((values > 0).sum(1).max()))
        if self.config.activation == "topk" and self.config.k is not None:
            width = self.config.k
        order = order[:, :width]  # [batch, w]
        return indices.gather(1, order), values[:, :width].contiguous()

    def decode(self, indices: Tensor, values: Tensor, x: Tensor | None = None) -> Tensor:
        """Return reconstructions, float32 [batch, d_out], as `SAE.decode` does."""
        part = self._part
        here = (indices >= self._first) & (indices < self._last)
        local = (indices - self._first).masked_fill(~here, -1).int().contiguous()  # [batch, w]
        out = torch.zeros(len(indices), self.config.width_out, device=part.device)
        part.kernels.decode(local, values, part.W_dec, out)
        self._group.sum_latents(out).add_(part.b_dec)
        return restore(out, None if x is None else part.check_rows(x), self.config)


Dictionary = SAE | ShardedSAE
