"""The `zarr.json` of every group and array of a store, so that plain zarr 3 opens it.

They follow from the plan and the number of contexts, to the byte and whatever version of zarr is
installed: a store is verified against them, and they are written again when they are lost.
"""

from __future__ import annotations

from typing import Any

from sae_harvest.store.layout import CODE_FILL, FORMAT, Plan
from sae_harvest.store.objects import Objects
from sae_harvest.store.records import canonical

# Integrity without compression: 7 % of space would cost four times the CPU of reading.
_CRC = {"name": "crc32c"}


def zarr_metadata(plan: Plan, n_contexts: int) -> dict[str, dict[str, Any]]:
    """Key → content of every `zarr.json` of a store of so many contexts."""
    length, contexts = plan.context_length, plan.contexts_per_shard
    rows, shard_rows = n_contexts * length, plan.shard_rows
    attributes = {
        "sae_harvest_format": FORMAT,
        "plan": plan.hash,
        "model": plan.model["name"],
        "tokenizer": plan.tokenizer,
        "sites": [site.name for site in plan.sites],
        "context_length": length,
        "bos": plan.bos,
        "dtype": plan.dtype,
        "row": "context * context_length + position",
    }
    found = {
        "": _group(attributes),
        "activations": _group({}),
        "norms": _group({}),
        "tokens": _array(
            {"context": n_contexts, "position": length}, [contexts, length], "int32", -1
        ),
    }
    if plan.dtype == "int8":
        found["quantization"] = _group({})
    for site in plan.sites:
        activations = _array(
            {"row": rows, "channel": site.width},
            [shard_rows, site.width],
            plan.dtype,
            CODE_FILL if plan.dtype == "int8" else "NaN",
        )
        chunk = [plan.chunk_rows(site.name), site.width]
        activations["codecs"] = [_sharding(chunk, activations["codecs"])]
        found[f"activations/{site.name}"] = activations
        found[f"norms/{site.name}"] = _array({"row": rows}, [shard_rows], "float32", "NaN")
        if plan.dtype == "int8":
            found[f"quantization/{site.name}"] = _array(
                {"shard": -(-n_contexts // contexts), "scale_offset": 2, "channel": site.width},
                [1, 2, site.width],
                "float32",
                "NaN",
            )
    # The root repeats all of it. Without that, zarr looks for arrays in every folder of the store,
    # and warns of each that holds none.
    repeated = {
        path: content | (_consolidated({}) if content["node_type"] == "group" else {})
        for path, content in sorted(found.items())
        if path
    }
    found[""] = found[""] | _consolidated(repeated)
    return {f"{path}/zarr.json".lstrip("/"): content for path, content in found.items()}


def write_zarr_metadata(objects: Objects, plan: Plan, n_contexts: int) -> None:
    """Bring every `zarr.json` up to date."""
    for key, content in zarr_metadata(plan, n_contexts).items():
        wanted = canonical(content)
        try:
            there = objects.read(key)
        except FileNotFoundError:
            there = b""
        if there != wanted:
            objects.replace(key, [wanted])


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _consolidated(within: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The field of a group's metadata that repeats the metadata of all that is in the group."""
    inline = {"kind": "inline", "must_understand": False, "metadata": within}
    return {"consolidated_metadata": inline}


def _array(
    dimensions: dict[str, int], chunk: list[int], dtype: str, fill_value: int | str
) -> dict[str, Any]:
    """An array of named dimensions, cut into chunks that are an object each."""
    endian = {} if dtype == "int8" else {"configuration": {"endian": "little"}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "attributes": {},
        "shape": list(dimensions.values()),
        "dimension_names": list(dimensions),
        "data_type": dtype,
        "fill_value": fill_value,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        # A dot between the parts of a chunk's name: no folder to make for each shard.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", **endian}, _CRC],
        "storage_transformers": [],
    }


def _sharding(chunk: list[int], codecs: list[dict[str, Any]]) -> dict[str, Any]:
    """The codec of an object that holds many chunks, and at its end where each is."""
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": chunk,
            "codecs": codecs,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, _CRC],
            "index_location": "end",
        },
    }
