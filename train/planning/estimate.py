"""Estimate of a training run before it starts: memory, operations, bytes and seconds.

The parts of a step run one after the other. Each is bound by one rate:

    encoder product    operations / product rate + scores / selection rate
    other parts        bytes moved / the rate of that part
    several devices    bytes exchanged / link rate

Reading the store overlaps with that and is reported as the rate that it needs. Rates are measured
on this machine, or estimated from published peaks times an efficiency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_harvest.store.loading.loader import WINDOW_ROWS
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.planning.count import COUNTER, FLOAT, LOW, Shape, memory, shape_of, step_work

MOVING = ("exact values", "decode", "gradients", "Adam", "batch")  # parts bound by memory
WINDOWS = 2  # windows of the loader: one is used while the next is read
Parallel = Literal["data", "latents"]


@dataclass(frozen=True)
class Rates:
    """The speed and the memory of a device."""

    name: str
    """Name of the device."""
    product: float
    """Operations per second of the encoder's low-precision product."""
    selection: float
    """Scores searched per second; infinite if the search is part of the product."""
    moved: dict[str, float]
    """Bytes moved per second by each other part."""
    link: float
    """Bytes per second that a device sends to others."""
    step: float
    """Fixed seconds of a step of any size."""
    low_bytes: float
    """Bytes of a low-precision weight."""
    memory: int
    """Bytes that a run may use."""
    estimate: bool
    """True if the rates are published, not measured."""


# dense bfloat16 FLOP/s, memory bytes/s, memory bytes, NVLink bytes/s a direction; NVIDIA's data
# sheets of the SXM modules
PUBLISHED = {
    "a100": (312e12, 2.04e12, 80e9, 300e9),
    "h100": (989e12, 3.35e12, 80e9, 450e9),
    "h200": (989e12, 4.8e12, 141e9, 450e9),
    "b200": (2250e12, 8.0e12, 180e9, 900e9),
}
PRODUCT_EFFICIENCY = 0.5  # of the peak, for a product that also keeps the largest scores
MEMORY_EFFICIENCY = 0.6  # of the bandwidth
LAUNCHES = 1.5e-3  # seconds per step for kernels too small to hide their launch


def published_rates(name: str) -> Rates:
    """Return the estimated rates of a GPU by name: published peaks times an efficiency."""
    product, bandwidth, size, link = PUBLISHED[name]
    return Rates(
        name=name,
        product=PRODUCT_EFFICIENCY * product,
        selection=float("inf"),
        moved=dict.fromkeys(MOVING, MEMORY_EFFICIENCY * bandwidth),
        link=MEMORY_EFFICIENCY * link,
        step=LAUNCHES,
        low_bytes=LOW,
        memory=int(size),
        estimate=True,
    )


@dataclass(frozen=True)
class Estimate:
    """The costs of one device, and of the whole run."""

    shape: Shape
    """Sizes of a step on one device."""
    rates: Rates
    """Rates of each device."""
    devices: int
    """Number of devices."""
    parallel: Parallel
    """What the devices divide."""
    memory: dict[str, int]
    """Bytes of one device by use."""
    flops: dict[str, float]
    """Floating-point operations of one step by part."""
    moved: dict[str, float]
    """Bytes moved in one step by part."""
    seconds: dict[str, float]
    """Seconds of one step by part."""
    exchanged: float
    """Bytes that a device sends per step."""
    steps: int
    """Steps of the run."""
    tokens: int
    """Rows of the run, over all devices."""
    read: float
    """Bytes read from the store, over all devices."""

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def run_seconds(self) -> float:
        return self.steps * self.step_seconds

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device has enough memory."""
        return self.memory_total <= self.rates.memory


def plan(
    config: TrainConfig,
    rates: Rates,
    d_in: int,
    d_out: int | None = None,
    *,
    devices: int = 1,
    parallel: Parallel = "data",
    dead_share: float = 0.0,
    stored_bytes: int = 2,
) -> Estimate:
    """Return the estimate of a run.

    Args:
        config: the run.
        rates: rates of each device.
        d_in, d_out: widths of the activations; d_out is None without a transcoder.
        devices, parallel: number of devices, and what they divide: rows (data) or latents.
        dead_share: share of latents that AuxK works on in a typical step.
        stored_bytes: bytes of a stored number, 2 for float16.
    """
    shape = shape_of(config, d_in, d_out, devices, parallel)
    work = step_work(shape, dead_share, rates.low_bytes)
    width = d_in + (shape.d_out if shape.transcoder else 0)
    own = memory(shape, rates.low_bytes)
    window = WINDOW_ROWS // (devices if parallel == "data" else 1)  # rows that a device keeps
    own["loader"] = WINDOWS * window * width * stored_bytes
    exchanged = _exchanged(shape, config, devices, parallel, dead_share) if devices > 1 else 0.0
    seconds = step_seconds(shape, rates, dead_share)
    if devices > 1:
        seconds["exchange"] = exchanged / rates.link
    return Estimate(
        shape=shape,
        rates=rates,
        devices=devices,
        parallel=parallel,
        memory=own,
        flops={name: part.flops for name, part in work.items()},
        moved={name: part.bytes for name, part in work.items()},
        seconds=seconds,
        exchanged=exchanged,
        steps=config.steps,
        tokens=config.steps * config.batch_rows,
        read=float(config.steps * config.batch_rows * width * stored_bytes),
    )


def step_seconds(shape: Shape, rates: Rates, dead_share: float = 0.0) -> dict[str, float]:
    """Return the seconds of each part of one step on one device, without exchanges."""
    work = step_work(shape, dead_share, rates.low_bytes)
    scores = shape.rows * shape.n_latents
    found = {
        "encoder product": work["encoder product"].flops / rates.product + scores / rates.selection,
    }
    found |= {name: work[name].bytes / rates.moved[name] for name in MOVING}
    if "AuxK" in work:
        dead = round(dead_share * shape.n_latents)
        product = 2.0 * shape.rows * dead * shape.d_in
        found["AuxK"] = (
            product / rates.product
            + shape.rows * dead / rates.selection
            + work["AuxK"].bytes / rates.moved["gradients"]
        )
    return found | {"fixed": rates.step}


def _exchanged(
    shape: Shape, config: TrainConfig, devices: int, parallel: Parallel, dead_share: float
) -> float:
    """Return the bytes a device sends per step; a sum over devices sends each byte almost twice.

    As counted in docs/distributed.md. Activation functions with a threshold exchange
    counts, which are left out.
    """
    twice = 2.0 * (devices - 1) / devices
    rows, d_out = config.batch_rows, shape.d_out
    if parallel == "data":
        return twice * (FLOAT * shape.trained + COUNTER * shape.n_latents)
    chosen, summed = [], max(1, len(config.matryoshka))
    if config.activation == "topk":
        chosen.append(config.k or 0)
    if config.multi_topk > 0:
        chosen.append(config.wide_k)
        summed += 1
    if k_aux := min(shape.k_aux, round(dead_share * config.n_latents)):
        chosen.append(k_aux)
        summed += 1
    keys = FLOAT * rows * sum(k + 1 for k in chosen)  # and the limit of each row
    return twice * (keys + FLOAT * (rows * d_out * summed + shape.d_in))
