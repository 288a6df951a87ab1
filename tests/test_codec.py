"""The bytes of arrays: what zarr reads and writes, and nothing that is altered."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import dask.array
import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.buffer import cpu, default_buffer_prototype
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from sae_harvest.common.errors import DamagedError
from sae_harvest.store import codec, layout
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import LocalObjects, total_bytes
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.zarrjson import zarr_metadata
from tests.synthetic import CONTEXTS, SITE, make_plan, make_store, rows_of

DTYPES = ["float16", "float32", "int8"]


def long_plan(dtype: str) -> Plan:
    """Shards of 16,384 rows: 4 chunks."""
    return make_plan(dtype=dtype).model_copy(update={"contexts_per_shard": 1024})


def array_metadata(plan: Plan, contexts: int) -> dict[str, dict[str, Any]]:
    """Path of each array → the content of its zarr.json."""
    found = zarr_metadata(plan, contexts)
    return {
        key.removesuffix("/zarr.json"): content
        for key, content in found.items()
        if content["node_type"] == "array"
    }


def random_array(plan: Plan, path: str, length: int) -> np.ndarray:
    metadata = array_metadata(plan, plan.contexts_per_shard)[path]
    rng = np.random.default_rng(3)
    shape, dtype = (length, *metadata["shape"][1:]), metadata["data_type"]
    if dtype in ("int8", "int32"):
        return rng.integers(-127, 128, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def zarr_objects(plan: Plan, path: str, array: np.ndarray) -> dict[str, bytes]:
    """What zarr itself writes for one shard's worth of an array."""
    metadata = array_metadata(plan, plan.contexts_per_shard)[path] | {"shape": array.shape}
    memory = MemoryStore({"x/zarr.json": cpu.Buffer.from_bytes(json.dumps(metadata).encode())})
    written: Any = zarr.open_array(memory, path="x", mode="r+")
    written[:] = array
    return {k: v for k, v in read_memory(memory).items() if not k.endswith("zarr.json")}


def read_memory(memory: MemoryStore) -> dict[str, bytes]:
    """Every key of an in-memory zarr store with its bytes."""

    async def collect() -> dict[str, bytes]:
        found = {}
        async for key in memory.list():
            buffer = await memory.get(key, default_buffer_prototype())
            assert buffer is not None
            found[key] = buffer.to_bytes()
        return found

    return asyncio.run(collect())


def made_by_zarr(plan: Plan, n_contexts: int) -> dict[str, Any]:
    """The content of every zarr.json as zarr writes it for arrays described to it in its words."""
    memory = MemoryStore()
    length, contexts, rows = plan.context_length, plan.contexts_per_shard, plan.shard_rows
    n_rows, width, nan = n_contexts * length, plan.width(SITE), float("nan")
    common: dict[str, Any] = {
        "store": memory,
        "compressors": [zarr.codecs.Crc32cCodec()],
        "filters": None,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }
    zarr.create_group(memory, attributes=zarr_metadata(plan, n_contexts)["zarr.json"]["attributes"])
    for group in ("activations", "norms", *(["quantization"] if plan.dtype == "int8" else [])):
        zarr.create_group(memory, path=group)
    zarr.create_array(
        name="tokens",
        shape=(n_contexts, length),
        chunks=(contexts, length),
        dtype="int32",
        fill_value=-1,
        dimension_names=("context", "position"),
        **common,
    )
    zarr.create_array(
        name=f"activations/{SITE}",
        shape=(n_rows, width),
        chunks=(plan.chunk_rows(SITE), width),
        shards=(rows, width),
        dtype=plan.dtype,
        fill_value=-128 if plan.dtype == "int8" else nan,
        dimension_names=("row", "channel"),
        **common,
    )
    zarr.create_array(
        name=f"norms/{SITE}",
        shape=(n_rows,),
        chunks=(rows,),
        dtype="float32",
        fill_value=nan,
        dimension_names=("row",),
        **common,
    )
    if plan.dtype == "int8":
        zarr.create_array(
            name=f"quantization/{SITE}",
            shape=(-(-n_contexts // contexts), 2, width),
            chunks=(1, 2, width),
            dtype="float32",
            fill_value=nan,
            dimension_names=("shard", "scale_offset", "channel"),
            **common,
        )
    with pytest.warns(ZarrUserWarning, match="Consolidated metadata"):
        zarr.consolidate_metadata(memory)
    return {key: json.loads(value) for key, value in read_memory(memory).items()}


def test_one_table_describes_every_array() -> None:
    plan = make_plan(width=8, dtype="int8")  # shards of 8 contexts of 16 tokens
    paths = layout.array_paths(plan)
    assert paths == ["tokens", f"activations/{SITE}", f"norms/{SITE}", f"quantization/{SITE}"]
    specs = [layout.array_spec(plan, path) for path in paths]
    assert [spec.dtype for spec in specs] == ["int32", "int8", "float32", "float32"]
    assert [spec.shard for spec in specs] == [(8, 16), (128, 8), (128,), (1, 2, 8)]
    assert [spec.chunk for spec in specs] == [(8, 16), (128, 8), (128,), (1, 2, 8)]
    assert [spec.is_sharded for spec in specs] == [False, True, False, False]
    assert [spec.fill for spec in specs[:2]] == [-1, -128]
    assert np.isnan([specs[2].fill, specs[3].fill]).all()
    ends = [layout.chunk_key(path, 5).rpartition("/")[2] for path in paths]
    assert ends == ["c.5.0", "c.5.0", "c.5", "c.5.0.0"]
    lengths = [codec.entries(plan, path, 11) for path in paths]  # 11 contexts: 2 shards
    assert lengths == [11, 176, 176, 2]
    long = layout.array_spec(long_plan("float32"), f"activations/{SITE}")
    assert (long.shard, long.chunk) == ((16_384, 8), (4096, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_zarr_json_is_what_zarr_writes(dtype: str) -> None:
    for plan in (make_plan(dtype=dtype), long_plan(dtype)):
        assert zarr_metadata(plan, 2 * plan.contexts_per_shard - 3) == made_by_zarr(
            plan, 2 * plan.contexts_per_shard - 3
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 0.6])
def test_objects_are_those_that_zarr_writes_to_the_byte(dtype: str, share: float) -> None:
    plan = long_plan(dtype)
    whole = {
        "tokens": plan.contexts_per_shard,
        f"activations/{SITE}": plan.shard_rows,
        f"norms/{SITE}": plan.shard_rows,
        f"quantization/{SITE}": 1,
    }
    assert plan.shard_rows == 4 * plan.chunk_rows(SITE)
    for path in array_metadata(plan, 1):
        array = random_array(plan, path, max(1, int(whole[path] * share)))
        ours = b"".join(codec.encode(plan, path, array))
        ((key, theirs),) = zarr_objects(plan, path, array).items()
        assert layout.chunk_key(path, 0) == key.replace("x/", f"{path}/", 1)
        assert ours == theirs, path
        pieces = codec.encode(plan, path, array)
        assert total_bytes(pieces) == len(theirs) == codec.object_bytes(plan, path, len(array))
        found = codec.checksums(plan, path, pieces, len(array))
        assert found == codec.checksums(plan, path, [theirs], len(array))
        assert len(found) == codec.chunk_count(plan, path, len(array))
        stride = codec.chunk_stride(plan, path)
        for number, checksum in enumerate(found):
            chunk = theirs[number * stride :][:stride]
            assert checksum == google_crc32c.value(chunk[:-4])
            codec.decode_chunk(plan, path, chunk, "chunk", checksum)
            with pytest.raises(DamagedError, match="another chunk than was committed"):
                codec.decode_chunk(plan, path, chunk, "chunk", checksum ^ 1)
        decoded = codec.decode(plan, path, theirs, len(array), "theirs")
        assert decoded.dtype == array.dtype
        assert np.array_equal(decoded, array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_lie_where_zarrs_own_index_says(dtype: str) -> None:
    plan, path = long_plan(dtype), f"activations/{SITE}"
    array = random_array(plan, path, plan.shard_rows - 5)
    ((_, data),) = zarr_objects(plan, path, array).items()
    n_chunks = plan.shard_rows // plan.chunk_rows(SITE)
    index = struct.unpack(f"<{2 * n_chunks}Q", data[-16 * n_chunks - 4 : -4])
    for number in range(n_chunks):
        offset, size = index[2 * number : 2 * number + 2]
        assert size == codec.chunk_stride(plan, path)
        assert offset == number * size
        chunk = codec.decode_chunk(plan, path, data[offset : offset + size], "chunk")
        rows = array[number * plan.chunk_rows(SITE) :][: plan.chunk_rows(SITE)]
        assert np.array_equal(chunk[: len(rows)], rows)


@pytest.mark.parametrize("n_contexts", [CONTEXTS, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_array_is_the_same_to_plain_zarr_and_dask(
    tmp_path: Path, dtype: str, n_contexts: int
) -> None:
    plan = make_store(tmp_path / "s", make_plan(dtype=dtype), n_contexts)
    place, n_rows = str(tmp_path / "s"), n_contexts * 16
    store = ActivationStore.open(place)
    group: Any = zarr.open_group(place, mode="r")
    plain = {}
    for metadata in (tmp_path / "s").rglob("zarr.json"):
        path = metadata.parent.relative_to(tmp_path / "s").as_posix()
        if json.loads(metadata.read_bytes())["node_type"] == "array":
            plain[path] = group[path][:]
            lazy = dask.array.from_zarr(place, component=path)
            assert np.array_equal(plain[path], lazy.compute())
    assert set(plain) == set(array_metadata(plan, n_contexts))
    assert np.array_equal(plain["tokens"], store.tokens(0, n_contexts))
    assert np.array_equal(plain[f"norms/{SITE}"], store.norms(SITE, 0, n_rows))
    x, expected = plain[f"activations/{SITE}"], rows_of(plan, n_contexts)
    if dtype != "int8":
        assert np.array_equal(x, store.read(SITE, 0, n_rows))
        assert np.array_equal(x, expected.astype(dtype))
        return
    affine = plain[f"quantization/{SITE}"]  # [shards, 2, width]
    assert affine.shape == (-(-n_contexts // 8), 2, 8)
    scale, offset = (affine[:, i].repeat(128, axis=0)[:n_rows] for i in range(2))
    by_hand = x * scale + offset
    ordinary = np.ones(n_rows, bool)
    ordinary[::16] = False  # position 0 is massive: kept exactly, aside
    ours = store.read(SITE, 0, n_rows)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[ordinary], by_hand[ordinary], rtol=1e-5, atol=1e-6)
    assert np.array_equal(ours[::16], expected[::16].astype(np.float16))
    assert (x[::16] == 0).all()
    assert np.abs(ours[ordinary] - expected[ordinary]).max() < scale.max()


def test_what_is_altered_or_cut_does_not_decode() -> None:
    plan, path = make_plan(), f"activations/{SITE}"
    array = random_array(plan, path, 100)
    data = b"".join(codec.encode(plan, path, array))
    rng = np.random.default_rng(0)
    for position in [*rng.integers(len(data), size=100), *range(len(data) - 20, len(data))]:
        altered = bytearray(data)
        altered[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(DamagedError, match=r"^it is altered"):
            codec.decode(plan, path, altered, len(array), "it")
    for cut in (b"", data[:7], data[:-1], data + b"x"):
        with pytest.raises(DamagedError, match=r"^it (is cut short|has [\d,]+ bytes)"):
            codec.decode(plan, path, cut, len(array), "it")


def test_a_checksummed_object_of_another_shard_size_does_not_decode() -> None:
    plan, path = make_plan(), f"norms/{SITE}"
    longer = plan.model_copy(update={"contexts_per_shard": 9})
    data = b"".join(codec.encode(longer, path, np.ones(144, np.float32)))
    with pytest.raises(DamagedError):
        codec.decode(plan, path, data, 128, "it")
    index = np.full((1, 2), codec.ABSENT, "<u8").tobytes()
    absent = index + google_crc32c.value(index).to_bytes(4, "little")
    with pytest.raises(DamagedError):  # zarr reads it as 128 rows of the fill value
        codec.decode(plan, f"activations/{SITE}", absent, 128, "it")


def test_a_store_is_read_by_zarr_while_it_grows(tmp_path: Path) -> None:
    objects, plan = LocalObjects(tmp_path / "s"), make_plan()
    for n_contexts in (16, 40, 100):
        make_store(objects, plan, n_contexts)
        group: Any = zarr.open_group(str(tmp_path / "s"), mode="r")
        assert group[f"activations/{SITE}"].shape == (n_contexts * 16, 8)
        expected = rows_of(plan, n_contexts).astype("float16")
        assert np.array_equal(group[f"activations/{SITE}"][:], expected)


@pytest.mark.filterwarnings("error")
def test_zarr_lists_a_store_without_a_warning(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    group: Any = zarr.open_group(str(tmp_path / "s"), mode="r")
    found = sorted(path for path, _ in group.members(max_depth=None))
    assert found == ["activations", f"activations/{SITE}", "norms", f"norms/{SITE}", "tokens"]
    assert sorted(group) == ["activations", "norms", "tokens"]
    assert [name for name, _ in group["activations"].arrays()] == [SITE]
