"""The shape of a store: its plan, the names of its objects, its zarr metadata.

    STORE/
      plan.json                    what was asked; the plan's hash is the store's identity
      zarr.json                    group attributes, for readers that know only zarr
      tokens/                      int32   [contexts, context_length]
      activations/<site>/          float16, float32 or int8 [rows, width]
      norms/<site>/                float32 [rows], L2 norm before any casting
      quantization/<site>/         int8 only: float32 [shards, 2, width], scale and offset
      exact/<site>/000000.parquet  int8 only: rows of a shard kept as they are, in float16
      contexts/000000.parquet      which documents a context was cut from
      documents/000000.parquet     the documents that first appear in the shard
      commits/000000.json          written last: the shard exists if and only if this does
      seals/000004.json            the first 4 shards are a store: totals, digest, statistics
      status.json                  what a running harvest is doing; not part of the store

A store can grow: more shards of the same plan, then another seal. `row = context * context_length
+ position`, everywhere. Shards are whole, except the last one where the corpus ends.
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

FORMAT: Final = 2
CHUNK_BYTES = 6 << 20  # 1.5 to 6 MiB read fastest: smaller pays per chunk, larger leaves the cache
MAX_CHUNK_ROWS = 4096
CODE_FILL = -128  # of int8 arrays; codes go from -127 to 127


class SitePlan(BaseModel):
    """One recorded place in the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="for example resid_post.12")
    width: int = Field(gt=0, description="numbers per row")


class Plan(BaseModel):
    """Everything that decides the bytes of a shard. Stores of equal plans have equal shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = FORMAT
    model: dict[str, Any] = Field(description="name and identity of the model's weights")
    tokenizer: dict[str, Any] = Field(description="identity of the tokenizer, end-of-text id")
    corpus: dict[str, Any] = Field(description="name and fingerprint of the text")
    sites: tuple[SitePlan, ...] = Field(min_length=1)
    context_length: int = Field(gt=1, description="tokens per context")
    contexts_per_shard: int = Field(gt=0)
    packing: Literal["concat"] = Field(
        "concat", description="documents joined by the end-of-text token, then cut"
    )
    bos: Literal["none", "context"] = Field(description="context: position 0 holds the BOS token")
    seed: int = Field(ge=0, description="of the shuffling of contexts")
    window_contexts: int = Field(gt=0, description="contexts shuffled together")
    document_text: bool = Field(description="whether documents/ holds the texts themselves")
    dtype: Literal["float16", "float32", "int8"] = Field(
        description="of the stored activations; int8 with a scale and offset per channel and shard"
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        description="of the forward pass"
    )
    batch_contexts: int = Field(gt=0, description="contexts per forward pass")

    @property
    def hash(self) -> str:
        """Identity of the plan: xxh3 of its canonical JSON."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def shard_rows(self) -> int:
        """Rows of a whole shard."""
        return self.contexts_per_shard * self.context_length

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


def array_specs(plan: Plan, n_contexts: int) -> dict[str, dict[str, Any]]:
    """Path of each array of a store → the arguments of `zarr.create_array`."""
    crc = [zarr.codecs.Crc32cCodec()]
    length, contexts = plan.context_length, plan.contexts_per_shard
    n_rows = n_contexts * length
    specs: dict[str, dict[str, Any]] = {
        "tokens": {
            "shape": (n_contexts, length),
            "chunks": (contexts, length),
            "dtype": "int32",
            "fill_value": -1,
            "dimension_names": ("context", "position"),
        }
    }
    for site in plan.sites:
        specs[f"activations/{site.name}"] = {
            "shape": (n_rows, site.width),
            "chunks": (plan.chunk_rows(site.name), site.width),
            "shards": (plan.shard_rows, site.width),
            "dtype": plan.dtype,
            "fill_value": CODE_FILL if plan.dtype == "int8" else float("nan"),
            "dimension_names": ("row", "channel"),
        }
        specs[f"norms/{site.name}"] = {
            "shape": (n_rows,),
            "chunks": (plan.shard_rows,),
            "dtype": "float32",
            "fill_value": float("nan"),
            "dimension_names": ("row",),
        }
        if plan.dtype == "int8":
            specs[f"quantization/{site.name}"] = {
                "shape": (-(-n_contexts // contexts), 2, site.width),
                "chunks": (1, 2, site.width),
                "dtype": "float32",
                "fill_value": float("nan"),
                "dimension_names": ("shard", "scale_offset", "channel"),
            }
    # Integrity without compression: 7 % of space would cost four times the CPU of reading.
    # A dot between the parts of a chunk's name: no folder to make for each shard.
    common = {"compressors": crc, "filters": None}
    names = {"name": "default", "separator": "."}
    return {path: spec | common | {"chunk_key_encoding": names} for path, spec in specs.items()}


def zarr_metadata(plan: Plan, n_contexts: int) -> dict[str, dict[str, Any]]:
    """Key → content of every `zarr.json` of a store of so many contexts.

    The contents are kept in the seal, so that they can be written again, to the byte, by a later
    version of zarr.
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
    specs = array_specs(plan, n_contexts)
    zarr.create_group(memory, attributes=attributes)
    for group in sorted({path.partition("/")[0] for path in specs if "/" in path}):
        zarr.create_group(memory, path=group)
    for path, spec in specs.items():
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
    return f"{path}/c.{shard}" + CHUNK_NAME_ENDS[path.partition("/")[0]]


def exact_key(site: str, shard: int) -> str:
    return f"exact/{site}/{shard:06d}.parquet"


def context_key(shard: int) -> str:
    return f"contexts/{shard:06d}.parquet"


def document_key(shard: int) -> str:
    return f"documents/{shard:06d}.parquet"


def commit_key(shard: int) -> str:
    return f"commits/{shard:06d}.json"


def seal_key(n_shards: int) -> str:
    return f"seals/{n_shards:06d}.json"


CHUNK_NAME_ENDS = {"tokens": ".0", "activations": ".0", "norms": "", "quantization": ".0.0"}
PLAN_KEY = "plan.json"
STATUS_KEY = "status.json"
