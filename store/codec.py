"""The bytes of arrays: zarr's chunk and shard encodings, written and read without copies.

A plain object is one chunk: little-endian values and their crc32c. A sharded object is chunks, each
with its crc32c, in order and without gaps, then an index of (offset, bytes) for each chunk and
the crc32c of the index. Zarr's `sharding_indexed` codec reads this. Chunks past the end of the
array are absent. The tests compare with zarr itself, which would copy a shard three times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import DamagedError
from sae_harvest.store.layout import ArraySpec, Plan, array_spec

CRC_BYTES = 4
ABSENT = 2**64 - 1  # offset and size of a missing chunk in a shard's index

Array = npt.NDArray[Any]


def encode(plan: Plan, path: str, array: Array) -> list[Buffer]:
    """Return the pieces of the object that holds `array`, one shard of the array at `path`.

    The last chunk of a short shard is padded with the fill value.
    """
    spec = array_spec(plan, path)
    step = spec.chunk[0]
    chunks = [_chunk(array[i : i + step], spec) for i in range(0, len(array), step)]
    if not spec.is_sharded:
        (pieces,) = chunks
        return pieces
    return [piece for pieces in chunks for piece in pieces] + [_index(spec, len(chunks))]


def decode(plan: Plan, path: str, data: Buffer, length: int, name: str) -> Array:
    """Decode the first `length` entries of one shard of the array at `path` from its bytes."""
    parts = list(chunks(plan, path, data, length, name))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def chunks(plan: Plan, path: str, data: Buffer, length: int, name: str) -> Iterator[Array]:
    """Yield the first `length` entries of a shard chunk by chunk, as views of its object's bytes.

    Raises:
        DamagedError: the object has another length, its index is altered, or a chunk is altered.
            A damaged chunk raises when the iteration reaches it.
    """
    spec = array_spec(plan, path)
    step, per_chunk = _stride(spec), spec.chunk[0]
    count = -(-length // per_chunk)
    index = _index(spec, count) if spec.is_sharded else b""
    view = memoryview(data)
    if len(view) < count * step:
        raise DamagedError(f"{name} is cut short: it has {len(view):,} bytes.")
    if len(view) != object_bytes(plan, path, length):
        raise DamagedError(
            f"{name} has {len(view):,} bytes instead of {object_bytes(plan, path, length):,}."
        )
    if view[count * step :] != index:
        raise DamagedError(f"{name} is altered: its index does not say where its chunks are.")
    for number in range(count):
        chunk = decode_chunk(plan, path, view[number * step :][:step], name)
        yield chunk[: length - number * per_chunk]


def decode_chunk(
    plan: Plan, path: str, data: Buffer, name: str, checksum: int | None = None
) -> Array:
    """Return one whole chunk as a view of its bytes.

    Args:
        checksum: crc32c of the chunk in the commit record; None skips the comparison.

    Raises:
        DamagedError: the bytes were changed after writing, or belong to another chunk.
    """
    spec = array_spec(plan, path)
    raw = np.frombuffer(data, np.uint8)
    if len(raw) != _stride(spec):
        raise DamagedError(f"{name} is cut short: {len(raw):,} bytes of a chunk are left.")
    found = google_crc32c.value(raw[:-CRC_BYTES])
    if found != int.from_bytes(raw[-CRC_BYTES:].tobytes(), "little"):
        raise DamagedError(f"{name} is altered: a chunk does not match its checksum.")
    if checksum is not None and found != checksum:
        raise DamagedError(f"{name} is altered: it holds another chunk than was committed.")
    return raw[:-CRC_BYTES].view(np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.chunk)


def checksums(plan: Plan, path: str, pieces: Sequence[Buffer], length: int) -> list[int]:
    """Return the crc32c of each chunk, taken from the bytes of an object with `length` entries.

    Args:
        pieces: the result of `encode`, or the whole object in one piece.
    """
    step, count = chunk_stride(plan, path), chunk_count(plan, path, length)
    if len(pieces) == 1:
        whole = memoryview(pieces[0])
        ends = [whole[i * step - CRC_BYTES :][:CRC_BYTES] for i in range(1, count + 1)]
    else:
        ends = [memoryview(piece) for piece in pieces[1 : 2 * count : 2]]
    return [int.from_bytes(end, "little") for end in ends]


def chunk_count(plan: Plan, path: str, length: int) -> int:
    """Return the number of chunks of an object with `length` entries of the array at `path`."""
    return -(-length // array_spec(plan, path).chunk[0])


def object_bytes(plan: Plan, path: str, length: int) -> int:
    """Return the size in bytes of an object with `length` entries of the array at `path`."""
    spec = array_spec(plan, path)
    size = -(-length // spec.chunk[0]) * _stride(spec)
    if spec.is_sharded:
        size += 16 * (spec.shard[0] // spec.chunk[0]) + CRC_BYTES
    return size


def entries(plan: Plan, path: str, contexts: int) -> int:
    """Return the number of entries that `contexts` contexts have in the array at `path`."""
    return -(-contexts * array_spec(plan, path).shard[0] // plan.contexts_per_shard)


def chunk_stride(plan: Plan, path: str) -> int:
    """Return the distance in bytes between the starts of two chunks, checksum included."""
    return _stride(array_spec(plan, path))


def _stride(spec: ArraySpec) -> int:
    return math.prod(spec.chunk) * np.dtype(spec.dtype).itemsize + CRC_BYTES


def _index(spec: ArraySpec, count: int) -> bytes:
    """Return the index at the end of a sharded object that has its first `count` chunks."""
    step = _stride(spec)
    index = np.full((spec.shard[0] // spec.chunk[0], 2), ABSENT, "<u8")
    index[:count, 0] = np.arange(count) * step
    index[:count, 1] = step
    data = index.tobytes()
    return data + _crc(data)


def _chunk(part: Array, spec: ArraySpec) -> list[Buffer]:
    if len(part) < spec.chunk[0]:
        whole = np.full(spec.chunk, spec.fill, part.dtype)
        whole[: len(part)] = part
        part = whole
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    return [data.data, _crc(data)]


def _crc(data: bytes | npt.NDArray[np.uint8]) -> bytes:
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")
