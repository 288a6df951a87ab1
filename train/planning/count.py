"""Counts of memory, floating-point operations and bytes moved of a training run.

The counts follow from the configuration and the widths of the activations; nothing is measured.
`train.planning.estimate` turns the counts into seconds with the rates of a machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sae_harvest.train.config import TrainConfig
from sae_harvest.train.sae.kernels.low import candidates

FLOAT, INDEX, COUNTER = 4, 4, 8  # bytes of a weight, of a latent's number, of `last_fired`
LOW = 2  # bytes of a low-precision weight, bfloat16; int8 takes half
PAIR = 2 * INDEX + 5 * FLOAT  # number and place, value, slope, gain, penalty, pre-activation
SCRATCH = 24 << 20  # pre-activations that the processor's kernels keep in cache
ACTIVE = 64  # assumed active latents per row if no k is given
START = 3  # factor of active latents at the start, if thresholds are trained
WIDEST = 4  # active latents of a batch's fullest row over the mean, if rows differ
UNLIMITED = 1 << 62
ADAM_FLOPS = 14  # per parameter, the running average of weights included
ADAM_MOVES = 9  # floats: weight, both moments and average there and back, the gradient there
BATCH_PASSES = 8  # over a batch: centring, error, its scale, sums of squares, b_dec's gradient
# latent vectors besides b_enc: those of the SAE, trained ones, others (bounds of low precision)
VECTORS = {
    "topk": (0, 0, 0),
    "batchtopk": (1, 0, 1),
    "jumprelu": (1, 1, 2),
    "relu_l1": (0, 0, 1),
    "relu_kl": (0, 0, 1),
    "gated": (2, 2, 1),
}


@dataclass(frozen=True)
class Shape:
    """The sizes that decide the costs of a step on one device."""

    n_latents: int
    """Latents that the device holds."""
    rows: int
    """Rows that the device sees per step."""
    active: int
    """Mean number of the device's latents that are active per row."""
    width: int
    """Most pairs per row in memory, padding included."""
    chosen: int
    """Candidates per row before exact values decide."""
    d_in: int
    """Width of the activations read."""
    d_out: int
    """Width of the activations predicted."""
    k_aux: int
    """Latents of AuxK per row."""
    errors: int = 1
    """Reconstructions per step; more with Multi-TopK or Matryoshka."""
    vectors: tuple[int, int, int] = (0, 0, 0)
    """Latent vectors besides b_enc, as in VECTORS."""
    transcoder: bool = False
    """Whether it predicts another site than it reads."""

    @property
    def trained(self) -> int:
        """Trained numbers on the device."""
        return self.n_latents * (self.d_in + self.d_out + 1 + self.vectors[1]) + self.d_out

    @property
    def saved(self) -> int:
        """Numbers of the SAE's tensors on the device."""
        fixed = self.n_latents * (self.vectors[0] - self.vectors[1])
        return self.trained + fixed + (self.d_in if self.transcoder else 0)


def shape_of(
    config: TrainConfig,
    d_in: int,
    d_out: int | None = None,
    devices: int = 1,
    parallel: Literal["data", "latents"] = "data",
) -> Shape:
    """Return the shape of one device's share of a run.

    Args:
        config: the run.
        d_in, d_out: widths; d_out is None for an SAE that reconstructs its input.
        devices: number of devices that share the step.
        parallel: data (each has all latents and a part of the rows) or latents (the reverse).
    """
    n, width_out = config.n_latents, d_in if d_out is None else d_out
    share = -(-n // devices) if parallel == "latents" else n
    rows = -(-config.batch_rows // devices) if parallel == "data" else config.batch_rows
    active = min(n, config.k or ACTIVE)
    if config.activation == "topk":
        width = config.wide_k if config.multi_topk > 0 else active
        chosen = candidates(min(share, width), share)
    else:  # sparse from the start, but not yet as sparse as asked for
        chosen = width = max(1, WIDEST * START * active * share // n)
    return Shape(
        n_latents=share,
        rows=rows,
        active=max(1, active * share // n),
        width=min(width, share),
        chosen=min(chosen, share),
        d_in=d_in,
        d_out=width_out,
        k_aux=config.auxiliary_k(width_out) if config.auxk_alpha > 0 else 0,
        errors=3 if config.multi_topk > 0 else 1 + len(config.matryoshka),
        vectors=VECTORS[config.activation],
        transcoder=d_out is not None,
    )


def memory(shape: Shape, low_bytes: float = LOW) -> dict[str, int]:
    """Return the bytes of one learner on one device, by use.

    `batch` holds the rows of a step, `workspace` the buffers that are kept between steps, `passing`
    the most memory that a step takes and frees again. The share of AuxK is counted as if latents
    were dead.
    """
    n, rows, d_in, d_out = shape.n_latents, shape.rows, shape.d_in, shape.d_out
    target = rows * d_out if shape.transcoder else 0
    passing = rows * (shape.chosen * INDEX + shape.width * PAIR)
    if shape.k_aux:
        passing += rows * (candidates(shape.k_aux, n) * INDEX + shape.k_aux * PAIR)
    gradients = n * (d_in + d_out + 2 + shape.vectors[1]) + d_out  # and squared norms
    return {
        "weights": FLOAT * (shape.saved + n * shape.vectors[2]),
        "moments": 2 * FLOAT * shape.trained,
        "average": FLOAT * shape.trained,
        "gradients": FLOAT * gradients,
        "low precision": int(low_bytes * n * d_in),
        "counters": COUNTER * n,
        "workspace": FLOAT * rows * (d_in + shape.errors * d_out),
        "batch": FLOAT * (rows * d_in + target),
        "passing": passing + FLOAT * target + int(low_bytes * rows * d_in) + SCRATCH,
    }


def memory_bytes(config: TrainConfig, d_in: int, d_out: int | None = None) -> int:
    """Return all bytes of one learner on one device, the batch it reads included."""
    return sum(memory(shape_of(config, d_in, d_out)).values())


@dataclass(frozen=True)
class Work:
    """The work of one step, or of a part of it, on one device."""

    flops: float
    """Floating-point operations."""
    bytes: float
    """Bytes moved to or from memory."""


def step_work(shape: Shape, dead_share: float = 0.0, low_bytes: float = LOW) -> dict[str, Work]:
    """Return the operations and bytes moved by each part of a step, on one device.

    A multiplication and an addition are two operations; comparisons count as none. Scores of the
    encoder's product stay in cache. Bytes of sparse parts are the gathered rows: `d_in` or `d_out`
    numbers per pair and operand.

    Args:
        shape: the step.
        dead_share: share of the latents that AuxK works on.
        low_bytes: bytes of a low-precision weight.
    """
    n, rows, d_in, d_out = shape.n_latents, shape.rows, shape.d_in, shape.d_out
    pairs, decoded = rows * shape.active, rows * shape.active * shape.errors
    parts = {
        "encoder product": Work(2.0 * rows * n * d_in, low_bytes * d_in * (n + rows)),
        "exact values": Work(
            2.0 * rows * shape.chosen * d_in, FLOAT * rows * (shape.chosen + 1) * d_in
        ),
        "decode": Work(2.0 * decoded * d_out, FLOAT * (decoded + rows) * d_out),
        "gradients": Work(2.0 * pairs * (d_in + 2 * d_out), FLOAT * (pairs + n) * (d_in + d_out)),
    }
    dead = round(dead_share * n) if shape.k_aux else 0
    if dead:
        k = min(shape.k_aux, dead)
        chosen = candidates(k, dead)
        parts["AuxK"] = Work(
            2.0 * rows * (dead * d_in + chosen * d_in + k * (d_in + 3 * d_out)),
            FLOAT * rows * (chosen * d_in + k * (d_in + 2 * d_out)),
        )
    parts["Adam"] = Work(
        ADAM_FLOPS * shape.trained,
        ADAM_MOVES * FLOAT * shape.trained + (FLOAT + low_bytes) * n * d_in,
    )
    parts["batch"] = Work(BATCH_PASSES * rows * d_out, BATCH_PASSES * FLOAT * rows * d_out)
    return parts


def step_flops(config: TrainConfig, d_in: int, d_out: int | None = None) -> float:
    """Return the floating-point operations of one step without dead latents."""
    return sum(part.flops for part in step_work(shape_of(config, d_in, d_out)).values())


def available_bytes(device: torch.device | str) -> int:
    """Return the bytes that a process can still allocate on a GPU or on this machine.

    On a CPU it is the smaller limit of the kernel and the control group.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_machine_bytes(), _group_bytes())


def _machine_bytes() -> int:
    """Return the bytes of free memory, including caches that can be freed."""
    table = Path("/proc/meminfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all there is, elsewhere


def _group_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left under the container's memory limit; UNLIMITED without a limit.

    Reads control groups of versions 2 and 1. File pages that can be dropped count as free.
    """
    for folder, limit_file, used_file, dropped in (
        (root, "memory.max", "memory.current", "inactive_file "),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    ):
        if not (folder / limit_file).exists():
            continue
        limit = (folder / limit_file).read_text().strip()
        if limit == "max":
            continue
        used = int((folder / used_file).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(dropped):
                used -= int(line.split()[1])
        return max(0, int(limit) - used)
    return UNLIMITED
