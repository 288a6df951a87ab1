"""A worker: one model, which turns shards of token ids into published objects."""

from __future__ import annotations

import contextlib
import functools
import platform
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_harvest.common.errors import InputError, RunError, SaeHarvestError
from sae_harvest.harvest.model.hooks import SiteTap
from sae_harvest.harvest.model.models import (
    ResolvedModel,
    load_model,
    model_fingerprint,
    resolve_model,
)
from sae_harvest.harvest.model.sites import Site
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects
from sae_harvest.store.statistics import stats
from sae_harvest.store.writer import Shard, write_shard

IN_FLIGHT = 2  # shards of a worker at a time: one in the model, one being written
GPU_BATCHES_AHEAD = 4  # batches launched before their results arrive; bounds their memory
FLOAT16_MAX = float(np.finfo(np.float16).max)

Rows = dict[str, npt.NDArray[Any]]  # one array by site


class Stopped(Exception):
    """The worker was asked to stop; no answer is expected."""


@dataclass(frozen=True, slots=True)
class Done:
    """One shard whose objects are published."""

    record: dict[str, Any]
    """Its commit record, not yet published."""
    seconds_model: float
    """Wall time in the model, in s, without the wait for the shard before."""
    seconds_write: float
    """Wall time of encoding and writing, in s."""


class ShardWorker:
    """Holds a model; `harvest` may be called from `IN_FLIGHT` threads.

    The first call loads the model, not the constructor: if an actor's constructor fails, Ray
    reports only text, not the exception. One thread runs the model, one shard at a time; meanwhile
    the caller's thread encodes, hashes and writes the shard before. The model's thread is always
    the same: each thread that runs torch has its own OpenMP threads, and if these are more than
    the cores, they sleep between operators instead of spinning, which costs a tenth of the speed.
    """

    def __init__(
        self,
        model: ResolvedModel,
        sites: tuple[str, ...],
        compute_dtype: str,
        device: str,
        threads: int | None,
        elsewhere: bool = False,
    ) -> None:
        """Take a model; `elsewhere`: it was resolved on another machine and is found on this one.

        Its weights are then compared with the plan's before anything is written.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._requested_model = model
        self._elsewhere = elsewhere
        self._sites = [Site.parse(s) for s in sites]
        self._dtype: torch.dtype = getattr(torch, compute_dtype)
        self._device = device
        self._forward = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._rows_done = 0
        self._stopped = False

    @functools.cached_property
    def _model(self) -> ResolvedModel:
        return _found_here(self._requested_model) if self._elsewhere else self._requested_model

    @functools.cached_property
    def _weights(self) -> str:
        return str(model_fingerprint(self._model)["weights"])

    @functools.cached_property
    def _tap(self) -> SiteTap:
        if self._device == "cuda" and not torch.cuda.is_available():
            raise RunError(f"{platform.node()} has no usable GPU; use --device cpu.")
        model = load_model(self._model, self._dtype, self._device)
        return SiteTap(model, self._sites, self._go_on)

    def widths(self) -> dict[str, int]:
        """Return the numbers per row of each site. Loads the model, for the first shard."""
        stats.warm_up()
        return self._forward.submit(lambda: self._tap.widths).result()

    def rows_done(self) -> int:
        """Count the rows that went through the model since the start, for the progress bar."""
        return self._rows_done

    def stop(self) -> None:
        """Make every present and future call of `harvest` raise `Stopped` at its next block."""
        self._stopped = True

    def _go_on(self) -> None:
        if self._stopped:
            raise Stopped

    def harvest(self, objects: Objects, plan: Plan, shard: Shard) -> Done:
        """Run one shard through the model and publish its objects.

        Raises:
            InputError: as `activations`; or this machine's weights differ from the plan's.
            StoreError: the objects cannot be written.
            RunError: the GPU's memory is too small.
            Stopped: the worker was asked to stop.
        """
        activations, norms, seconds = self._forward.submit(self._timed, plan, shard.tokens).result()
        start = time.perf_counter()
        shard = replace(shard, activations=activations, norms=norms)
        record = write_shard(objects, plan, shard)
        return Done(record, seconds, time.perf_counter() - start)

    def _timed(self, plan: Plan, tokens: npt.NDArray[np.int32]) -> tuple[Rows, Rows, float]:
        if self._elsewhere and self._weights != plan.model["weights"]:
            raise InputError(
                f"{platform.node()} has other weights of {self._model.name} ({self._weights}) "
                f"than the store's plan ({plan.model['weights']}); put the same model on every "
                "machine of the cluster."
            )
        start = time.perf_counter()
        activations, norms = self.activations(plan, tokens)
        return activations, norms, time.perf_counter() - start

    def activations(self, plan: Plan, tokens: npt.NDArray[np.int32]) -> tuple[Rows, Rows]:
        """Compute activations [rows, width] and float32 norms [rows], per site.

        Activations are in the stored dtype, or in float16 for int8: `write_shard` quantizes. Every
        batch has the plan's shape, except a smaller last batch of a shard.

        Raises:
            InputError: a value is not finite, or too large for the stored dtype; a token is not
                in the model's vocabulary.
            RunError, Stopped: as `harvest`.
        """
        largest_id, vocabulary = int(tokens.max()), plan.model["vocabulary"]
        if largest_id >= vocabulary:
            raise InputError(
                f"The tokenizer gives token {largest_id}, the model's vocabulary ends at "
                f"{vocabulary - 1}; use the tokenizer that the model was trained with."
            )
        try:
            tap, landing = self._tap, _Landing(plan, tokens.size, self._device)
            ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
            for batch in ids.split(plan.batch_contexts):  # [contexts, context_length]
                landing.take(tap(batch))
                self._rows_done += batch.numel()
            landing.finish()
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"The GPU of {platform.node()} is too small for this model and batches of "
                f"{plan.batch_contexts} contexts of {plan.context_length}; free its memory, or "
                "use a shorter --context-length or --device cpu."
            ) from error
        for site in landing.norms:
            self._check_range(site, landing, plan, ids)
        return (
            {site: x.numpy() for site, x in landing.x.items()},
            {site: norms.numpy() for site, norms in landing.norms.items()},
        )

    def _check_range(self, site: str, landing: _Landing, plan: Plan, ids: Tensor) -> None:
        """Check that values are finite and in range; once per shard, so that no batch waits."""
        # A finite norm means finite values, and a norm in range means values in range: the
        # values are checked only if this cheap test fails.
        norms = landing.norms[site]
        if not bool(torch.isfinite(norms.max())):
            remedy = (
                "its weights may be damaged"
                if plan.compute_dtype == "float32"
                else "run the model in --compute-dtype float32"
            )
            raise InputError(
                f"{site} holds values that are not finite (NaN or overflow in "
                f"{plan.compute_dtype}); {remedy}."
            )
        if landing.x[site].dtype != torch.float16 or float(norms.max()) <= FLOAT16_MAX:
            return
        large = torch.nonzero(norms > FLOAT16_MAX).flatten()  # rows
        overflown = large[torch.isinf(landing.x[site][large]).any(dim=1)]
        if len(overflown):
            context = int(overflown[0]) // plan.context_length
            batch = ids[context - context % plan.batch_contexts :][: plan.batch_contexts]
            peak = float(self._tap(batch)[site].abs().max())  # the cast has made it infinite
            raise InputError(
                f"{site} reaches {peak:,.0f}, more than float16 can hold ({FLOAT16_MAX:,.0f}); "
                "store it with --dtype float32."
            )


class _Landing:
    """Buffers for the rows of a shard, in the stored dtype, with their norms.

    On a GPU, norms, casts and copies run on a separate stream beside the next batches, and the
    copies go to pinned memory, so that nothing waits for them before `finish`.
    """

    def __init__(self, plan: Plan, rows: int, device: str) -> None:
        gpu = torch.device(device).type == "cuda"
        stored = torch.float16 if plan.dtype == "int8" else getattr(torch, plan.dtype)
        self.x = {
            s.name: torch.empty(rows, s.width, dtype=stored, pin_memory=gpu) for s in plan.sites
        }
        self.norms = {s.name: torch.empty(rows, pin_memory=gpu) for s in plan.sites}
        self._n_rows = 0
        self._stream = torch.cuda.Stream() if gpu else None
        self._copies: deque[torch.cuda.Event] = deque()

    @torch.inference_mode()
    def take(self, captured: dict[str, Tensor]) -> None:
        """Take the next rows of every site, [batch, context_length, width]."""
        first = self._n_rows
        with self._beside(captured):
            for site, tensor in captured.items():
                flat = tensor.flatten(0, 1)  # [batch * context_length, width]
                rows = slice(first, first + len(flat))
                self._n_rows = rows.stop
                norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
                if self._stream is not None:  # cast on the GPU: fewer bytes to copy
                    flat = flat.to(self.x[site].dtype)
                self.norms[site][rows].copy_(norms, non_blocking=True)
                self.x[site][rows].copy_(flat, non_blocking=True)

    def finish(self) -> None:
        """Return when every row has been copied."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextlib.contextmanager
    def _beside(self, captured: dict[str, Tensor]) -> Iterator[None]:
        """Run on the copy stream, after the captured tensors are ready; on a CPU, directly."""
        if self._stream is None:
            yield
            return
        if len(self._copies) >= GPU_BATCHES_AHEAD:
            self._copies.popleft().synchronize()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
            self._copies.append(self._stream.record_event())
        for tensor in captured.values():
            tensor.record_stream(self._stream)  # its memory is not reused before


def _found_here(model: ResolvedModel) -> ResolvedModel:
    """Find the same model on this machine; its path may belong to another machine's cache."""
    try:
        return resolve_model(model.name, model.revision)
    except SaeHarvestError as error:
        raise InputError(f"On {platform.node()}: {error}") from error
