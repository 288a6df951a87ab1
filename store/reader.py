"""Reading a sealed store: rows, norms, tokens, tables. Damaged objects raise an error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import DamagedError, InputError
from sae_harvest.common.finite import require_finite
from sae_harvest.store import codec, layout
from sae_harvest.store.commits import load_commit, place_in_corpus, read_object, read_plan
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects, open_objects
from sae_harvest.store.rules import RowRule, heldout_documents
from sae_harvest.store.seals import find_seal
from sae_harvest.store.statistics import quantize
from sae_harvest.store.statistics.stats import Moments
from sae_harvest.store.tables import exact_values, parse_table

if TYPE_CHECKING:
    import dask.array


class Scratch:
    """Reusable memory for `ActivationStore.read`, for one thread.

    Its content is valid until the next read. New memory for every chunk would cost a page fault
    every 4 KiB.
    """

    def __init__(self) -> None:
        self._memory: dict[str, npt.NDArray[np.uint8]] = {}

    def bytes(self, use: str, count: int) -> npt.NDArray[np.uint8]:
        """Return the memory for one use, uint8 [count], enlarged if needed."""
        if use not in self._memory or len(self._memory[use]) < count:
            self._memory[use] = np.empty(count, np.uint8)
        return self._memory[use][:count]


@dataclass(frozen=True, slots=True)
class _Committed:
    """The part of a commit record that reading its shard needs; the rest would fill the memory."""

    medians: dict[str, float]
    """Site → median norm."""
    chunks: dict[str, npt.NDArray[np.uint32]]
    """Path of the array → crc32c of each chunk, uint32 [chunks]."""
    tables: dict[str, dict[str, Any]]
    """Key → bytes and xxh3 of each table."""


class ActivationStore:
    """A sealed store, in a folder or a bucket.

    >>> store = ActivationStore.open("runs/demo/store")
    >>> store.sites, store.n_rows, store.width("resid_post.1")
    (('resid_post.1',), 8192, 32)
    >>> store.read("resid_post.1", 0, 2).shape, store.tokens(0, 2).shape
    ((2, 32), (2, 32))

    Reads are checked: the seal lists the digest of each commit record, and the record lists the
    crc32c of each chunk and the hash of each table. An object that is missing, cut short, altered,
    or belongs to another shard or store raises `DamagedError`.
    """

    def __init__(self, objects: Objects, plan: Plan, seal: dict[str, Any]) -> None:
        self.place = objects.place
        self._objects = objects
        self._plan = plan
        self._seal = seal
        self._committed: dict[int, _Committed] = {}
        # caches that live as long as this store
        self._table = lru_cache(maxsize=8)(self._read_table)
        self._quantization = lru_cache(maxsize=64)(self._read_quantization)

    @classmethod
    def open(cls, place: str | Path, digest: str | None = None) -> ActivationStore:
        """Open a sealed store.

        Args:
            place: a folder, or `s3://bucket/prefix`.
            digest: digest of an earlier state of a store that has grown; None opens all of it.

        Raises:
            NotAStoreError: there is no store.
            UnfinishedError: nothing is sealed, or nothing with that digest.
            DamagedError: plan.json or a seal is damaged.
        """
        objects = open_objects(place)
        plan = read_plan(objects)
        return cls(objects, plan, find_seal(objects, plan, digest))

    @property
    def plan(self) -> dict[str, Any]:
        """The plan, as in plan.json."""
        return self._plan.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Identity of the content: the plan and every object."""
        return self._seal["digest"]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site.name for site in self._plan.sites)

    @property
    def n_rows(self) -> int:
        return self._seal["rows"]

    @property
    def n_contexts(self) -> int:
        return self._seal["contexts"]

    @property
    def context_length(self) -> int:
        return self._plan.context_length

    @property
    def n_shards(self) -> int:
        return self._seal["shards"]

    @property
    def shard_rows(self) -> int:
        """Rows of a shard; the last one may have fewer."""
        return self._plan.shard_rows

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that `read` returns: the stored dtype, or float32 for an int8 store."""
        return np.dtype("float32" if self._plan.dtype == "int8" else self._plan.dtype)

    @property
    def n_bytes(self) -> int:
        """Size of all committed objects."""
        return self._seal["bytes"]

    def site(self, name: str | None) -> str:
        """Return the named site, or the only one. Raise `InputError` if there is no such choice."""
        if name is None and len(self.sites) == 1:
            return self.sites[0]
        if name not in self.sites:
            asked = "choose one with --site" if name is None else f"it has no site {name!r}"
            raise InputError(f"{self.place} holds the sites {', '.join(self.sites)}; {asked}.")
        return name

    def width(self, site: str) -> int:
        """Return the width of a site. Raise `InputError` if there is no such site."""
        return self._plan.width(self.site(site))

    def chunk_rows(self, site: str) -> int:
        """Return the rows per chunk, the unit of an efficient read."""
        return self._plan.chunk_rows(self.site(site))

    def read(
        self, site: str, start: int, stop: int, scratch: Scratch | None = None
    ) -> npt.NDArray[Any]:
        """Return the activations of rows [start, stop), [stop - start, width] as `dtype`.

        Args:
            site: name of the site.
            start: first row.
            stop: row after the last one.
            scratch: memory for the result, instead of new memory.

        Raises:
            DamagedError: an object is missing or damaged; names it.
        """
        path = f"activations/{self.site(site)}"
        rows, width = self.chunk_rows(site), self.width(site)
        self._inside(path, start, stop, self.n_rows)
        first = start - start % rows
        if self._plan.dtype != "int8" and start < stop <= first + rows:
            chunk = self._chunk(path, first, scratch)
            if scratch is not None or stop - start == rows:
                return chunk[start - first : stop - first]  # as it was read, without a copy
            return chunk[start - first : stop - first].copy()  # a few rows don't keep it all
        shape = stop - start, width
        if scratch is None:
            x = np.empty(shape, self.dtype)
        else:
            x = scratch.bytes("rows", math.prod(shape) * self.dtype.itemsize)
            x = x.view(self.dtype).reshape(shape)
        for at in range(first, stop, rows):
            low, high = max(start, at), min(stop, at + rows)
            into = x[low - start : high - start]
            stored = self._chunk(path, at, scratch)[low - at : high - at]
            if self._plan.dtype == "int8":
                self._dequantize(site, low, stored, into)
            else:
                into[:] = stored
        return x

    def dask(self, site: str | None = None) -> dask.array.Array:
        """Return the rows of a site as a lazy array, float32 [n_rows, width].

        A chunk is read and checked when it is computed. Arrays that zarr and dask open directly are
        float16, which overflows in sums, or int8 without its scale.

        >>> ActivationStore.open("runs/demo/store").dask().mean(0).compute().dtype
        dtype('float32')

        Args:
            site: None for the store's only site.

        Raises:
            InputError: there is no such site.
            DamagedError: raised while computing, if an object is damaged.
        """
        from sae_harvest.store.lazy import lazy_rows

        return lazy_rows(self, site)

    def norms(self, site: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return L2 norms before casting, float32 [stop - start]."""
        path = f"norms/{self.site(site)}"
        self._inside(path, start, stop, self.n_rows)
        return self._gather(path, start, stop, self.shard_rows)

    def tokens(self, first_context: int, last_context: int) -> npt.NDArray[np.int32]:
        """Return the token ids of contexts, int32 [last - first, context_length]."""
        self._inside("tokens", first_context, last_context, self.n_contexts)
        return self._gather("tokens", first_context, last_context, self._plan.contexts_per_shard)

    def pieces(self, shard: int) -> pa.Table:
        """Return the pieces of documents that the shard's contexts consist of."""
        return self._table(layout.context_key(shard), shard)

    def documents(self, shard: int) -> pa.Table:
        """Return the documents that first appear in the shard; a store lists each document once."""
        return self._table(layout.document_key(shard), shard)

    def statistics(self, site: str) -> dict[str, Any]:
        """Return the merged statistics, with `Moments` under "ordinary", "outlier" and "all"."""
        merged = dict(self._seal["statistics"][self.site(site)])
        for group in ("ordinary", "outlier"):
            merged[group] = Moments.from_json(merged[group])
        merged["all"] = merged["ordinary"].merge(merged["outlier"])
        return merged

    def shard_span(self, shard: int) -> tuple[int, int]:
        """Return the rows [first, stop) of a shard."""
        first = shard * self.shard_rows
        return first, min(first + self.shard_rows, self.n_rows)

    def norm_median(self, site: str, shard: int) -> float:
        """Return the median norm of the shard's rows; the outlier rule is relative to it."""
        return self._commit(shard).medians[self.site(site)]

    def row_documents(self, shard: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return the document number and text hash of every row of a shard.

        A BOS belongs to no document: its number is -1. Its hash is that of the first document of
        its context, so that a BOS is in the same split as the text after it.
        """
        start, stop = self.shard_span(shard)
        pieces = self.pieces(shard)
        document = np.full(stop - start, -1, np.int64)
        text_hash = np.zeros(stop - start, np.uint64)
        numbers = pieces["context"].to_numpy()
        context = numbers * self.context_length - start
        first_of, which = np.unique(numbers, return_index=True)
        by_context = text_hash.reshape(-1, self.context_length)
        hashes = pieces["document_hash"].to_numpy()
        by_context[first_of - start // self.context_length] = hashes[which, None]
        lengths = pieces["stop"].to_numpy() - pieces["start"].to_numpy()
        firsts = context + pieces["start"].to_numpy()
        rows = np.repeat(firsts, lengths) + _ranges(lengths)
        document[rows] = np.repeat(pieces["document"].to_numpy(), lengths)
        text_hash[rows] = np.repeat(hashes, lengths)
        return document, text_hash

    def selected(self, site: str, rule: RowRule) -> npt.NDArray[np.bool_]:
        """Return the mask of the rows that the rule selects, bool [n_rows]."""
        parts = [self.selected_in_shard(site, rule, shard) for shard in range(self.n_shards)]
        return np.concatenate(parts)

    def selected_in_shard(self, site: str, rule: RowRule, shard: int) -> npt.NDArray[np.bool_]:
        """Return the mask of a shard's rows that the rule selects, bool [rows of the shard]."""
        start, stop = self.shard_span(shard)
        keep = np.ones(stop - start, np.bool_)
        if rule.max_norm_medians is not None:
            limit = np.float32(rule.max_norm_medians * self.norm_median(site, shard))
            norms = self.norms(site, start, stop)
            require_finite(norms[:, None], self.place, f"the norms of {site}", start)
            keep &= norms <= limit
        if rule.split != "all":
            _, text_hash = self.row_documents(shard)
            held_out = heldout_documents(text_hash, rule.heldout_fraction)
            keep &= held_out if rule.split == "heldout" else ~held_out
        return keep

    def cursor(self, shard: int) -> dict[str, Any]:
        """Return the place in the corpus where the text of a shard begins."""
        return place_in_corpus(self._read_commit(shard))

    def _commit(self, shard: int) -> _Committed:
        if shard not in self._committed:
            record = self._read_commit(shard)
            entries = record["objects"]
            self._committed[shard] = _Committed(
                medians={site: record["statistics"][site]["norm_median"] for site in self.sites},
                chunks={
                    path: np.array(entry["chunks"], np.uint32)
                    for key, entry in entries.items()
                    if (path := layout.array_path(key)) is not None
                },
                tables={key: e for key, e in entries.items() if layout.array_path(key) is None},
            )
        return self._committed[shard]

    def _read_commit(self, shard: int) -> dict[str, Any]:
        sealed = self._seal["commits"][shard]
        record, _ = load_commit(self._objects, self._plan, shard, sealed)
        first, last = self.shard_span(shard)
        if record["rows"] != last - first:
            raise DamagedError(
                f"{self.place}/{layout.commit_key(shard)} has {record['rows']:,} rows where the "
                f"seal has {last - first:,}{_REMEDY}."
            )
        return record

    def _inside(self, path: str, start: int, stop: int, length: int) -> None:
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{start}:{stop} of {path} is outside 0:{length}")

    def _chunk(self, path: str, row: int, scratch: Scratch | None) -> npt.NDArray[Any]:
        """Return the chunk of activations that begins at a row, as stored."""
        shard, inside = divmod(row, self.shard_rows)
        number = inside // self.chunk_rows(path.partition("/")[2])
        return self._read_chunk(path, shard, number, scratch)

    def _read_chunk(
        self, path: str, shard: int, number: int, scratch: Scratch | None = None
    ) -> npt.NDArray[Any]:
        """Return a chunk of an object, as stored.

        Raise `DamagedError` if it is not the committed one.
        """
        stride, key = codec.chunk_stride(self._plan, path), layout.chunk_key(path, shard)
        checksum = int(self._commit(shard).chunks[path][number])
        into = None if scratch is None else scratch.bytes("chunk", stride).data
        data = self._range(key, number * stride, stride, into)
        return codec.decode_chunk(self._plan, path, data, f"{self.place}/{key}", checksum)

    def _gather(self, path: str, start: int, stop: int, per_shard: int) -> npt.NDArray[Any]:
        """Return the entries [start, stop) of an array that has one chunk per shard."""
        parts = []
        for shard in range(start // per_shard, -(-stop // per_shard)):
            first = shard * per_shard
            whole = self._read_chunk(path, shard, 0)
            parts.append(whole[max(0, start - first) : stop - first])
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _range(self, key: str, start: int, length: int, into: memoryview | None = None) -> Buffer:
        try:
            return self._objects.read_range(key, start, length, into)
        except FileNotFoundError:
            raise DamagedError(f"{self.place}/{key} is missing{_REMEDY}.") from None

    def _dequantize(
        self, site: str, start: int, codes: npt.NDArray[np.int8], out: npt.NDArray[np.float32]
    ) -> None:
        shard = start // self.shard_rows
        (scale, offset), rows, values = self._quantization(site, shard)
        quantize.decode(codes, scale, offset, out)
        low, high = np.searchsorted(rows, [start, start + len(out)])
        out[rows[low:high] - start] = values[low:high]

    def _read_quantization(self, site: str, shard: int) -> tuple[npt.NDArray[Any], ...]:
        """Return scale and offset [2, width] of a shard, and its exact rows' numbers and values."""
        affine = self._read_chunk(f"quantization/{site}", shard, 0)[0]
        exact = self._table(layout.exact_key(site, shard), shard)
        return affine, exact["row"].to_numpy(), exact_values(exact, self.width(site))

    def _read_table(self, key: str, shard: int) -> pa.Table:
        data = read_object(self._objects, key, self._commit(shard).tables[key], _REMEDY)
        return parse_table(data, self._plan, key, shard, f"{self.place}/{key}")


_REMEDY = "; `harvest verify` lists all damage"


def _ranges(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return 0..n-1 for each n, joined: [2, 3] → [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
