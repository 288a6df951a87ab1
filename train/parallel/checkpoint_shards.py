"""Safetensors files that several processes write and read together, each process its part.

A latent is a row, so the latents [first, last) of a tensor are a range of the file's bytes. The
first process writes the header and gives the file its size; then each process writes its
rows in their place. The first process writes the tensors that are not divided by latents (biases of
the model's width). The bytes are the same as from a single process, so any number of processes can
read the file, and no process ever holds the whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from sae_harvest.common.atomic import publish, temporary_name
from sae_harvest.common.errors import RunError
from sae_harvest.common.safetensors_stream import Header, make_header
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.run.files import reading_tensors

BLOCK_BYTES = 64 << 20  # bytes written at a time, through CPU memory
HASH_BYTES = 1 << 30  # bytes of a file that one process hashes at a time; part of the format
READ_BYTES = 8 << 20
UNDIVIDED = ("b_dec", "b_in")  # tensors of the model's width; every process has all of them
DTYPES = {torch.int64: "I64", torch.float32: "F32"}  # in the order safetensors gives them


@dataclass(frozen=True)
class Place:
    """The place of a tensor in a file."""

    dtype: torch.dtype
    """Dtype of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: int
    """Offset of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape[1:])


def is_divided(name: str) -> bool:
    """Whether a tensor such as W_enc or first.W_enc has a row for each latent."""
    return name.rpartition(".")[2] not in UNDIVIDED


def write_slices(
    path: Path, tensors: dict[str, Tensor], n_latents: int, group: ProcessGroup
) -> None:
    """Write a file under a temporary name, sync it, rename it. All processes call it.

    Args:
        path: final path of the file.
        tensors: this process's rows of divided tensors, other tensors whole.
        n_latents: number of latents of all processes.
        group: the processes.

    Raises:
        RunError, OSError: this or another process could not write its part.
    """
    temporary = temporary_name(path)
    header, places = _layout(tensors, n_latents)
    first, last = group.latents(n_latents)
    is_first = group.rank == 0

    def begin() -> None:
        if is_first:
            with temporary.open("wb") as file:
                file.write(header.data)
                file.truncate(header.size)

    def write() -> None:
        ours = [name for name in tensors if is_first or (is_divided(name) and last - first > 0)]
        if not is_first and group.latent_parts == 1:
            return  # each process has all latents: the first one writes them
        with temporary.open("rb+") as file:
            for name in ours:
                row = first if is_divided(name) else 0
                _write_rows(file.fileno(), places[name], tensors[name], row)
            os.fsync(file.fileno())

    def end() -> None:
        if is_first:
            publish(temporary, path)

    for work in (begin, write, end):
        group.together(work)


def read_slices(
    path: Path, what: str, remedy: str, device: str, n_latents: int, group: ProcessGroup
) -> dict[str, Tensor]:
    """Return this process's rows of a file's divided tensors, and the other tensors whole.

    Raises:
        RunError: the file is missing or damaged; names it.
    """
    first, last = group.latents(n_latents)
    found = {}
    with reading_tensors(path, what, remedy), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            part = file.get_slice(name)
            shape, dtype = part.get_shape(), part.get_dtype()
            if dtype not in DTYPES.values():
                raise RunError(f"{what} has {dtype} in {name} of {path}; {remedy}.")
            if is_divided(name):
                if shape[:1] != [n_latents]:
                    raise RunError(
                        f"{what} has {name} {shape} in {path}, expected {n_latents:,} latents; "
                        f"{remedy}."
                    )
                found[name] = part[first:last].to(device)
            else:
                found[name] = file.get_tensor(name).to(device)
    return found


def hash_files(paths: Sequence[Path], group: ProcessGroup) -> dict[str, str]:
    """Return name → xxh3-128 of files, in hex. The processes divide the work; all get the result.

    For a file larger than HASH_BYTES it is the hash of the hashes of its pieces of HASH_BYTES.
    """
    pieces = [(path, start) for path in paths for start in range(0, _size(path), HASH_BYTES)]
    digests = torch.zeros(len(pieces), 2, dtype=torch.int64)

    def work() -> None:
        for number in range(group.rank, len(pieces), group.world):
            digest = np.frombuffer(_digest(*pieces[number]), np.int64)
            digests[number] = torch.from_numpy(digest.copy())

    group.together(work)
    every = group.collect(digests).numpy()  # [pieces, 2]
    found = {}
    for path in paths:
        own = [every[number].tobytes() for number, (of, _) in enumerate(pieces) if of == path]
        found[path.name] = (
            own[0].hex() if len(own) == 1 else xxhash.xxh3_128_hexdigest(b"".join(own))
        )
    return found


def _size(path: Path) -> int:
    return max(1, path.stat().st_size)  # an empty file has one piece as well


def _digest(path: Path, start: int) -> bytes:
    state, left = xxhash.xxh3_128(), HASH_BYTES
    with path.open("rb") as file:
        file.seek(start)
        while left and (data := file.read(min(left, READ_BYTES))):
            state.update(data)
            left -= len(data)
    return state.digest()


def _layout(tensors: dict[str, Tensor], n_latents: int) -> tuple[Header, dict[str, Place]]:
    """Return the file's header and the place of each tensor, in safetensors' layout."""
    kinds = list(DTYPES)
    whole = {}
    for name in sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        rows = (n_latents,) if is_divided(name) else tuple(tensor.shape[:1])
        whole[name] = (*rows, *tensor.shape[1:])
    header = make_header(
        {name: (DTYPES[tensors[name].dtype], shape) for name, shape in whole.items()}, compact=True
    )
    return header, {
        name: Place(tensors[name].dtype, shape, header.offsets[name])
        for name, shape in whole.items()
    }


def _write_rows(descriptor: int, place: Place, tensor: Tensor, row: int) -> None:
    """Write a tensor's rows at the file's rows from number `row` on."""
    offset = place.offset + row * place.row_bytes
    for block in _blocks(tensor, place.row_bytes):
        data = block.cast("B")
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written


def _blocks(tensor: Tensor, row_bytes: int) -> Iterator[memoryview]:
    for rows in tensor.split(max(1, BLOCK_BYTES // row_bytes)):
        if len(rows):
            yield rows.cpu().contiguous().numpy().data
