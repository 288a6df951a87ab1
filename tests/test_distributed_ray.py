"""`train-sae run --workers`: Ray starts the processes, and leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.actor import Place
from sae_harvest.train.parallel.ray_train import _reported, visible_devices
from sae_harvest.train.parallel.worker import Failure
from sae_harvest.train.run.checkpoint import saved_steps
from sae_harvest.train.run.exit_codes import EXIT_TRY_AGAIN, may_pass
from sae_harvest.train.run.trainer import train
from tests.commands import PATIENCE
from tests.forked import forked
from tests.synthetic import make_plan, make_store

STEPS = 80
CONFIG = TrainConfig(
    n_latents=96,
    k=4,
    tokens=STEPS * 128,
    batch_rows=128,
    dead_after_tokens=256,
    checkpoint_every=5,
    lr=1e-3,
)
OPTIONS = [
    *("--n-latents", "96", "--k", "4", "--tokens", str(STEPS * 128), "--batch-rows", "128"),
    *("--dead-after-tokens", "256", "--checkpoint-every", "5", "--lr", "0.001"),
    *("--device", "cpu", "--workers", "2"),
]


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "store"
    make_store(path, make_plan(width=8))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store_path: Path) -> Path:
    out = tmp_path_factory.mktemp("alone") / "sae"
    train(CONFIG, store_path, out, device="cpu")
    return out


class Command:
    """A running `train-sae run`, in an environment by which its processes are known."""

    def __init__(self, store: Path, out: Path, *options: str) -> None:
        self.mark = f"run-of-{time.monotonic_ns()}"
        self.out = out
        environment = os.environ | {"SAE_HARVEST_TEST_MARK": self.mark}
        given = ("run", "--store", store, "--out", out, *OPTIONS, *options)
        self._stack = ExitStack()
        self.process = self._stack.enter_context(
            forked("train-sae", *given, environment=environment)
        )

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        with self._stack:
            said, errors = self.process.communicate(timeout=PATIENCE)
            return self.process.wait(), said + errors

    def wait_for_steps(self, steps: int) -> None:
        metrics = self.out / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
            assert self.process.poll() is None, self.end()
            time.sleep(0.02)

    def processes(self) -> dict[int, str]:
        """Command lines of its living processes, itself left out."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdecimal() and self.mark in (folder / "environ").read_text():
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except (OSError, UnicodeDecodeError):  # gone, or not ours
                continue
        found.pop(self.process.pid, None)
        return {pid: line for pid, line in found.items() if line}

    def left_behind(self, but: str = "nothing") -> dict[int, str]:
        """Its processes that are still there some time after its end, but for those named so."""
        limit = time.monotonic() + 20
        while True:
            found = {pid: line for pid, line in self.processes().items() if but not in line}
            if not found or time.monotonic() > limit:
                return found
            time.sleep(0.1)


def assert_equal(out: Path, expected: Path) -> None:
    found, wanted = load_file(out / "sae.safetensors"), load_file(expected / "sae.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    found, wanted = (json.loads((path / "evaluation.json").read_text()) for path in (out, expected))
    assert found["with_outliers"] == pytest.approx(wanted["with_outliers"], rel=1e-4)
    names = {path.name for path in out.iterdir() if not path.name.endswith(".tmp")}
    assert names == {path.name for path in expected.iterdir()}


@pytest.mark.slow
def test_a_run_on_workers_stopped_killed_and_continued_is_the_run_of_one_process(
    tmp_path, store_path, alone
):
    out = tmp_path / "sae"
    command = Command(store_path, out)
    command.wait_for_steps(20)
    assert any("ray::" in line for line in command.processes().values())
    command.process.send_signal(signal.SIGTERM)
    code, said = command.end()
    assert code == 0, said
    assert "Stopped after step" in said
    assert "the same command continues" in said
    assert command.left_behind() == {}
    stopped = max(saved_steps(out))
    assert 20 <= stopped < STEPS
    assert not list(out.glob(".*.tmp"))

    command = Command(store_path, out, "--parallel", "data")
    command.wait_for_steps(stopped + 10)
    workers = [pid for pid, line in command.processes().items() if "TrainActor" in line]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    code, said = command.end()
    assert code == EXIT_TRY_AGAIN, said
    assert "the same command continues from the last checkpoint." in said
    assert "Traceback" not in said
    assert command.left_behind() == {}

    command = Command(store_path, out)
    command.wait_for_steps(max(saved_steps(out)) + 10)
    command.process.kill()
    command.end()
    # Ray's own agents try for minutes to tell of it; what works and what writes is gone
    assert command.left_behind("Agent") == {}

    command = Command(store_path, out)
    code, said = command.end()
    assert code == 0, said
    assert "held-out rows" in said
    assert command.left_behind() == {}
    assert_equal(out, alone)


@pytest.mark.slow
def test_what_a_worker_refuses_is_said_in_one_sentence(tmp_path, store_path):
    command = Command(store_path / "elsewhere", tmp_path / "sae", "--workers", "1")
    code, said = command.end()
    assert code == 1
    assert said.count("Error: ") == 1
    assert "elsewhere holds no activation store" in said
    assert "Traceback" not in said
    assert command.left_behind() == {}


def test_the_sentence_that_says_most_is_reported():
    def failed(*errors):
        return _reported(dict(enumerate(errors)))

    echo = Failure("another one has ended", passes=True, is_echo=True)
    cause = Failure("the disk is full", passes=True, is_echo=False)
    wrong = Failure("no such site", passes=False, is_echo=False)
    assert str(failed(echo, cause)) == "the disk is full"
    assert may_pass(failed(echo, cause))
    assert str(failed(echo, wrong)) == "no such site"
    assert not may_pass(failed(echo, wrong))
    assert str(failed(echo, echo)) == "another one has ended"
    assert may_pass(failed(echo, echo))
    missing = failed(echo, ModuleNotFoundError("No module named 'sae_harvest'", name="sae_harvest"))
    assert "Worker 1 found no sae_harvest on its machine; install" in str(missing)
    bug = ValueError("a bug")
    assert failed(echo, bug) is bug


def test_a_worker_sees_its_own_gpu_first_and_those_of_its_machine():
    def place(node, gpu):
        return Place(node, "10.0.0.1", 4000, gpu)

    four = [place("a", "0"), place("a", "3"), place("b", "0"), place("a", "1")]
    assert visible_devices(four) == ["0,3,1", "3,0,1", "0", "1,0,3"]
    assert visible_devices([place("a", "GPU-5e"), place("a", "GPU-c1")]) == [
        "GPU-5e,GPU-c1",
        "GPU-c1,GPU-5e",
    ]
    assert visible_devices([place("a", None), place("a", None)]) == [None, None]
