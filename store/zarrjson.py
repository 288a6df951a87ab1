"""The `zarr.json` of every group and array of a store, so that plain zarr 3 opens it.

Their bytes follow from the plan and the number of contexts, with any version of zarr. A store is
verified against them, and lost files are written again.
"""

from __future__ import annotations

import math
from typing import Any

from sae_harvest.store.codec import entries
from sae_harvest.store.layout import FORMAT, Plan, array_paths, array_spec
from sae_harvest.store.objects import Objects
from sae_harvest.store.records import canonical

# Checksums without compression: compression saves 7 % of space, and reading costs 4 times the CPU.
_CRC = {"name": "crc32c"}


def zarr_metadata(plan: Plan, n_contexts: int) -> dict[str, dict[str, Any]]:
    """Return key → content of every `zarr.json` of a store with `n_contexts` contexts."""
    attributes = {
        "sae_harvest_format": FORMAT,
        "plan": plan.hash,
        "model": plan.model["name"],
        "tokenizer": plan.tokenizer,
        "sites": [site.name for site in plan.sites],
        "context_length": plan.context_length,
        "bos": plan.bos,
        "dtype": plan.dtype,
        "row": "context * context_length + position",
    }
    arrays = {path: _array(plan, path, n_contexts) for path in array_paths(plan)}
    groups = dict.fromkeys(path.partition("/")[0] for path in arrays if "/" in path)
    found = {"": _group(attributes)} | {path: _group({}) for path in groups} | arrays
    # The root repeats all metadata. Without that, zarr looks for arrays in every folder of the
    # store, and warns of each folder without one.
    repeated = {
        path: content | (_consolidated({}) if content["node_type"] == "group" else {})
        for path, content in sorted(found.items())
        if path
    }
    found[""] = found[""] | _consolidated(repeated)
    return {f"{path}/zarr.json".lstrip("/"): content for path, content in found.items()}


def write_zarr_metadata(objects: Objects, plan: Plan, n_contexts: int) -> None:
    """Write every `zarr.json` that is missing or out of date."""
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
    """Return the field of a group's metadata that repeats the metadata of its members."""
    inline = {"kind": "inline", "must_understand": False, "metadata": within}
    return {"consolidated_metadata": inline}


def _array(plan: Plan, path: str, n_contexts: int) -> dict[str, Any]:
    """Return the metadata of an array; each of its shards is one object."""
    spec = array_spec(plan, path)
    endian = {} if spec.dtype == "int8" else {"configuration": {"endian": "little"}}
    codecs: list[dict[str, Any]] = [{"name": "bytes", **endian}, _CRC]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "attributes": {},
        "shape": [entries(plan, path, n_contexts), *spec.shard[1:]],
        "dimension_names": list(spec.dimensions),
        "data_type": spec.dtype,
        "fill_value": "NaN" if math.isnan(spec.fill) else spec.fill,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.shard)}},
        # A dot between the parts of a chunk's name: no folder to make for each shard.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [_sharding(list(spec.chunk), codecs)] if spec.is_sharded else codecs,
        "storage_transformers": [],
    }


def _sharding(chunk: list[int], codecs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the codec of an object that holds many chunks and, at its end, their index."""
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": chunk,
            "codecs": codecs,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, _CRC],
            "index_location": "end",
        },
    }
