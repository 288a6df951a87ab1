"""A store's rows, exported to files that other tools open: Parquet or safetensors.

    OUT/
      export.json                what was exported from which store; the files, with rows and bytes
      documents/000000.parquet   id, source, title, url of every document (and its text, if kept)
      <site>/000000.parquet      or .safetensors: the rows of one shard

A file appears whole or not at all, so that an interrupted export continues with the missing files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import InputError
from sae_harvest.common.parsing import parse_json
from sae_harvest.common.safetensors_stream import dtype_name, make_header
from sae_harvest.store.objects import Objects, open_objects, require_space
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.records import digest_of
from sae_harvest.store.rules import RowRule
from sae_harvest.store.tables import encode_table

EXPORT_KEY = "export.json"
SMALL_BYTES_PER_ROW = 48  # upper estimate of the bytes of a row without its activations
SMALL_COLUMNS = {
    "row": pa.int64(),
    "context": pa.int64(),
    "position": pa.int32(),
    "token": pa.int32(),
    "document": pa.int64(),
    "norm": pa.float32(),
}

OnProgress = Callable[[int, int], None]  # rows written, rows to write, over all sites


class ExportConfig(BaseModel):
    """The rows to export, and their format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["parquet", "safetensors"] = Field(description="of the files with rows")
    sites: tuple[str, ...] = Field(default=(), description="empty: every site of the store")
    shards: tuple[int, int] | None = Field(
        default=None, description="first and last-plus-one shard; all if left out"
    )
    without_outliers: bool = Field(
        default=False, description="leave out rows above five medians of their shard's norms"
    )


@dataclass(frozen=True, slots=True)
class Exported:
    """The contents of an export's folder."""

    files: int
    """Files with rows."""
    rows: int
    """Rows in them, over all sites."""
    n_bytes: int
    """Bytes of everything in the folder."""


def export(
    place: str | Path,
    out: str | Path,
    config: ExportConfig,
    on_progress: OnProgress = lambda done, todo: None,
) -> Exported:
    """Write the rows of a sealed store into `out`, a folder or s3://bucket/prefix.

    Raises:
        NotAStoreError, UnfinishedError, DamagedError: as `ActivationStore.open` and reading.
        InputError: no such site or shards; another export or something else is at `out`.
        StoreError: `out` cannot be written, or is too small.
    """
    store = ActivationStore.open(place)
    target = open_objects(out)
    sites = tuple(dict.fromkeys(store.site(site) for site in config.sites or store.sites))
    first, last = _shards(store, config.shards)
    request = _request(store, config, sites, first, last)
    _check_target(target, request)
    existing = set(target.keys(""))
    _check_space(target, store, sites, first, last, existing, config)
    _write_summary(target, request, None)
    # A document is listed with the first shard that holds a part of it, so the rows exported may
    # belong to documents listed in earlier shards.
    for shard in range(last):
        key = f"documents/{shard:06d}.parquet"
        if key not in existing:
            target.replace(key, [encode_table(store.documents(shard))])
    done = 0
    todo = (store.shard_span(last - 1)[1] - store.shard_span(first)[0]) * len(sites)
    files: dict[str, dict[str, int]] = {}
    for shard in range(first, last):
        start, stop = store.shard_span(shard)
        for site in sites:
            key = file_key(config, site, shard)
            keep = np.ones(stop - start, np.bool_)
            if config.without_outliers:
                keep = store.selected_in_shard(site, RowRule(split="all"), shard)
            if key not in existing:
                encode = _parquet if config.format == "parquet" else _safetensors
                target.replace(key, encode(_ShardRows(store, site, shard, keep), request))
            files[key] = {"rows": int(keep.sum()), "bytes": target.size(key) or 0}
            done += stop - start
            on_progress(done, todo)
    _write_summary(target, request, files)
    for key in target.leftovers():
        target.remove(key)
    n_bytes = sum(target.size(key) or 0 for key in target.keys(""))
    return Exported(len(files), sum(file["rows"] for file in files.values()), n_bytes)


def file_key(config: ExportConfig, site: str, shard: int) -> str:
    """Return the path, in the export's folder, of the rows of one shard of one site."""
    return f"{site}/{shard:06d}.{config.format}"


class _ShardRows:
    """The rows of one shard of one site that are exported."""

    def __init__(
        self, store: ActivationStore, site: str, shard: int, keep: npt.NDArray[np.bool_]
    ) -> None:
        self.store, self.site, self.shard = store, site, shard
        self.first, self.stop = store.shard_span(shard)
        self._keep = keep
        length = store.context_length
        tokens = store.tokens(self.first // length, self.stop // length)
        documents, _ = store.row_documents(shard)
        self.rows = np.flatnonzero(keep) + self.first
        self.tokens = tokens.reshape(-1)[keep]
        self.documents = documents[keep]
        self.norms = store.norms(site, self.first, self.stop)[keep]

    def blocks(self) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Yield slices of `rows` with their activations, a chunk of the store at a time."""
        at, size = 0, self.store.chunk_rows(self.site)
        for start in range(self.first, self.stop, size):
            stop = min(start + size, self.stop)
            keep = self._keep[start - self.first : stop - self.first]
            x = self.store.read(self.site, start, stop)[keep]  # [kept, width]
            yield slice(at, at + len(x)), x
            at += len(x)


def _parquet(shard_rows: _ShardRows, request: dict[str, Any]) -> list[Buffer]:
    """Encode as Parquet, a row group per chunk of the store. A BOS has no document: null."""
    width, length = shard_rows.store.width(shard_rows.site), shard_rows.store.context_length
    values = pa.list_(pa.from_numpy_dtype(shard_rows.store.dtype), width)
    schema = pa.schema(
        SMALL_COLUMNS | {"activation": values},
        metadata={"sae_harvest": json.dumps(_metadata(shard_rows, request))},
    )
    sink = pa.BufferOutputStream()
    # Activations neither compress nor repeat: the attempt would take most of the time.
    with pq.ParquetWriter(
        sink,
        schema,
        compression=dict.fromkeys(SMALL_COLUMNS, "zstd") | {"activation.list.element": "none"},
        use_dictionary=["token", "document"],
        write_statistics=list(SMALL_COLUMNS),
    ) as writer:
        for block, x in shard_rows.blocks():
            rows, documents = shard_rows.rows[block], shard_rows.documents[block]
            columns = {
                "row": rows,
                "context": rows // length,
                "position": (rows % length).astype(np.int32),
                "token": shard_rows.tokens[block],
                "document": pa.array(documents, mask=documents < 0),
                "norm": shard_rows.norms[block],
                "activation": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), width),
            }
            writer.write_table(pa.table(columns, schema))
    return [memoryview(sink.getvalue())]


def _safetensors(shard_rows: _ShardRows, request: dict[str, Any]) -> list[Buffer]:
    """Encode as safetensors: rows int64, tokens int32, norms float32 [rows], and activations.

    The format's own library would copy all tensors, and would change the order of the metadata each
    time.
    """
    store = shard_rows.store
    x = np.empty((len(shard_rows.rows), store.width(shard_rows.site)), store.dtype)
    for block, activations in shard_rows.blocks():
        x[block] = activations
    tensors: dict[str, npt.NDArray[Any]] = {
        "rows": shard_rows.rows,
        "tokens": shard_rows.tokens,
        "norms": shard_rows.norms,
        "activations": x,
    }
    metadata = {name: str(value) for name, value in _metadata(shard_rows, request).items()}
    header = make_header(
        {name: (dtype_name(tensor.dtype), tensor.shape) for name, tensor in tensors.items()},
        metadata,
    )
    little = [np.ascontiguousarray(t, t.dtype.newbyteorder("<")) for t in tensors.values()]
    return [header.data, *(tensor.reshape(-1).view(np.uint8).data for tensor in little)]


def _metadata(shard_rows: _ShardRows, request: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that is written into a file."""
    return {
        "exported_by": "sae-harvest",
        "site": shard_rows.site,
        "shard": shard_rows.shard,
        "store_digest": request["digest"],
        "plan_hash": request["plan_hash"],
        "model": request["plan"]["model"]["name"],
        "dtype": request["dtype"],
        "without_outliers": request["without_outliers"],
    }


def _request(
    store: ActivationStore, config: ExportConfig, sites: tuple[str, ...], first: int, last: int
) -> dict[str, Any]:
    """Return everything that decides the bytes of an export."""
    dtype = f"{store.dtype}, as stored"
    if store.plan["dtype"] == "int8":
        dtype = "float32, dequantised from int8; outlier rows from float16"
    return {
        "digest": store.digest,
        "format": config.format,
        "sites": list(sites),
        "shards": [first, last],
        "without_outliers": config.without_outliers,
        "dtype": dtype,
        "plan_hash": digest_of(store.plan),
        "plan": store.plan,
    }


def _shards(store: ActivationStore, shards: tuple[int, int] | None) -> tuple[int, int]:
    first, last = shards or (0, store.n_shards)
    if not 0 <= first < last <= store.n_shards:
        raise InputError(
            f"{store.place} has the shards 0:{store.n_shards}, got --shards {first}:{last}."
        )
    return first, last


def _check_target(target: Objects, request: dict[str, Any]) -> None:
    """Raise `InputError` if the target holds anything but this export, begun or finished."""
    try:
        export_record = parse_json(target.read(EXPORT_KEY))
    except FileNotFoundError:
        if foreign := target.first_key():
            raise InputError(
                f"{target.place} is not empty and holds no export (found {foreign!r}); choose "
                "another --out or empty it."
            ) from None
        return
    except ValueError:
        export_record = None
    if not isinstance(export_record, dict):
        raise InputError(
            f"{target.place} holds another export, or its {EXPORT_KEY} is damaged; choose another "
            "--out or remove that file."
        )
    if differing := [name for name in request if export_record.get(name) != request[name]]:
        raise InputError(
            f"{target.place} holds another export; differing: {', '.join(differing)}. Choose "
            "another --out."
        )


def _check_space(
    target: Objects,
    store: ActivationStore,
    sites: tuple[str, ...],
    first: int,
    last: int,
    existing: set[str],
    config: ExportConfig,
) -> None:
    """Raise `StoreError` if the disk cannot hold the files that are still to be written."""
    need = 0
    for site in sites:
        row_bytes = store.width(site) * store.dtype.itemsize + SMALL_BYTES_PER_ROW
        for shard in range(first, last):
            if file_key(config, site, shard) not in existing:
                start, stop = store.shard_span(shard)
                need += (stop - start) * row_bytes
    require_space(target, need, "export fewer --shards or choose another --out")


def _write_summary(
    target: Objects, request: dict[str, Any], files: dict[str, dict[str, int]] | None
) -> None:
    content = request | {"finished": files is not None, "files": files or {}}
    target.replace(EXPORT_KEY, [json.dumps(content, indent=2).encode() + b"\n"])
