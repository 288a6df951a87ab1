"""Several processes that train one dictionary together, over torch.distributed.

    DataParallel     every process holds all latents and takes its part of each batch's rows;
                     gradients are summed
    ShardedLatents   every process takes every row and holds a part of the latents; partial
                     reconstructions are summed, and the k largest of a row are found over all
                     parts

`docs/distributed.md` lists what each of them sends in a step. The order of sums depends only on
the number of processes, so the same number gives the same bits each time.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from sae_harvest.common.errors import InputError, SaeHarvestError
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.run.exit_codes import may_pass
from sae_harvest.train.run.faults import is_of_gpu, lacks_memory
from sae_harvest.train.sae.kernels import Gradients

T = TypeVar("T")
Parallel = Literal["data", "latents"]

# How long a process waits for the others: for late batches, and for the first process while it
# makes a folder or checks a checkpoint. A dead process is noticed at once.
TIMEOUT = timedelta(minutes=10)
SIGHT_SECONDS = 20.0  # time until another machine must see a new file
SENTENCE_BYTES = 4096
BLOCK = 4096  # latents at a time
BLOCK_KEYS = 1 << 26  # half a gigabyte of keys
NOTHING = torch.iinfo(torch.int64).min  # key that stands for no pair
LOW_BITS = (1 << 32) - 1


class PeerFailed(SaeHarvestError):
    """Another process failed; the message is that of the other process."""


class PeerLost(SaeHarvestError):
    """Another process has ended, cannot be reached, or keeps the others waiting."""


@contextmanager
def reaching_peers() -> Iterator[None]:
    """Raise faults of communication as `PeerLost`, for which a retry may help.

    Faults of this process's memory or GPU stay as they are.
    """
    try:
        yield
    except RuntimeError as error:  # gloo raises no more specific class
        if lacks_memory(error) or is_of_gpu(error):
            raise  # a fault of this process: a retry would not help
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeerLost(
            "Another process of this run has ended or no longer answers; the same command "
            "continues from the last checkpoint."
        ) from passing(why)


def passing(why: str) -> OSError:
    """Return a cause that tells `train.run.exit_codes` that a retry may help."""
    return ConnectionResetError(errno.ECONNRESET, why)


def _to_numbers(error: Exception | None) -> Tensor:
    """Return an error as int64 [SENTENCE_BYTES]: whether a retry may help, then UTF-8."""
    numbers = torch.zeros(SENTENCE_BYTES, dtype=torch.int64)
    if error is not None:
        text = str(error).encode()[: SENTENCE_BYTES - 1]
        numbers[0] = may_pass(error)
        numbers[1 : 1 + len(text)] = torch.tensor(list(text))
    return numbers


def _from_numbers(numbers: Tensor) -> tuple[str, bool]:
    passes, *text = numbers.tolist()
    return bytes(text).rstrip(b"\0").decode(errors="ignore"), bool(passes)


class _Processes(ProcessGroup):
    """The part that data and latent parallelism share. torch.distributed must be initialised."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._device = device  # device of exchanged tensors: nccl accepts no CPU tensors

    def collect(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor.to(self._device)).to(tensor.device)

    def together(self, work: Callable[[], T]) -> T:
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(work())
        except (OSError, SafetensorError, SaeHarvestError) as error:
            failure = error
        failed = torch.zeros(self.world, dtype=torch.int64)
        failed[self.rank] = failure is not None
        failed = self.collect(failed)
        if not failed.any():
            return result[0]
        first = int(failed.argmax())  # all processes raise the message of this rank
        text = _to_numbers(failure if self.rank == first else None)
        sentence, passes = _from_numbers(self.collect(text))
        if failure is not None:
            raise failure
        raise PeerFailed(sentence) from (passing(sentence) if passes else None)

    def _sum(self, tensor: Tensor) -> Tensor:
        with reaching_peers():
            dist.all_reduce(tensor)
        return tensor

    def check_shared(self, folder: Path) -> None:
        number = self.from_first(secrets.randbits(62))
        token = folder / f".shared-{number:016x}.tmp"
        if self.rank == 0:
            token.touch()
        self.anywhere(False)  # the file exists by now
        missing = not appears(token)
        try:
            if self.anywhere(missing):
                raise InputError(
                    f"{folder} is not the same folder on {'this' if missing else 'every'} machine "
                    "of the run; give an --out on storage that all of them share."
                )
        finally:
            if self.rank == 0:
                token.unlink(missing_ok=True)


def appears(file: Path) -> bool:
    """Whether a file exists. Waits up to SIGHT_SECONDS: network drives show new files late."""
    limit = time.monotonic() + SIGHT_SECONDS
    while not file.exists():
        if time.monotonic() > limit:
            return False
        time.sleep(SIGHT_SECONDS / 100)
        if file.parent.is_dir():
            any(file.parent.iterdir())  # makes the system read the folder again
    return True


class DataParallel(_Processes):
    """Each process has all latents and an equal part of the rows of every batch."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.row_parts = self.world

    def sum_rows(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor)

    def reduce_gradients(self, into: Gradients) -> None:
        for gradient in (into.enc, into.dec, into.bias):
            self._sum(gradient)
        # in blocks: there is no room for all squares
        blocks = (tensor.split(BLOCK) for tensor in (into.enc, into.dec, into.squares))
        for enc, dec, squares in zip(*blocks, strict=True):
            torch.add(enc.square().sum(1), dec.square().sum(1), out=squares)


class ShardedLatents(_Processes):
    """Each process has every row and a nearly equal part of the latents."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.latent_part, self.latent_parts = self.rank, self.world
        # a pair's place in the order of latents: its part, then its number there
        self._part_shift = 32 - self.world.bit_length()

    def latents(self, n_latents: int) -> tuple[int, int]:
        return part_of(n_latents, self.rank, self.world)

    def sum_latents(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor)

    def keep_top(self, indices: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Keep the k largest values of each row over all processes; ties: the lower latent."""
        rows = max(self.world, BLOCK_KEYS // k)  # rows at a time, to bound the memory of keys
        out = [
            self._cut_off(self._keys(*pairs), k)
            for pairs in zip(indices.split(rows), values.split(rows), strict=True)
        ]
        beyond = torch.cat(out) if len(out) > 1 else out[0]  # [batch, w]
        return indices.masked_fill(beyond, -1), values.masked_fill(beyond, 0)

    def _cut_off(self, own: Tensor, k: int) -> Tensor:
        """Return the mask of pairs outside the k largest of all processes, bool [rows, w].

        Each process finds the k-th largest key for its share of the rows: the others send it their
        keys of these rows, and it sends them the limits. So a process receives about one number per
        row and kept latent, for any number of processes.

        Args:
            own: keys, int64 [rows, w].
        """
        batch, width = own.shape
        share = -(-batch // self.world)  # rows that a process decides on
        keys = own.new_full((self.world * share, k), NOTHING)
        keys[:batch, :width] = own
        arrived = torch.empty_like(keys)
        with reaching_peers():
            dist.all_to_all_single(arrived, keys)
        # [world, share, k], by sender, to [share, world * k]
        rows = arrived.view(self.world, share, k).transpose(0, 1).reshape(share, -1)
        cut = rows.topk(k, dim=1).values[:, -1].contiguous()  # [share]
        cuts = cut.new_empty(self.world * share)
        with reaching_peers():
            dist.all_gather(list(cuts.split(share)), cut)
        return own < cuts[:batch].unsqueeze(1)

    def gather_pairs(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        width = torch.tensor(indices.shape[1], device=indices.device)
        with reaching_peers():
            dist.all_reduce(width, dist.ReduceOp.MAX)
        missing = int(width) - indices.shape[1]
        pairs = torch.stack((indices, values.view(torch.int32)))  # [2, batch, w]
        pairs = torch.nn.functional.pad(pairs, (0, missing))  # value 0: no pair
        every = [torch.empty_like(pairs) for _ in range(self.world)]
        with reaching_peers():
            dist.all_gather(every, pairs)
        whole = torch.cat(every, dim=2)  # [2, batch, all w]
        return whole[0], whole[1].view(torch.float32)

    def _keys(self, indices: Tensor, values: Tensor) -> Tensor:
        """Return keys, int64 of the shape of `indices`, that sort like the pairs.

        The upper half is the value. The lower half falls with the number of the latent.
        """
        bits = (values + 0.0).view(torch.int32).long()  # turns -0.0 into 0.0
        # the bits of negative floats sort in reverse
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        ordered.masked_fill_(values.isnan(), 0x7FFFFFFF)  # NaN is kept, so that the loss shows it
        place = (self.rank << self._part_shift) + indices.long()
        keys = (ordered << 32) + (LOW_BITS - place)
        return keys.masked_fill_(indices < 0, NOTHING)


def part_of(n_latents: int, part: int, parts: int) -> tuple[int, int]:
    """Return the latents [first, last) of a part."""
    return n_latents * part // parts, n_latents * (part + 1) // parts


def group_of(
    parallel: Parallel, n_latents: int, batch_rows: int, device: torch.device
) -> ProcessGroup:
    """Return the group of this process, once torch.distributed is initialised.

    Raises:
        InputError: the rows or latents cannot be divided among the processes.
    """
    world = dist.get_world_size()
    if parallel == "data":
        if batch_rows % world:
            raise InputError(
                f"A batch of {batch_rows:,} rows cannot be divided by {world} workers; use a "
                "multiple of them as --batch-rows."
            )
        return DataParallel(device)
    if n_latents < world:
        raise InputError(
            f"{n_latents} latents cannot be divided among {world} workers; use fewer --workers."
        )
    return ShardedLatents(device)
