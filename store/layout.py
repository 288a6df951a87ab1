"""The shape of a store: its plan and the names of its objects.

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
      seals/000004.json            the first 4 shards are a store: commits, statistics, digest
      status.json                  what a running harvest is doing; not part of the store

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
CHUNK_BYTES = 6 << 20  # 1.5 to 6 MiB read fastest: smaller pays per chunk, larger leaves the cache
MAX_CHUNK_ROWS = 4096
CODE_FILL = -128  # of int8 arrays; codes go from -127 to 127
DIMENSIONS = {
    "tokens": ("context", "position"),
    "activations": ("row", "channel"),
    "norms": ("row",),
    "quantization": ("shard", "scale_offset", "channel"),
}
MAX_WIDTH = 1 << 20  # of a row
MAX_SHARD_ROWS = 1 << 27  # a shard is made in memory

# What is read of the parts of a plan that are free in form. Rows that come from no text have no
# tokenizer.
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
    """One recorded place in the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_site_name)] = Field(
        description="for example resid_post.12"
    )
    width: int = Field(gt=0, le=MAX_WIDTH, description="numbers per row")


class PlanSettings(BaseModel):
    """A plan without its sites, whose widths are known once a model is loaded."""

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


class Plan(PlanSettings):
    """Everything that decides the bytes of a shard. Stores of equal plans have equal shards."""

    sites: tuple[SitePlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_possible(self) -> Plan:
        """Refuse what no harvest plans; a plan is read from files that others may have written."""
        for field, kinds in _KINDS.items() if self.tokenizer else _ALWAYS.items():
            for name, kind in kinds.items():
                if type(getattr(self, field).get(name)) is not kind:
                    raise ValueError(f"{field}.{name} is missing or no {kind.__name__}")
        if len({site.name for site in self.sites}) < len(self.sites):
            raise ValueError("a site is named twice")
        if self.shard_rows > MAX_SHARD_ROWS:
            raise ValueError(f"a shard has {self.shard_rows:,} rows, more than {MAX_SHARD_ROWS:,}")
        return self

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
        return _largest_divisor(self.shard_rows, limit)

    def differing_fields(self, other: Plan) -> list[str]:
        """`option: this → other` for every field in which two plans differ.

        A field that no option of `harvest run` decides has its own name, `model.weights` say.
        Widths are compared where the sites are the same: they follow from model and site.
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
    """Return the largest divisor of a number up to a limit; asked for every chunk that is read."""
    return next(d for d in range(limit, 0, -1) if number % d == 0)


def _flat(plan: Plan) -> dict[str, Any]:
    """The fields of a plan for people: `model.weights` and the like apart, sites by their names."""
    flat: dict[str, Any] = {}
    for field, value in plan.model_dump(mode="json", exclude={"sites"}).items():
        if isinstance(value, dict):
            flat |= {f"{field}.{name}": part for name, part in value.items()}
        else:
            flat[field] = value
    return flat | {"sites": ", ".join(site.name for site in plan.sites)}


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """An array of a store, of which each shard is an object."""

    dimensions: tuple[str, ...]
    """Names of the dimensions. The first one is divided into shards."""
    dtype: str
    shard: tuple[int, ...]
    """Shape of a shard."""
    chunk: tuple[int, ...]
    """Shape of a chunk. It is the shard's where the object is one chunk."""
    fill: float
    """Value of entries past the end of the array."""
    is_sharded: bool = False
    """True if an object is many chunks and an index of them: zarr's `sharding_indexed`."""


def array_spec(plan: Plan, path: str) -> ArraySpec:
    """The array at `path`: what its zarr.json, its codec and the names of its objects follow."""
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
    """Keys of all objects of a shard, sorted; its commit record lists these and no others."""
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
    """Return the array that an object is a shard of; None for a table's key."""
    return None if key.endswith(".parquet") else key.rpartition("/")[0]


PLAN_KEY = "plan.json"
STATUS_KEY = "status.json"
