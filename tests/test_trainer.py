"""A run: learns, resumes to the same bits, refuses what it can't use, evaluates by one formula."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sae_harvest.common.errors import InputError, NotAStoreError, RunError
from sae_harvest.common.locks import LOCK_FILE, lock
from sae_harvest.pipelines.evaluate.cli import main
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.evaluate import Fvu, evaluate
from sae_harvest.train.run.trainer import train
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.step.initialization import geometric_median, prepare
from tests.synthetic import SITE, make_plan, make_store, rows_of

STEPS = 200
# few enough rows until death that AuxK takes part
CONFIG = TrainConfig(
    n_latents=96,
    k=4,
    tokens=STEPS * 128,
    batch_rows=128,
    dead_after_tokens=256,
    checkpoint_every=7,
    lr=1e-3,
)
OPTIONS = [
    *("--n-latents", "96", "--k", "4", "--tokens", str(STEPS * 128), "--batch-rows", "128"),
    *("--dead-after-tokens", "256", "--checkpoint-every", "7", "--lr", "0.001"),
    *("--device", "cpu"),
]


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trainer") / "store"
    make_store(path, make_plan(width=8))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store_path: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "sae"
    train(CONFIG, store_path, out, device="cpu")
    return out


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_result(out: Path, expected: Path) -> None:
    for name in (
        "sae.safetensors",
        "config.json",
        "evaluation.json",
        "checkpoints/000200/sae.safetensors",
        "checkpoints/000200/optimizer.safetensors",
        "checkpoints/000200/state.json",
    ):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    without_times = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics_of(run)]
        for run in (out, expected)
    ]
    assert without_times[0] == without_times[1]


def test_a_run_leaves_what_it_promises(finished: Path, store_path: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "evaluation.json",
        "metrics.jsonl",
        "run.json",
        "sae.safetensors",
    ]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "000196",
        "000200",
    ]
    lines = metrics_of(finished)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["tokens"] == STEPS * 128
    assert lines[-1]["dead_after_tokens"] == 256
    assert any(line["auxk"] > 0 for line in lines)
    run = json.loads((finished / "run.json").read_text())
    assert TrainConfig.model_validate(run["config"]) == CONFIG
    assert run["store_digest"] == ActivationStore.open(store_path).digest
    sae = SAE.load(finished)
    assert sae.config.site == SITE
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))


def test_training_learns(tiny_store: Path, tmp_path: Path) -> None:
    config = TrainConfig(n_latents=256, k=8, tokens=200 * 256, batch_rows=256, lr=2e-3)
    result = train(config, tiny_store, tmp_path / "sae", device="cpu")
    lines = metrics_of(tmp_path / "sae")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert result.evaluation is not None
    assert result.evaluation["without_outliers"]["fvu"] < 0.5
    assert result.evaluation["without_outliers"]["l0"] <= 8


def test_an_interrupted_run_ends_with_the_same_bits(
    finished: Path, store_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sae"

    def stop(phase: str, done: int, total: int, rate: str) -> None:
        if phase == "training" and done in (3, 17):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(CONFIG, store_path, out, device="cpu", report=stop).steps == 3
    assert (out / "checkpoints" / "000003").is_dir()
    assert not (out / "sae.safetensors").exists()
    result = train(CONFIG, store_path, out, device="cpu", report=stop)
    assert (result.steps, result.finished) == (17, False)
    assert train(CONFIG, store_path, out, device="cpu").finished
    assert_same_result(out, finished)


def test_a_finished_run_is_left_as_it_is(finished: Path, store_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}
    result = train(CONFIG, store_path, finished, device="cpu")
    assert result.finished
    assert result.evaluation == json.loads((finished / "evaluation.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_configuration_is_refused_by_field(finished: Path, store_path: Path) -> None:
    other = CONFIG.model_copy(update={"k": 5, "lr": 1e-2})
    with pytest.raises(RunError, match=r"differs in k \(there 4, here 5\), lr \(there 0.001"):
        train(other, store_path, finished, device="cpu")


def test_a_run_of_another_version_is_refused(
    finished: Path, store_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "sae")
    path = tmp_path / "sae" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(RunError, match="format 1, begun by another version of this software"):
        train(CONFIG, store_path, tmp_path / "sae", device="cpu")


def test_two_processes_in_one_folder_are_refused(
    finished: Path, store_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "sae")
    with (
        lock(tmp_path / "sae" / LOCK_FILE),
        pytest.raises(RunError, match=r"Another process is writing to .*sae; wait until"),
    ):
        train(CONFIG, store_path, tmp_path / "sae", device="cpu")
    assert train(CONFIG, store_path, tmp_path / "sae", device="cpu").finished


def test_another_store_is_refused(finished: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "store", make_plan(width=8, seed=1))
    with pytest.raises(RunError, match="differs in store_digest"):
        train(CONFIG, tmp_path / "store", finished, device="cpu")


@pytest.mark.parametrize("name", ["sae.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "remove", "flip"])
def test_a_broken_checkpoint_is_refused_by_name(
    finished: Path, store_path: Path, tmp_path: Path, name: str, harm: str
) -> None:
    shutil.copytree(finished, tmp_path / "sae")
    path = tmp_path / "sae" / "checkpoints" / "000200" / name
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:10] + bytes([data[10] ^ 1]) + data[11:])
    with pytest.raises(RunError, match=r"000200.*delete that folder to go on from 000196") as error:
        train(CONFIG, store_path, tmp_path / "sae", device="cpu")
    assert name in str(error.value)
    shutil.rmtree(path.parent)
    train(CONFIG, store_path, tmp_path / "sae", device="cpu")
    assert_same_result(tmp_path / "sae", finished)


def test_what_cannot_be_used_is_refused(store_path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        train(CONFIG, tmp_path, tmp_path / "sae", device="cpu")
    with pytest.raises(InputError, match=r"resid_post\.0"):
        train(CONFIG, store_path, tmp_path / "sae", site="resid_post.7", device="cpu")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RunError, match="choose another --out"):
        train(CONFIG, store_path, tmp_path / "other", device="cpu")
    big = CONFIG.model_copy(update={"batch_rows": 5000})
    with pytest.raises(InputError, match="fewer than one batch"):
        train(big, store_path, tmp_path / "sae2", device="cpu")
    assert not (tmp_path / "sae2").exists()
    with pytest.raises(RunError, match="Cannot read or write"):
        train(CONFIG, store_path, tmp_path / "other" / "thesis.tex" / "sae", device="cpu")


def test_the_command_fails_with_one_sentence(tmp_path: Path) -> None:
    arguments = ["run", "--store", str(tmp_path / "none"), "--out", str(tmp_path / "sae")]
    result = CliRunner().invoke(main, [*arguments, *OPTIONS])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.output
    result = CliRunner().invoke(main, [*arguments, "--n-latents", "8", "--k", "9"])
    assert result.exit_code == 2


def test_fvu_is_zero_for_perfect_one_for_the_mean() -> None:
    x = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 3.0]])
    mean = np.array([2.0, 1.0])
    for x_hat, expected in (
        (x, 0.0),
        (np.tile(mean, (3, 1)), 1.0),
        # squared error 4 of a total of (4 + 1) + (0 + 1) + (4 + 4) = 14
        (x + np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), 4 / 14),
    ):
        fvu = Fvu(2)
        fvu.update(x[:1], x_hat[:1])
        fvu.update(x[1:], x_hat[1:])
        assert fvu.value == pytest.approx(expected, abs=1e-15)
    assert Fvu(2).value is None


def test_evaluation_equals_the_dense_formula(finished: Path, store_path: Path) -> None:
    store, sae = ActivationStore.open(store_path), SAE.load(finished)
    rule = RowRule(heldout_fraction=0.3)
    result = evaluate(sae, store, rule, max_rows=10**6)
    rows = torch.from_numpy(rows_of(make_plan()).astype(np.float16)).double()
    for group, medians in (("without_outliers", 5.0), ("with_outliers", None)):
        chosen = store.selected(
            SITE, RowRule(heldout_fraction=0.3, split="heldout", max_norm_medians=medians)
        )
        x = rows[chosen]
        w = {name: tensor.double() for name, tensor in sae.tensors().items()}
        centred = x / sae.config.input_scale - w["b_dec"]
        values, indices = torch.relu(centred @ w["W_enc"].T + w["b_enc"]).topk(4, dim=1)
        latents = torch.zeros(len(x), 96, dtype=torch.float64).scatter(1, indices, values)
        error = (latents @ w["W_dec"] + w["b_dec"]) * sae.config.input_scale - x
        fvu = error.square().sum() / (x - x.mean(0)).square().sum()
        got = result[group]
        assert got["rows"] == len(x) > 0
        assert got["fvu"] == pytest.approx(fvu.item(), rel=1e-5)
        assert got["l0"] == pytest.approx((latents > 0).sum(1).double().mean().item())
        assert got["dead_share"] == pytest.approx((latents == 0).all(0).double().mean().item())
    assert result["with_outliers"]["rows"] > result["without_outliers"]["rows"]


def test_evaluation_without_held_out_rows_says_so(finished: Path, store_path: Path) -> None:
    store = ActivationStore.open(store_path)
    result = evaluate(SAE.load(finished), store, RowRule(heldout_fraction=0), max_rows=100)
    assert result["with_outliers"] == {"rows": 0, "fvu": None, "l0": None, "dead_share": None}


def test_an_sae_of_another_width_is_refused(finished: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "wide", make_plan(width=12), 16)
    store = ActivationStore.open(tmp_path / "wide")
    with pytest.raises(InputError, match="8 dimensions"):
        evaluate(SAE.load(finished), store, RowRule(heldout_fraction=0.9), max_rows=100)


def test_a_foreign_line_in_the_metrics_is_refused(
    finished: Path, store_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "sae")
    (tmp_path / "sae" / "metrics.jsonl").write_text("hello\n")
    with pytest.raises(RunError, match=r"metrics.jsonl .*'hello'"):
        train(CONFIG, store_path, tmp_path / "sae", device="cpu")


def test_divergence_is_reported(store_path: Path, tmp_path: Path) -> None:
    wild = CONFIG.model_copy(update={"lr": 1e30})  # a copy isn't held to the bounds
    with pytest.raises(RunError, match=r"diverged at step \d+ .*lower --lr"):
        train(wild, store_path, tmp_path / "sae", device="cpu")


def test_geometric_median_ignores_an_outlier() -> None:
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [1e6, 0.0]])
    torch.testing.assert_close(
        geometric_median(line), torch.tensor([2.0, 0.0]).double(), rtol=0, atol=0.1
    )
    # the Fermat point of an isosceles right triangle lies on its axis at (3 - sqrt(3)) / 6
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    expected = torch.full((2,), (3 - 3**0.5) / 6, dtype=torch.float64)
    torch.testing.assert_close(geometric_median(corner), expected, rtol=0, atol=1e-3)


def test_scale_gives_variance_one_per_dimension() -> None:
    rows = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)) * 3 + 10
    start = prepare(rows, "scale")
    scaled = rows.double() / start.input_scale
    assert scaled.var(0, correction=0).mean().item() == pytest.approx(1)
    assert start.total_variance == pytest.approx(6)
    assert prepare(rows, "none").input_scale == 1
    with pytest.raises(InputError, match="equal"):
        prepare(torch.ones(10, 3), "scale")
