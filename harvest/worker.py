"""One model, turning shards of token ids into published objects."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from harvest.contexts import ShardInput
from harvest.models import ResolvedModel, load_model
from harvest.sites import Site, SiteTap
from store.errors import InputError
from store.layout import Plan
from store.writer import Shard, write_shard

FLOAT16_MAX = float(np.finfo(np.float16).max)


class Stopped(Exception):
    """A worker was asked to stop; whoever asked wants no answer."""


class ShardWorker:
    """Holds a model; `harvest` may be called from two threads.

    The model is loaded by the first call, not by the constructor: of an actor whose constructor
    failed, Ray hands on no exception, only text. One thread runs the model, one shard at a time;
    meanwhile the caller's encodes, hashes and writes the shard before. It is always the same
    thread: each that runs torch has a team of OpenMP threads, and with more of them than cores
    they sleep between operators instead of spinning, which costs a tenth of the speed.
    """

    def __init__(
        self,
        model: ResolvedModel,
        sites: tuple[str, ...],
        compute_dtype: str,
        device: str,
        threads: int | None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._model = model
        self._sites = [Site.parse(s) for s in sites]
        self._dtype: torch.dtype = getattr(torch, compute_dtype)
        self._device = device
        self._forward = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._rows_done = 0
        self._stopped = False

    @functools.cached_property
    def _tap(self) -> SiteTap:
        return SiteTap(load_model(self._model, self._dtype, self._device), self._sites)

    def widths(self) -> dict[str, int]:
        """Site → numbers per row."""
        return self._forward.submit(lambda: self._tap.widths).result()

    def rows_done(self) -> int:
        """Rows that have been through the model since the start, for the progress bar."""
        return self._rows_done

    def stop(self) -> None:
        """Make every `harvest` under way and to come raise `Stopped` at its next batch."""
        self._stopped = True

    def harvest(self, root: Path, plan: Plan, shard: ShardInput) -> dict[str, Any]:
        """Run one shard through the model, publish its objects, return its commit record."""
        made_here = self._forward.submit(self.activations, plan, shard.tokens)
        activations, norms = made_here.result()
        made = Shard(shard.shard, shard.tokens, shard.pieces, shard.documents, activations, norms)
        return write_shard(root, plan, made)

    def activations(
        self, plan: Plan, tokens: npt.NDArray[np.int32]
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[np.float32]]]:
        """Activations [rows, width] in the stored dtype and norms [rows], per site.

        Raises:
            InputError: a value is not finite, or too large for the stored dtype; a token is not
                in the model's vocabulary.
            Stopped: the worker was asked to stop.
        """
        largest_id, vocabulary = int(tokens.max()), plan.model["vocabulary"]
        if largest_id >= vocabulary:
            raise InputError(
                f"The tokenizer gives token {largest_id}, the model's vocabulary ends at "
                f"{vocabulary - 1}; use the tokenizer that the model was trained with."
            )
        rows, length = tokens.size, plan.context_length
        stored = getattr(torch, plan.dtype)
        x = {s.name: torch.empty(rows, s.width, dtype=stored) for s in plan.sites}
        norms = {s.name: torch.empty(rows) for s in plan.sites}
        ids = torch.from_numpy(tokens.astype(np.int64))
        for first in range(0, len(ids), plan.batch_contexts):
            if self._stopped:
                raise Stopped
            batch = ids[first : first + plan.batch_contexts].to(self._device)
            here = slice(first * length, first * length + batch.numel())
            for site, captured in self._tap(batch).items():
                flat = captured.flatten(0, 1)  # [batch * length, width]
                norm = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
                _check_range(site, norm, flat, plan)
                norms[site][here] = norm
                x[site][here] = flat.to(stored)
            self._rows_done += batch.numel()
        return {s: t.numpy() for s, t in x.items()}, {s: t.numpy() for s, t in norms.items()}


def _check_range(site: str, norm: torch.Tensor, flat: torch.Tensor, plan: Plan) -> None:
    # A finite norm means finite values, and a norm in range means values in range: the whole
    # tensor is looked at only when the cheap test fails.
    largest = norm.max().item()
    if not np.isfinite(largest):
        remedy = (
            "its weights may be damaged"
            if plan.compute_dtype == "float32"
            else "run the model in --compute-dtype float32"
        )
        raise InputError(
            f"{site} holds values that are not finite (NaN or overflow in {plan.compute_dtype}); "
            f"{remedy}."
        )
    if plan.dtype == "float16" and largest > FLOAT16_MAX:
        peak = flat.abs().max().item()
        if peak > FLOAT16_MAX:
            raise InputError(
                f"{site} reaches {peak:,.0f}, more than float16 can hold ({FLOAT16_MAX:,.0f}); "
                "store it with --dtype float32."
            )
