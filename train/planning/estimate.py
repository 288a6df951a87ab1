"""Estimate of a training run before it starts: memory, operations, bytes and seconds.

The parts of a step run one after the other, and each is bound by what it does most of:

    encoder product    operations / product rate + scores / selection rate
    other parts        bytes moved / the rate of that part
    several devices    bytes exchanged / link rate

Reading the store overlaps with that and is reported as the rate it needs. Rates come from this
machine (`rates`), or from a table of published peaks times an efficiency, an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_harvest.store.loading.loader import WINDOW_ROWS
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.planning.count import COUNTER, FLOAT, LOW, Shape, memory, shape_of, step_work

MOVING = ("exact values", "decode", "gradients", "Adam", "batch")  # parts bound by memory
WINDOWS = 2  # of the loader: one is used while the next is read
Parallel = Literal["data", "latents"]


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    name: of the device. product: operations of the encoder's low-precision product. selection:
    scores looked through, infinite where that is part of the product. moved: bytes moved by each
    other part. link: bytes a device sends to others. step: seconds that a step takes whatever its
    size. low_bytes: of a low-precision weight. memory: bytes that a run may take.
    estimate: published, not measured.
    """

    name: str
    product: float
    selection: float
    moved: dict[str, float]
    link: float
    step: float
    low_bytes: float
    memory: int
    estimate: bool


# dense bfloat16 FLOP/s, memory bytes/s, memory bytes, NVLink bytes/s a direction; NVIDIA's data
# sheets of the SXM modules
PUBLISHED = {
    "a100": (312e12, 2.04e12, 80e9, 300e9),
    "h100": (989e12, 3.35e12, 80e9, 450e9),
    "h200": (989e12, 4.8e12, 141e9, 450e9),
    "b200": (2250e12, 8.0e12, 180e9, 900e9),
}
PRODUCT_EFFICIENCY = 0.5  # of the peak; a product that also keeps the largest scores
MEMORY_EFFICIENCY = 0.6  # of the bandwidth
LAUNCHES = 1.5e-3  # seconds a step, of kernels too small to hide their launch


def published_rates(name: str) -> Rates:
    """Return the rates of a GPU by name: its published peaks times an efficiency. An estimate."""
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
    """What one device of a run takes, and how long the whole run.

    memory: bytes by use; flops, moved: of one step by part; seconds: of one step by part;
    exchanged: bytes a device sends a step; steps; tokens: rows of all devices; read: bytes from
    the store, of all devices.
    """

    shape: Shape
    rates: Rates
    devices: int
    parallel: Parallel
    memory: dict[str, int]
    flops: dict[str, float]
    moved: dict[str, float]
    seconds: dict[str, float]
    exchanged: float
    steps: int
    tokens: int
    read: float

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
        """Whether a device has the memory."""
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
    """Return the plan of a run.

    Args:
        config: the run.
        rates: of each device.
        d_in, d_out: widths of the activations; d_out None: not a transcoder.
        devices, parallel: how the step is shared: rows (data) or latents.
        dead_share: share of latents that AuxK works on in a typical step.
        stored_bytes: of a stored activation, 2 for float16.
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
    """Return the bytes a device sends a step; a sum over devices passes each byte almost twice.

    As counted in docs/distributed.md. Activation functions with a threshold choose by counts,
    which are left out.
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
    keys = FLOAT * rows * sum(k + 1 for k in chosen)  # and where a row is cut
    return twice * (keys + FLOAT * (rows * d_out * summed + shape.d_in))
