"""The shape of a store: its plan, the names of its objects, its zarr metadata.

    STORE/
      plan.json                    what was asked; the plan's hash is the store's identity
      zarr.json                    group attributes, for readers that know only zarr
      tokens/                      int32   [contexts, context_length]
      activations/<site>/          float16 or float32 [rows, width]
      norms/<site>/                float32 [rows], L2 norm before any casting
      contexts/000000.parquet      which documents a context was cut from
      documents/000000.parquet     the documents that first appear in the shard
      commits/000000.json          written last: the shard exists if and only if this does
      sealed.json                  totals, digest, statistics merged over shards

`row = context * context_length + position`, everywhere.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final, Literal

import numpy as np
import zarr
from pydantic import BaseModel, ConfigDict, Field
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from store.records import digest_of

FORMAT: Final = 1
CHUNK_BYTES = 6 << 20  # 1.5 to 6 MiB read fastest: smaller pays per chunk, larger leaves the cache
MAX_CHUNK_ROWS = 4096


class SitePlan(BaseModel):
    """One recorded place in the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="for example resid_post.12")
    width: int = Field(gt=0, description="numbers per row")


class Plan(BaseModel):
    """Everything that decides the bytes of a store. Two equal plans give equal stores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    model: dict[str, Any] = Field(description="name and identity of the model's weights")
    tokenizer: dict[str, Any] = Field(description="identity of the tokenizer, end-of-text id")
    corpus: dict[str, Any] = Field(description="name and fingerprint of the text")
    sites: tuple[SitePlan, ...] = Field(min_length=1)
    context_length: int = Field(gt=1, description="tokens per context")
    n_contexts: int = Field(gt=0, description="contexts in the store")
    contexts_per_shard: int = Field(gt=0)
    packing: Literal["concat"] = Field(
        "concat", description="documents joined by the end-of-text token, then cut"
    )
    bos: Literal["none", "context"] = Field(description="context: position 0 holds the BOS token")
    seed: int = Field(ge=0, description="of the shuffling of contexts")
    window_contexts: int = Field(gt=0, description="contexts shuffled together")
    dtype: Literal["float16", "float32"] = Field(description="of the stored activations")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        description="of the forward pass"
    )
    batch_contexts: int = Field(gt=0, description="contexts per forward pass")

    @property
    def hash(self) -> str:
        """Identity of the plan: xxh3 of its canonical JSON."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def n_rows(self) -> int:
        return self.n_contexts * self.context_length

    @property
    def shard_rows(self) -> int:
        return self.contexts_per_shard * self.context_length

    @property
    def n_shards(self) -> int:
        return -(-self.n_contexts // self.contexts_per_shard)

    def shard_contexts(self, shard: int) -> tuple[int, int]:
        """First and last-plus-one context of a shard; the last shard may be short."""
        first = shard * self.contexts_per_shard
        return first, min(first + self.contexts_per_shard, self.n_contexts)

    @property
    def itemsize(self) -> int:
        """Bytes of one stored number."""
        return np.dtype(self.dtype).itemsize

    def width(self, site: str) -> int:
        return next(s.width for s in self.sites if s.name == site)

    def chunk_rows(self, site: str) -> int:
        """Rows per zarr chunk: the largest divisor of the shard that keeps a chunk small."""
        row_bytes = self.width(site) * self.itemsize
        limit = max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES // row_bytes))
        return next(r for r in range(limit, 0, -1) if self.shard_rows % r == 0)

    def differing_fields(self, other: Plan) -> list[str]:
        """`field: this → other` for every field in which two plans differ.

        Widths are compared where the sites are the same: they follow from model and site.
        """
        mine, theirs = _flat(self), _flat(other)
        if mine["sites"] == theirs["sites"]:
            mine |= {f"width of {site.name}": site.width for site in self.sites}
            theirs |= {f"width of {site.name}": site.width for site in other.sites}
        return [
            f"{field}: {mine.get(field)} → {theirs.get(field)}"
            for field in mine | theirs
            if mine.get(field) != theirs.get(field)
        ]


def _flat(plan: Plan) -> dict[str, Any]:
    """The fields of a plan for people: `model.weights` and the like apart, sites by their names."""
    flat: dict[str, Any] = {}
    for field, value in plan.model_dump(mode="json", exclude={"sites"}).items():
        if isinstance(value, dict):
            flat |= {f"{field}.{name}": part for name, part in value.items()}
        else:
            flat[field] = value
    return flat | {"sites": ", ".join(site.name for site in plan.sites)}


def array_specs(plan: Plan) -> dict[str, dict[str, Any]]:
    """Path of each array of the store → the arguments of `zarr.create_array`."""
    crc = [zarr.codecs.Crc32cCodec()]
    length, contexts = plan.context_length, plan.contexts_per_shard
    specs: dict[str, dict[str, Any]] = {
        "tokens": {
            "shape": (plan.n_contexts, length),
            "chunks": (contexts, length),
            "dtype": "int32",
            "fill_value": -1,
            "dimension_names": ("context", "position"),
        }
    }
    for site in plan.sites:
        specs[f"activations/{site.name}"] = {
            "shape": (plan.n_rows, site.width),
            "chunks": (plan.chunk_rows(site.name), site.width),
            "shards": (plan.shard_rows, site.width),
            "dtype": plan.dtype,
            "fill_value": float("nan"),
            "dimension_names": ("row", "channel"),
        }
        specs[f"norms/{site.name}"] = {
            "shape": (plan.n_rows,),
            "chunks": (plan.shard_rows,),
            "dtype": "float32",
            "fill_value": float("nan"),
            "dimension_names": ("row",),
        }
    # Integrity without compression: 7 % of space would cost four times the CPU of reading.
    return {path: spec | {"compressors": crc, "filters": None} for path, spec in specs.items()}


def zarr_metadata(plan: Plan) -> dict[str, dict[str, Any]]:
    """Key → content of every `zarr.json` of the store.

    The contents are kept in plan.json, so that they can be written again, to the byte, by a
    later version of zarr.
    """
    memory = MemoryStore()
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
    zarr.create_group(memory, attributes=attributes)
    for group in ("activations", "norms"):
        zarr.create_group(memory, path=group)
    for path, spec in array_specs(plan).items():
        zarr.create_array(memory, name=path, **spec)
    return {key: json.loads(value) for key, value in read_memory(memory).items()}


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


def chunk_key(path: str, shard: int) -> str:
    """Key of the object that holds one shard of the array at `path`."""
    return f"{path}/c/{shard}" + ("" if path.startswith("norms/") else "/0")


def context_key(shard: int) -> str:
    return f"contexts/{shard:06d}.parquet"


def document_key(shard: int) -> str:
    return f"documents/{shard:06d}.parquet"


def commit_key(shard: int) -> str:
    return f"commits/{shard:06d}.json"


FOLDERS = ("tokens", "activations", "norms", "contexts", "documents", "commits")
PLAN_KEY = "plan.json"
SEALED_KEY = "sealed.json"
