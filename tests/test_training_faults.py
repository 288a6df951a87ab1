"""Faults of memory, GPU and files, each reported as what it is; runs that went wrong say so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import sae_harvest.train.run.run_state as members
from sae_harvest.common.errors import RunError
from sae_harvest.common.units import size_text
from sae_harvest.pipelines.evaluate.cli import main
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.distributed import PeerLost, reaching_peers
from sae_harvest.train.run.checkpoint import saved_steps
from sae_harvest.train.run.faults import explained
from sae_harvest.train.run.trainer import train
from tests.synthetic import make_plan, make_store

CONFIG = TrainConfig(n_latents=24, k=4, tokens=30 * 64, batch_rows=64, checkpoint_every=10)
OPTIONS = ("--n-latents", 24, "--k", 4, "--tokens", 1920, "--batch-rows", 64, "--device", "cpu")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "store"
    make_store(path, make_plan(width=8))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store_path: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "sae"
    train(CONFIG, store_path, out, device="cpu")
    return out


OF_MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 8.00 PiB for an array"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 4611686018427387904 bytes."
    ),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("Expected all tensors to share a memory format"),
    ValueError("memory"),
]


@pytest.mark.parametrize("error", OF_MEMORY, ids=lambda error: str(error)[:30])
def test_too_little_memory_is_explained(error: Exception) -> None:
    sentence = r"^There is too little memory \(.+\); use fewer"
    with pytest.raises(RunError, match=sentence), explained(Path("out")):
        raise error


def test_torch_tells_too_little_memory_in_these_words() -> None:
    sentence = r"too little memory .*DefaultCPUAllocator"
    with pytest.raises(RunError, match=sentence), explained(Path("out")):
        torch.empty(1 << 60)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:30])
def test_another_fault_is_reported_as_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained(Path("out")):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [*OF_MEMORY[2:], *OTHERS[:2]], ids=lambda error: str(error)[:30])
def test_a_fault_of_our_own_gpu_is_not_blamed_on_another_process(error: RuntimeError) -> None:
    with pytest.raises(type(error)) as caught, reaching_peers():
        raise error
    assert caught.value is error
    with pytest.raises(PeerLost), reaching_peers():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")


def cut_back(finished: Path, out: Path, step: int) -> Path:
    """A copy of a run as it was at an earlier checkpoint; its metrics."""
    shutil.copytree(finished, out)
    for name in ("evaluation.json", "sae.safetensors", "config.json"):
        (out / name).unlink()
    for later in saved_steps(out):
        if later > step:
            shutil.rmtree(out / "checkpoints" / f"{later:06d}")
    return out / "metrics.jsonl"


def steps_of(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (range(19), "ends with step 19, and the checkpoint to continue from is of step 20"),
        (range(0), "ends with step 0, and the checkpoint to continue from is of step 20"),
        ([*range(8), *range(12, 30)], "has step 13 after step 8"),
        ([*range(20), *range(18, 30)], "has step 19 after step 20"),
    ],
)
def test_metrics_with_a_gap_before_the_checkpoint_are_refused(
    finished: Path, store_path: Path, tmp_path: Path, kept: object, says: str
) -> None:
    metrics = cut_back(finished, tmp_path / "sae", 20)
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[number] for number in kept))
    before = metrics.read_bytes()
    with pytest.raises(RunError, match=rf"metrics.jsonl {says}.*move it away") as caught:
        train(CONFIG, store_path, tmp_path / "sae", device="cpu")
    assert "\n" not in str(caught.value)
    assert metrics.read_bytes() == before
    metrics.rename(tmp_path / "aside")  # as the sentence says
    assert train(CONFIG, store_path, tmp_path / "sae", device="cpu").finished
    assert steps_of(metrics) == list(range(21, 31))
    # and a run that is continued again takes a file that begins there
    cut_back(tmp_path / "sae", tmp_path / "again", 30)
    assert train(CONFIG, store_path, tmp_path / "again", device="cpu").finished
    assert steps_of(tmp_path / "again" / "metrics.jsonl") == list(range(21, 31))


def test_metrics_that_are_no_text_are_refused(
    finished: Path, store_path: Path, tmp_path: Path
) -> None:
    metrics = cut_back(finished, tmp_path / "sae", 20)
    for foreign in (b"\xff\xfe\x00\n", b'{"step": 1e999}\n', b"[" * 100_000 + b"\n"):
        metrics.write_bytes(foreign)
        with pytest.raises(RunError, match="a line that no training run writes"):
            train(CONFIG, store_path, tmp_path / "sae", device="cpu")


def test_metrics_are_on_the_disk_before_the_checkpoint_of_their_step(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sae"
    synced: list[int] = []  # lines of the metrics file, at each time that it was synced
    fsync, save = os.fsync, members.save_checkpoint

    def noting(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == out / "metrics.jsonl":
            synced.append(path.read_bytes().count(b"\n"))
        fsync(descriptor)

    def saving(out: Path, step: int, *arguments: object) -> Path:
        assert synced[-1] == step
        return save(out, step, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(members, "save_checkpoint", saving)
    train(CONFIG, store_path, out, device="cpu")
    assert synced == [10, 20, 30]


def test_a_warm_up_longer_than_the_run_is_refused(store_path: Path, tmp_path: Path) -> None:
    places = ("--store", store_path, "--out", tmp_path / "sae")
    result = invoke("run", *places, *OPTIONS, "--warmup-tokens", 1921)
    assert result.exit_code == 2
    assert "at most" in result.stderr.splitlines()[-1]
    assert "1921 > 1920" in result.stderr
    assert not (tmp_path / "sae").exists()


def test_a_run_that_learned_nothing_warns(store_path: Path, tmp_path: Path) -> None:
    """One learning rate step of 1 pushes every latent out of reach."""
    arguments = ("run", "--store", store_path, "--out", tmp_path / "sae", *OPTIONS, "--lr", 1)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    evaluation = json.loads((tmp_path / "sae" / "evaluation.json").read_text())
    figures = evaluation["without_outliers"]
    assert figures["fvu"] > 1 or figures["dead_share"] == 1
    warning = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert len(warning) == 1
    assert str(tmp_path / "sae") in warning[0]
    again = invoke("eval", "--sae", tmp_path / "sae", "--store", store_path)
    assert [line for line in again.stderr.splitlines() if line.startswith("Warning: ")] == warning


def test_a_run_that_learned_something_does_not_warn(finished: Path, store_path: Path) -> None:
    result = invoke("eval", "--sae", finished, "--store", store_path)
    assert result.exit_code == 0, result.stderr
    assert "Warning" not in result.stderr


def test_sizes_have_three_digits_whatever_their_unit() -> None:
    sizes = {
        0: "0 bytes",
        17: "17 bytes",
        999: "999 bytes",
        1000: "1.00 kB",
        812_345: "812 kB",
        4_000_000: "4.00 MB",
        1_234_000_000: "1.23 GB",
        45_600_000_000: "45.6 GB",
        7.5e15: "7,500 TB",
    }
    assert {n: size_text(n) for n in sizes} == sizes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", {}),
        ("run.json", []),
        ("run.json", {"config": {"n_latents": 8}}),
        ("sweep.json", {"members": ["a"]}),
        ("sweep.json", {"members": {"../elsewhere": {}}}),
        ("sweep.json", {"members": {"a": {"tokens": "many"}}}),
        ("failed.json", {"sentence": 3}),
    ],
)
def test_status_of_a_damaged_record_is_one_sentence(
    finished: Path, tmp_path: Path, name: str, content: object
) -> None:
    shutil.copy(finished / "run.json", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    result = invoke("status", tmp_path)
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    [line] = result.stderr.splitlines()
    assert name in line
