"""The shape of a store: its plan and the names of its objects.

    STORE/
      plan.json                    the settings; the plan's hash is the store's identity
      zarr.json                    group attributes, for readers that know only zarr
      tokens/                      int32   [contexts, context_length]
      activations/<site>/          float16, float32 or int8 [rows, width]
      norms/<site>/                float32 [rows], L2 norms before casting
      quantization/<site>/         int8 only: float32 [shards, 2, width], scale and offset
      exact/<site>/000000.parquet  int8 only: rows of a shard kept exactly, in float16
      contexts/000000.parquet      the documents that each context was cut from
      documents/000000.parquet     the documents that first appear in the shard
      commits/000000.json          written last: the shard exists if this record exists
      seals/000004.json            closes the first 4 shards: commits, statistics, digest
      status.json                  progress of a running harvest; not part of the store

A store can grow: more shards of the same plan, then another seal. `row = context * context_length
+ position`, everywhere. Shards are whole, except the last one where the corpus ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sae_harvest.common.parsing import safe_name
from sae_harvest.store.records import digest_of

FORMAT: Final = 3
CHUNK_BYTES = 6 << 20  # smaller chunks cost more calls, larger ones miss the cache
MAX_CHUNK_ROWS = 4096
CODE_FILL = -128  # fill value of int8 arrays; codes go from -127 to 127
DIMENSIONS = {
    "tokens": ("context", "position"),
    "activations": ("row", "channel"),
    "norms": ("row",),
    "quantization": ("shard", "scale_offset", "channel"),
}
MAX_WIDTH = 1 << 20  # numbers per row
MAX_SHARD_ROWS = 1 << 27  # a worker holds a whole shard in memory

# The fields that are read from the free-form parts of a plan. Rows that do not come from text have
# no tokenizer.
_ALWAYS: dict[str, dict[str, type]] = {
    "model": {"name": str, "weights": str},
    "corpus": {"name": str},
}
_KINDS = {
    "model": _ALWAYS["model"] | {"vocabulary": int},
    "corpus": _ALWAYS["corpus"] | {"fingerprint": str},
    "tokenizer": {"xxh3": str, "vocabulary": int, "end_of_text": int},
}


def _site_name(name: str) -> str:
    if "/" in safe_name(name):
        raise ValueError(f"the site {name!r} has a slash in its name")
    return name


# Field of a plan → the option of `harvest run` that decides it.
OPTIONS = {
    "model.name": "--model",
    "model.revision": "--model-revision",
    "corpus.name": "--corpus",
    "corpus.config": "--dataset-config",
    "corpus.split": "--split",
    "corpus.revision": "--revision",
    "corpus.text_column": "--text-column",
    "corpus.dedup": "--dedup",
    "sites": "--site",
    "context_length": "--context-length",
    "contexts_per_shard": "--shard-rows (in contexts)",
    "bos": "--bos",
    "seed": "--seed",
    "document_text": "--keep-text",
    "dtype": "--dtype",
    "compute_dtype": "--compute-dtype",
}


class SitePlan(BaseModel):
    """A site and its width."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_site_name)] = Field(
        description="for example resid_post.12"
    )
    width: int = Field(gt=0, le=MAX_WIDTH, description="numbers per row")


class PlanSettings(BaseModel):
    """A plan without its sites. The widths of sites are known only once a model is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = FORMAT
    model: dict[str, Any] = Field(description="name and identity of the model's weights")
    tokenizer: dict[str, Any] = Field(description="identity of the tokenizer, end-of-text id")
    corpus: dict[str, Any] = Field(description="name and fingerprint of the text")
    context_length: int = Field(gt=1, description="tokens per context")
    contexts_per_shard: int = Field(gt=0)
    packing: Literal["concat"] = Field(
        "concat", description="documents joined by the end-of-text token, then cut"
    )
    bos: Literal["none", "context"] = Field(description="context: position 0 holds the BOS token")
    seed: int = Field(ge=0, description="seed of the order of contexts")
    window_contexts: int = Field(gt=0, description="contexts shuffled together")
    document_text: bool = Field(description="whether documents/ holds the texts themselves")
    dtype: Literal["float16", "float32", "int8"] = Field(
        description="dtype of stored activations; int8 has a scale and offset per channel and shard"
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        description="dtype of the forward pass"
    )
    batch_contexts: int = Field(gt=0, description="contexts per forward pass")


class Plan(PlanSettings):
    """Everything that decides the bytes of a shard. Stores of equal plans have equal shards."""

    sites: tuple[SitePlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_possible(self) -> Plan:
        """Refuse plans that no harvest makes; plan files may come from others."""
        for field, kinds in _KINDS.items() if self.tokenizer else _ALWAYS.items():
            for name, kind in kinds.items():
                if type(getattr(self, field).get(name)) is not kind:
                    raise ValueError(f"{field}.{name} is missing or not of type {kind.__name__}")
        if len({site.name for site in self.sites}) < len(self.sites):
            raise ValueError("a site is named twice")
        if self.shard_rows > MAX_SHARD_ROWS:
            raise ValueError(f"a shard has {self.shard_rows:,} rows, more than {MAX_SHARD_ROWS:,}")
        return self

    @property
    def hash(self) -> str:
        """Identity of the plan: xxh3-128 of its canonical JSON, in hex."""
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
        """Return the rows per zarr chunk: the largest divisor of the shard within the limits."""
        row_bytes = self.width(site) * self.itemsize
        limit = max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES // row_bytes))
        return _largest_divisor(self.shard_rows, limit)

    def differing_fields(self, other: Plan) -> list[str]:
        """Return `option: this → other` for every field in which two plans differ.

        A field without an option of `harvest run` is shown by its own name, for example
        `model.weights`. Widths are compared only if both plans have the same sites.
        """
        mine, theirs = _flat(self), _flat(other)
        if mine["sites"] == theirs["sites"]:
            mine |= {f"width of {site.name}": site.width for site in self.sites}
            theirs |= {f"width of {site.name}": site.width for site in other.sites}
        return [
            f"{OPTIONS.get(field, field)}: {mine.get(field)} → {theirs.get(field)}"
            for field in mine | theirs
            if mine.get(field) != theirs.get(field)
        ]


@cache
def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number up to a limit. Cached: every chunk read needs it."""
    return next(d for d in range(limit, 0, -1) if number % d == 0)


def _flat(plan: Plan) -> dict[str, Any]:
    """Return a plan's fields, nested ones as `model.weights`, and the sites by their names."""
    flat: dict[str, Any] = {}
    for field, value in plan.model_dump(mode="json", exclude={"sites"}).items():
        if isinstance(value, dict):
            flat |= {f"{field}.{name}": part for name, part in value.items()}
        else:
            flat[field] = value
    return flat | {"sites": ", ".join(site.name for site in plan.sites)}


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """An array of a store. Each of its shards is one object."""

    dimensions: tuple[str, ...]
    """Names of the dimensions. The first one is divided into shards."""
    dtype: str
    shard: tuple[int, ...]
    """Shape of a shard."""
    chunk: tuple[int, ...]
    """Shape of a chunk; equal to `shard` if the object is one chunk."""
    fill: float
    """Value of entries past the end of the array."""
    is_sharded: bool = False
    """True if an object holds many chunks and their index (zarr's `sharding_indexed`)."""


def array_spec(plan: Plan, path: str) -> ArraySpec:
    """Return the specification of the array at `path`: dtype, shapes and fill value."""
    kind, _, site = path.partition("/")
    dimensions = DIMENSIONS[kind]
    if kind == "tokens":
        shard = plan.contexts_per_shard, plan.context_length
        return ArraySpec(dimensions, "int32", shard, shard, -1)
    if kind == "norms":
        rows = (plan.shard_rows,)
        return ArraySpec(dimensions, "float32", rows, rows, np.nan)
    width = plan.width(site)
    if kind == "quantization":
        scales = 1, 2, width
        return ArraySpec(dimensions, "float32", scales, scales, np.nan)
    shard, chunk = (plan.shard_rows, width), (plan.chunk_rows(site), width)
    fill = CODE_FILL if plan.dtype == "int8" else np.nan
    return ArraySpec(dimensions, plan.dtype, shard, chunk, fill, is_sharded=True)


def array_paths(plan: Plan) -> list[str]:
    """Return the paths of all arrays of a store."""
    kinds = ["activations", "norms", *(["quantization"] if plan.dtype == "int8" else [])]
    return ["tokens", *(f"{kind}/{site.name}" for site in plan.sites for kind in kinds)]


def chunk_key(path: str, shard: int) -> str:
    """Return the key of the object that holds one shard of the array at `path`."""
    return f"{path}/c.{shard}" + ".0" * (len(DIMENSIONS[path.partition("/")[0]]) - 1)


def object_keys(plan: Plan, shard: int) -> list[str]:
    """Return the keys of a shard's objects, sorted. The commit record lists exactly these."""
    keys = [chunk_key(path, shard) for path in array_paths(plan)]
    if plan.dtype == "int8":
        keys += [exact_key(site.name, shard) for site in plan.sites]
    return sorted([*keys, context_key(shard), document_key(shard)])


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


def array_path(key: str) -> str | None:
    """Return the path of the array that an object belongs to; None for the key of a table."""
    return None if key.endswith(".parquet") else key.rpartition("/")[0]


PLAN_KEY = "plan.json"
STATUS_KEY = "status.json"
