"""`train-sae scaling`: from run folders to a table, fits and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.evaluate.cli import main
from sae_harvest.train.commands.scaling import scaling
from sae_harvest.train.config import SAEConfig, TrainConfig
from sae_harvest.train.planning.count import step_flops
from sae_harvest.train.scaling.envelope import envelope
from sae_harvest.train.scaling.fits import analyse, fits, table
from sae_harvest.train.scaling.points import RunPoint, read_sweep
from sae_harvest.train.sweeps.sweep import sweep as train_all
from tests.synthetic import make_plan, make_store

D_IN, ROWS, STEPS = 64, 256, 200
SIZES = [64, 128, 256, 512, 1024, 2048]


def law(n: int, k: int) -> float:
    return 0.1 * (32 / k) ** 0.2 + 4.0 * n**-0.5 * (32 / k) ** 0.1


def write_run(folder: Path, n: int, k: int, seed: int, loss: float, **changes: Any) -> Path:
    """A finished run as `train-sae sweep` leaves it."""
    place = folder / f"n{n}-k{k}-s{seed}"
    place.mkdir(parents=True)
    config = TrainConfig(
        n_latents=n, k=k, seed=seed, tokens=ROWS * STEPS, batch_rows=ROWS, order_seed=0
    )
    run = {"format": 2, "site": "resid_post.1", "store_digest": "abc", "model": {"name": "m"}}
    run |= {"config": config.model_dump(mode="json")} | changes
    sae = SAEConfig(d_in=D_IN, n_latents=n, k=k, site="resid_post.1")
    (place / "run.json").write_text(json.dumps(run))
    (place / "config.json").write_text(sae.model_dump_json())
    held_out = {"rows": 1000, "fvu": loss, "l0": float(k), "dead_share": 0.0}
    evaluation = {"without_outliers": held_out, "with_outliers": held_out, "sae_digest": "d"}
    (place / "evaluation.json").write_text(json.dumps(evaluation))
    with (place / "metrics.jsonl").open("w") as lines:
        for step in range(1, STEPS + 1):
            # slower for larger sizes, so that curves cross
            fvu = loss + 0.9 * float(np.exp(-step / (2.0 * n**0.4)))
            lines.write(json.dumps({"step": step, "tokens": step * ROWS, "fvu": fvu}) + "\n")
    return place


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for n in SIZES:
        for k in (8, 16, 32):
            for seed in (0, 1):
                write_run(folder, n, k, seed, law(n, k) * (1.001 if seed else 1 / 1.001))
    return folder


@pytest.mark.slow
def test_command_writes_table_fits_and_pictures(sweep: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    out = tmp_path / "laws"
    result = CliRunner().invoke(scaling, [str(sweep), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "L(n,k)" in result.output
    rows = pq.read_table(out / "scaling.parquet").to_pylist()
    runs = [row for row in rows if row["kind"] == "run"]
    assert len(runs) == len(SIZES) * 3 * 2
    assert all(row["predicted_n"] == pytest.approx(row["fvu"], rel=0.003) for row in runs)
    content = json.loads((out / "fits.json").read_text())
    exponents = [law["parameters"]["b"] for law in content["laws"] if law["law"] == "L(n)"]
    assert len(exponents) == 3
    assert all(b["low"] <= 0.5 <= b["high"] or b["value"] == pytest.approx(0.5, rel=1e-5)
               for b in exponents)  # fmt: skip
    pictures = sorted(out.glob("*.png"))
    assert [path.name for path in pictures] == [
        "loss_compute.png", "loss_joint.png", "loss_latents.png",
    ]  # fmt: skip
    for path in pictures:
        with image.open(path) as opened:
            opened.load()  # decodes all of it
            assert opened.size > (600, 400)
            assert len(set(opened.convert("L").tobytes())) > 20  # not one colour


def test_seeds_of_a_size_are_one_point(sweep: Path) -> None:
    found = analyse(read_sweep(sweep), draws=20)
    assert len(found.sizes) == len(SIZES) * 3
    assert found.sizes[0].fvu == pytest.approx(law(SIZES[0], 8), rel=1e-9)
    assert found.by_k[32].points == len(SIZES)
    assert found.by_k[32].r2 == pytest.approx(1.0, abs=1e-9)
    assert found.joint is not None
    assert found.joint.r2 > 0.999


def test_best_learning_rate_counts(tmp_path: Path) -> None:
    for n in SIZES:
        write_run(tmp_path / "sweep", n, 32, 0, law(n, 32))
        worse = write_run(tmp_path / "worse", n, 32, 0, 2 * law(n, 32))
        run = json.loads((worse / "run.json").read_text())
        run["config"]["lr"] = 0.5
        (worse / "run.json").write_text(json.dumps(run))
        worse.rename(tmp_path / "sweep" / f"n{n}-high-lr")
    found = analyse(read_sweep(tmp_path / "sweep"), draws=20)
    assert len(found.points) == len(SIZES)
    assert found.by_k[32].r2 == pytest.approx(1.0, abs=1e-9)


def test_three_sizes_are_too_few(tmp_path: Path) -> None:
    for n in SIZES[:3]:
        write_run(tmp_path, n, 32, 0, law(n, 32))
    with pytest.raises(InputError, match="at least 4 values of n_latents at one k; there are 3"):
        analyse(read_sweep(tmp_path))


def test_one_k_leaves_the_joint_law_out(tmp_path: Path) -> None:
    for n in SIZES:
        write_run(tmp_path, n, 32, 0, law(n, 32))
    found = analyse(read_sweep(tmp_path), draws=20)
    assert found.joint is None
    assert "needs 3 values of k" in fits(found)["left_out"]["L(n,k)"]


def test_loss_that_rises_with_size_is_called_doubtful(tmp_path: Path) -> None:
    for n, loss in zip(SIZES, (0.5, 0.4, 0.3, 0.25, 0.26, 0.3), strict=True):
        write_run(tmp_path, n, 32, 0, loss)
    (doubt,) = analyse(read_sweep(tmp_path), draws=20).doubts
    assert "least at 512 latents, not at 2048" in doubt


def test_unfinished_runs_are_named(sweep: Path) -> None:
    (sweep / "n64-k8-s0" / "evaluation.json").unlink()
    with pytest.raises(InputError, match=r"1 of the 36 runs .* unfinished .n64-k8-s0.*again"):
        read_sweep(sweep)


def test_failed_runs_are_named(sweep: Path) -> None:
    (sweep / "n64-k8-s0" / "failed.json").write_text("{}")
    with pytest.raises(InputError, match=r"1 of the 36 runs .* failed .n64-k8-s0; see"):
        read_sweep(sweep)


@pytest.mark.parametrize("change", [{"store_digest": "other"}, {"site": "mlp_out.1"}])
def test_runs_on_other_data_are_refused(sweep: Path, change: dict[str, str]) -> None:
    write_run(sweep, 4096, 32, 0, 0.1, **change)
    with pytest.raises(InputError, match=r"differ in (store|site)"):
        read_sweep(sweep)


def test_runs_with_other_settings_are_refused(sweep: Path) -> None:
    config = TrainConfig(n_latents=4096, k=32, tokens=ROWS, batch_rows=ROWS)
    write_run(sweep, 4096, 32, 0, 0.1, config=config.model_dump(mode="json"))
    with pytest.raises(InputError, match="differ in tokens"):
        read_sweep(sweep)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no runs"):
        read_sweep(tmp_path)


def test_damaged_metrics_are_named(sweep: Path) -> None:
    (sweep / "n64-k8-s0" / "metrics.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"n64-k8-s0.metrics.jsonl"):
        read_sweep(sweep)


def test_compute_is_that_of_the_steps(sweep: Path) -> None:
    point = next(p for p in read_sweep(sweep) if (p.n_latents, p.k) == (1024, 8))
    config = TrainConfig(n_latents=1024, k=8, tokens=ROWS * STEPS, batch_rows=ROWS)
    assert point.flops == STEPS * step_flops(config, D_IN)
    # the encoder's product is the most of it
    assert point.flops == pytest.approx(STEPS * 2 * ROWS * 1024 * D_IN, rel=0.3)


def curve_point(n: int, flops_per_token: float, curve: Any) -> RunPoint:
    tokens = np.arange(1, 4097, dtype=float)
    return RunPoint(
        name=str(n), n_latents=n, k=8, seed=0, lr=0.1, tokens=4096, flops=4096 * flops_per_token,
        fvu=float(curve(4096.0)), l0=8.0, curve_tokens=tokens, curve_fvu=curve(tokens),
    )  # fmt: skip


def test_envelope_is_the_least_of_crossing_curves() -> None:
    # L = t^-s from level a: the steeper one, begun higher, is below from where they cross
    cheap = curve_point(1, 1.0, lambda t: 0.5 * t**-0.1)
    dear = curve_point(2, 1.0, lambda t: 1.0 * t**-0.3)
    found = envelope([cheap, dear])
    crossing = 2.0 ** (1 / 0.2)  # 0.5 t^-0.1 = t^-0.3
    assert set(found.best[found.flops < crossing / 1.1]) == {1}
    assert set(found.best[found.flops > crossing * 1.1]) == {2}
    late = found.flops > 64
    # a batch is measured before its own step, so that curves lie one token early
    assert found.fvu[late] == pytest.approx(found.flops[late] ** -0.3, rel=0.02)
    assert np.all(np.diff(found.fvu) < 0)


def test_envelope_stays_at_the_best_when_it_has_ended() -> None:
    small = curve_point(1, 1.0, lambda t: 0.3 + 0 * t - 1e-6 * t)
    large = curve_point(2, 8.0, lambda t: 0.9 - 1e-6 * t)
    found = envelope([small, large])
    assert set(found.best) == {1}
    assert found.flops.max() <= 4096


def test_smallest_and_largest_are_no_inner_points() -> None:
    points = [
        curve_point(n, float(n), lambda t, n=n: n**-0.5 + np.exp(-t / (20 * n)))
        for n in (1, 2, 4, 8)
    ]
    found = envelope(points)
    assert set(found.best[found.inner]) <= {2, 4}
    assert not np.any(found.inner[(found.best == 1) | (found.best == 8)])


def test_table_has_a_row_per_run_and_point_of_an_envelope(sweep: Path) -> None:
    found = analyse(read_sweep(sweep), draws=20)
    rows = table(found).to_pylist()
    kinds = [row["kind"] for row in rows]
    assert kinds.count("run") == len(found.points)
    assert kinds.count("envelope") == sum(len(e.flops) for e in found.envelopes.values())
    assert all(row["predicted_nk"] for row in rows if row["kind"] == "run")


@pytest.mark.slow
def test_a_real_sweep_is_read(tmp_path: Path) -> None:
    make_store(tmp_path / "store", make_plan(width=8))
    shared = {"k": 2, "tokens": 20 * 64, "batch_rows": 64, "lr": 1e-3}
    members = {f"n{n}": TrainConfig(n_latents=n, **shared) for n in (4, 8, 16, 32)}
    train_all(members, tmp_path / "store", tmp_path / "sweep", device="cpu")
    arguments = ["scaling", str(tmp_path / "sweep"), "--out", str(tmp_path / "laws"), "--no-plots"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = pq.read_table(tmp_path / "laws" / "scaling.parquet").to_pylist()
    runs = {row["run"]: row for row in rows if row["kind"] == "run"}
    for name in members:
        evaluation = json.loads((tmp_path / "sweep" / name / "evaluation.json").read_text())
        assert runs[name]["fvu"] == evaluation["without_outliers"]["fvu"]
        assert runs[name]["tokens"] == 20 * 64
