"""Reading a sealed store: rows, norms, tokens, tables. What is damaged is never read as data."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.storage import LocalStore

from store import layout
from store.errors import DamagedError, InputError, UnfinishedError
from store.layout import Plan
from store.objects import content_hash
from store.records import decode_record
from store.rules import RowRule, heldout_documents
from store.stats import Moments
from store.writer import committed_shards, read_commit, read_plan_record


class ActivationStore:
    """A sealed store on a local disk.

    Every read first checks that the shard's object is there and as long as its commit says
    (zarr would give its fill value for a missing one); the crc32c of each chunk does the rest.
    """

    def __init__(self, path: Path, plan: Plan, sealed: dict[str, Any]) -> None:
        self.path = path
        self._plan = plan
        self._sealed = sealed
        self._group = zarr.open_group(LocalStore(path, read_only=True), mode="r")
        self._commits: dict[int, dict[str, Any]] = {}
        self._checked: set[str] = set()
        self._arrays: dict[str, Any] = {}

    @classmethod
    def open(cls, path: str | Path) -> ActivationStore:
        """Open a sealed store.

        Raises:
            NotAStoreError: no store there.
            UnfinishedError: the harvest has shards left to do.
            DamagedError: plan.json or sealed.json is damaged.
        """
        path = Path(path)
        plan = Plan.model_validate(read_plan_record(path)["plan"])
        try:
            data = (path / layout.SEALED_KEY).read_bytes()
        except FileNotFoundError:
            done = len(committed_shards(path, plan))
            raise UnfinishedError(
                f"{path} is not finished: {done} of {plan.n_shards} shards are committed; "
                "run the same `harvest run` command again to continue it."
            ) from None
        sealed = decode_record(data, f"{path}/{layout.SEALED_KEY}")
        if sealed["plan"] != plan.hash:
            raise DamagedError(f"{path}/{layout.SEALED_KEY} belongs to another store.")
        return cls(path, plan, sealed)

    @property
    def plan(self) -> dict[str, Any]:
        """The plan, as in plan.json."""
        return self._plan.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Identity of the content: plan and every object."""
        return self._sealed["digest"]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site.name for site in self._plan.sites)

    @property
    def n_rows(self) -> int:
        return self._plan.n_rows

    @property
    def n_contexts(self) -> int:
        return self._plan.n_contexts

    @property
    def context_length(self) -> int:
        return self._plan.context_length

    @property
    def n_shards(self) -> int:
        return self._plan.n_shards

    @property
    def shard_rows(self) -> int:
        return self._plan.shard_rows

    @property
    def n_bytes(self) -> int:
        """Size of all committed objects."""
        return self._sealed["bytes"]

    def site(self, name: str | None) -> str:
        """The named site, or the only one; `InputError` if it is not there or not one of one."""
        if name is None and len(self.sites) == 1:
            return self.sites[0]
        if name not in self.sites:
            asked = "choose one with --site" if name is None else f"it has no site {name!r}"
            raise InputError(f"{self.path} holds the sites {', '.join(self.sites)}; {asked}.")
        return name

    def width(self, site: str) -> int:
        """Numbers per row of a site; `InputError` naming the sites if it is not there."""
        return self._plan.width(self.site(site))

    def chunk_rows(self, site: str) -> int:
        """Rows per zarr chunk: the unit of an efficient read."""
        return self._plan.chunk_rows(self.site(site))

    def read(self, site: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Activations [stop - start, width] in the stored dtype. `DamagedError` by name."""
        return self._read(f"activations/{self.site(site)}", start, stop)

    def norms(self, site: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """L2 norms before casting, float32 [stop - start]."""
        return self._read(f"norms/{self.site(site)}", start, stop)

    def tokens(self, first_context: int, last_context: int) -> npt.NDArray[np.int32]:
        """Token ids [last - first, context_length]."""
        return self._read("tokens", first_context, last_context)

    def contexts(self, shard: int) -> pa.Table:
        """The pieces of documents that the shard's contexts consist of."""
        return self._table(layout.context_key(shard), shard)

    def documents(self, shard: int) -> pa.Table:
        """The documents that first appear in the shard; every document appears once."""
        return self._table(layout.document_key(shard), shard)

    def statistics(self, site: str) -> dict[str, Any]:
        """Merged statistics, with `Moments` under "ordinary", "outlier" and "all"."""
        merged = dict(self._sealed["statistics"][self.site(site)])
        for group in ("ordinary", "outlier"):
            merged[group] = Moments.from_json(merged[group])
        merged["all"] = merged["ordinary"].merge(merged["outlier"])
        return merged

    def shard_span(self, shard: int) -> tuple[int, int]:
        """First and last-plus-one row of a shard."""
        first, last = self._plan.shard_contexts(shard)
        return first * self.context_length, last * self.context_length

    def norm_median(self, site: str, shard: int) -> float:
        """Median norm of the shard's rows, to which the outlier rule refers."""
        return self._commit(shard)["statistics"][self.site(site)]["norm_median"]

    def row_documents(self, shard: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Document number and text hash of every row of a shard; -1 and 0 for a BOS."""
        start, stop = self.shard_span(shard)
        pieces = self.contexts(shard)
        document = np.full(stop - start, -1, np.int64)
        text_hash = np.zeros(stop - start, np.uint64)
        context = pieces["context"].to_numpy() * self.context_length - start
        lengths = pieces["stop"].to_numpy() - pieces["start"].to_numpy()
        firsts = context + pieces["start"].to_numpy()
        rows = np.repeat(firsts, lengths) + _ranges(lengths)
        document[rows] = np.repeat(pieces["document"].to_numpy(), lengths)
        text_hash[rows] = np.repeat(pieces["document_hash"].to_numpy(), lengths)
        return document, text_hash

    def selected(self, site: str, rule: RowRule) -> npt.NDArray[np.bool_]:
        """Which rows the rule reads, bool [n_rows]."""
        parts = [self.selected_in_shard(site, rule, shard) for shard in range(self.n_shards)]
        return np.concatenate(parts)

    def selected_in_shard(self, site: str, rule: RowRule, shard: int) -> npt.NDArray[np.bool_]:
        """Which rows of a shard the rule reads, bool [rows of the shard]."""
        start, stop = self.shard_span(shard)
        keep = np.ones(stop - start, np.bool_)
        if rule.max_norm_medians is not None:
            limit = np.float32(rule.max_norm_medians * self.norm_median(site, shard))
            keep &= self.norms(site, start, stop) <= limit
        if rule.split != "all":
            _, text_hash = self.row_documents(shard)
            held_out = heldout_documents(text_hash, rule.heldout_fraction)
            keep &= held_out if rule.split == "heldout" else ~held_out
        return keep

    def _commit(self, shard: int) -> dict[str, Any]:
        if shard not in self._commits:
            self._commits[shard] = read_commit(self.path, self._plan, shard)
        return self._commits[shard]

    def _check(self, key: str, shard: int) -> None:
        if key in self._checked:
            return
        expected = self._commit(shard)["objects"][key]["bytes"]
        try:
            found = (self.path / key).stat().st_size
        except FileNotFoundError:
            raise DamagedError(f"{self.path}/{key} is missing; {_REMEDY}") from None
        if found != expected:
            raise DamagedError(
                f"{self.path}/{key} has {found:,} bytes instead of {expected:,}; {_REMEDY}"
            )
        self._checked.add(key)

    def _read(self, path: str, start: int, stop: int) -> npt.NDArray[Any]:
        if path not in self._arrays:
            self._arrays[path] = self._group[path]
        array = self._arrays[path]
        if not 0 <= start <= stop <= array.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {path} are outside 0:{array.shape[0]}")
        per_shard = self._plan.contexts_per_shard if path == "tokens" else self.shard_rows
        for shard in range(start // per_shard, -(-stop // per_shard)):
            self._check(layout.chunk_key(path, shard), shard)
        try:
            return np.asarray(array[start:stop])
        except (ValueError, RuntimeError, OSError) as error:
            keys = ", ".join(
                layout.chunk_key(path, shard)
                for shard in range(start // per_shard, -(-stop // per_shard))
            )
            raise DamagedError(f"{self.path}/{keys} is damaged ({error}); {_REMEDY}") from error

    @lru_cache(maxsize=8)  # noqa: B019  (a store lives as long as its process)
    def _table(self, key: str, shard: int) -> pa.Table:
        self._check(key, shard)
        data = (self.path / key).read_bytes()
        if content_hash(data) != self._commit(shard)["objects"][key]["xxh3"]:
            raise DamagedError(f"{self.path}/{key} is damaged; {_REMEDY}")
        return pq.read_table(io.BytesIO(data))


_REMEDY = "`harvest verify` lists all damage."


def _ranges(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """0..n-1 for each n, joined: [2, 3] → [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
