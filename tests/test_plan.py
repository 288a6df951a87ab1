"""`train-sae plan`: counts worked by hand, a real learner's tensors, seconds from rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sae_harvest.common.private_apis import multiplies_int8
from sae_harvest.train.commands.plan import GPUS
from sae_harvest.train.commands.plan import plan as plan_command
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.planning import count as costs
from sae_harvest.train.planning.count import (
    available_bytes,
    memory,
    memory_bytes,
    shape_of,
    step_flops,
    step_work,
)
from sae_harvest.train.planning.estimate import (
    PUBLISHED,
    Rates,
    plan,
    published_rates,
    step_seconds,
)
from sae_harvest.train.planning.measure import measure_rates
from sae_harvest.train.sae.kernels.cpu import CpuKernels
from sae_harvest.train.step.learner import Learner

D_IN, D_OUT = 48, 32
RATES = Rates(
    name="test", product=1e9, selection=1e9, moved=dict.fromkeys(
        ("exact values", "decode", "gradients", "Adam", "batch"), 1e9
    ), link=1e6, step=0.5, low_bytes=2, memory=10**9, estimate=False,
)  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"n_latents": 512, "k": 8, "tokens": 10**6, "batch_rows": 256} | changes))


def held_bytes(owner: object) -> int:
    """Bytes of all tensors that ours objects hold, each memory once; kernels' scratch apart."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif isinstance(value, CpuKernels):
            return
        elif type(value).__module__.startswith("sae_harvest.train."):
            visit(vars(value))

    visit(owner)
    return sum(storages.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k": None, "activation": "gated"},
        {"k": None, "activation": "relu_l1"},
        {"activation": "relu_kl"},
        {"activation": "batchtopk"},
        {"activation": "jumprelu"},
        {"multi_topk": 0.125},
        {"matryoshka": (64, 256, 512)},
        {"target_site": "mlp_out.0"},
    ],
)
def test_memory_is_that_of_a_real_learner(changes: dict[str, Any]) -> None:
    run = config(**changes)
    x = torch.randn(2048, D_IN, generator=torch.Generator().manual_seed(0))
    target = x[:, :D_OUT].clone() if run.target_site else None
    about = {"name": "", "weights": ""}
    learner = Learner.begin(run, "resid_post.0", x, target, torch.device("cpu"), about)
    rows = run.batch_rows
    for _ in range(2):
        learner.advance(x[:rows], None if target is None else target[:rows])
    d_out = D_OUT if run.target_site else None
    counted = memory(shape_of(run, D_IN, d_out))
    kept = sum(size for name, size in counted.items() if name not in ("batch", "passing"))
    # low-precision weights may be smaller than those counted, with scales of their own
    low = counted["low precision"]
    if not multiplies_int8():  # there they are the weights themselves
        kept -= low
    assert held_bytes(learner) == pytest.approx(kept, abs=0.6 * low)
    assert memory_bytes(run, D_IN, d_out) == sum(counted.values()) > kept


def test_flops_worked_by_hand() -> None:
    # 2 operations * 256 rows * (512 latents, or 16 candidates, or 8 pairs) * 48 dimensions
    work = step_work(shape_of(config(), D_IN))
    assert work["encoder product"].flops == 2 * 256 * 512 * 48
    assert work["exact values"].flops == 2 * 256 * 16 * 48
    assert work["decode"].flops == 2 * 256 * 8 * 48
    assert work["gradients"].flops == 3 * 2 * 256 * 8 * 48
    parameters = 512 * (48 + 48 + 1) + 48
    assert work["Adam"].flops == 14 * parameters
    assert work["Adam"].bytes == 9 * 4 * parameters + (4 + 2) * 512 * 48
    assert "AuxK" not in work
    assert step_flops(config(), D_IN) == sum(part.flops for part in work.values())


def test_auxk_adds_a_product_with_the_dead_latents() -> None:
    work = step_work(shape_of(config(k_aux=16), D_IN), dead_share=0.25)
    product = 2 * 256 * 128 * 48
    chosen, kept = 24, 16
    assert work["AuxK"].flops == product + 2 * 256 * 48 * (chosen + 4 * kept)


def test_sharing_latents_shares_weights_and_sharing_rows_does_not() -> None:
    run = config(n_latents=4096)
    whole, rows, latents = (
        memory(shape_of(run, D_IN, devices=n, parallel=how))
        for n, how in ((1, "data"), (4, "data"), (4, "latents"))
    )
    assert rows["weights"] == whole["weights"]
    assert rows["workspace"] == whole["workspace"] // 4
    assert latents["moments"] == pytest.approx(whole["moments"] / 4, rel=1e-3)
    assert latents["workspace"] == whole["workspace"]
    for how in ("data", "latents"):
        shared = plan(run, RATES, D_IN, devices=4, parallel=how).flops["encoder product"]
        assert shared == plan(run, RATES, D_IN).flops["encoder product"] / 4


def test_seconds_are_work_over_rate() -> None:
    run = config()
    found = plan(run, RATES, D_IN)
    work = step_work(shape_of(run, D_IN))
    assert found.seconds["encoder product"] == pytest.approx(
        work["encoder product"].flops / 1e9 + 256 * 512 / 1e9
    )
    assert found.seconds["Adam"] == pytest.approx(work["Adam"].bytes / 1e9)
    assert found.seconds["fixed"] == 0.5
    assert found.run_seconds == pytest.approx(run.steps * sum(found.seconds.values()))
    faster = replace(RATES, product=2e9)
    saved = found.step_seconds - plan(run, faster, D_IN).step_seconds
    assert saved == pytest.approx(work["encoder product"].flops / 2e9)


def test_exchange_of_data_parallel_is_all_gradients_almost_twice() -> None:
    run = config()
    found = plan(run, RATES, D_IN, devices=4, parallel="data")
    parameters = 512 * (48 + 48 + 1) + 48
    assert found.exchanged == 2 * 3 / 4 * (4 * parameters + 8 * 512)  # and when latents fired
    assert found.seconds["exchange"] == found.exchanged / 1e6


def test_exchange_of_latents_is_keys_cuts_and_sums_almost_twice() -> None:
    def exchanged(dead_share: float = 0.0, **settings: Any) -> float:
        run = config(**settings)
        shared = {"devices": 4, "parallel": "latents", "dead_share": dead_share}
        return plan(run, RATES, D_IN, **shared).exchanged / (2 * 3 / 4 * 4)

    one = 256 * (8 + 1) + 256 * 48 + 48  # rows; the last is b_dec's gradient
    assert exchanged() == one
    assert exchanged(multi_topk=0.125) == one + 256 * (32 + 1) + 256 * 48
    assert exchanged(matryoshka=(128, 512)) == one + 256 * 48
    assert exchanged(activation="jumprelu") == 256 * 48 + 48
    k_aux = config().auxiliary_k(48)
    assert exchanged(dead_share=0.1) == one + 256 * (k_aux + 1) + 256 * 48


def test_read_bytes_are_rows_times_width() -> None:
    found = plan(config(), RATES, D_IN, stored_bytes=2)
    assert found.tokens == (10**6 // 256) * 256
    assert found.read == found.tokens * 48 * 2
    both = plan(config(target_site="mlp_out.0"), RATES, D_IN, D_OUT, stored_bytes=2)
    assert both.read == both.tokens * (48 + 32) * 2


@pytest.mark.parametrize("name", GPUS)
def test_published_rates_are_below_the_published_peaks(name: str) -> None:
    rates = published_rates(name)
    peak, bandwidth, size, link = PUBLISHED[name]
    assert rates.estimate
    assert rates.product < peak
    assert max(rates.moved.values()) < bandwidth
    assert rates.link < link
    assert rates.memory == size


@pytest.mark.slow
def test_rates_of_this_machine_predict_a_step() -> None:
    """Loosely; `bench/plan.py` is the measurement."""
    device = torch.device("cpu")
    rates = measure_rates(device)
    assert not rates.estimate
    run = config(n_latents=4096, k=16, batch_rows=1024)
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    about = {"name": "", "weights": ""}
    learner = Learner.begin(run, "resid_post.0", x, None, device, about)
    ratios = []
    for _ in range(3):  # neighbours may take the processor while one of the two is measured
        taken = []
        for _ in range(5):
            start = perf_counter()
            learner.advance(x)
            taken.append(perf_counter() - start)
        ratios.append(sum(step_seconds(shape_of(run, 256), rates).values()) / min(taken))
        if 0.1 < ratios[-1] < 10:
            return
        rates = measure_rates(device)
    pytest.fail(f"predicted over measured: {ratios}")


def test_available_bytes_are_fewer_than_the_machine_has() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert 0 < available_bytes("cpu") < total


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 100"}, 400),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": "inactive_file 100"}, 0),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": ""}, costs.UNLIMITED),
        ({}, costs.UNLIMITED),
    ],
)
def test_limits_of_a_container_count(tmp_path: Path, files: dict[str, str], left: int) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert costs._group_bytes(tmp_path) == left


def test_older_control_groups_count(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000\n")
    (folder / "memory.usage_in_bytes").write_text("600\n")
    (folder / "memory.stat").write_text("cache 5\ntotal_inactive_file 50\n")
    assert costs._group_bytes(tmp_path) == 450


def run_command(*arguments: str) -> Any:
    return CliRunner().invoke(plan_command, list(arguments))


def test_command_prints_memory_step_and_run() -> None:
    result = run_command("--d-in", "768", "--n-latents", "131072", "--gpu", "h200")
    assert result.exit_code == 0, result.output
    for text in ("moments", "encoder product", "estimated from its data sheet", "rows per second"):
        assert text in result.output


def test_command_says_when_it_does_not_fit() -> None:
    result = run_command(
        "--d-in", "12288", "--n-latents", "16777216", "--k", "256", "--gpu", "h100"
    )  # fmt: skip
    assert "does not fit" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--store"),
        (
            ("--d-in", "8", "--n-latents", "4", "--k", "8"),
            "--k must be at most --n-latents, got 8 > 4.",
        ),
        (("--d-in", "8", "--tokens", "8"), "--tokens must be at least --batch-rows, got 8 < 4096."),
        (("--d-in", "8", "--gpu", "h100", "--device", "cpu"), "give one of them"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(arguments: tuple[str, ...], message: str) -> None:
    result = run_command(*arguments)
    assert result.exit_code == 2
    assert message in result.output
