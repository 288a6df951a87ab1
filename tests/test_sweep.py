"""Many dictionaries on one stream: the same bits as alone, whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.evaluate.cli import main
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.run import run_state as members_of_passes
from sae_harvest.train.run.checkpoint import saved_steps
from sae_harvest.train.run.trainer import train
from sae_harvest.train.step.learner import Diverged
from sae_harvest.train.sweeps import sweep as sweeps
from sae_harvest.train.sweeps.sweep import common_step, passes, sweep
from sae_harvest.train.sweeps.sweepfile import read_sweep_file
from tests.forked import ended, forked
from tests.synthetic import make_plan, make_store

STEPS, ROWS = 30, 64
BASE = TrainConfig(
    n_latents=48,
    k=4,
    tokens=STEPS * ROWS,
    batch_rows=ROWS,
    dead_after_tokens=256,
    checkpoint_every=7,
    lr=1e-3,
)
FILE = """
k: 4
tokens: 1920
batch_rows: 64
dead_after_tokens: 256
checkpoint_every: 7
lr: 1e-3
grid:
  n_latents: [48, 32]
  seed: [0, 1]
"""
NAMES = [f"n_latents={n},seed={seed}" for n in (48, 32) for seed in (0, 1)]


def variant(**fields: Any) -> TrainConfig:
    return TrainConfig.model_validate(BASE.model_dump() | fields)


MEMBERS = {
    "large": variant(n_latents=64),
    "batchtopk": variant(activation="batchtopk", order_seed=0, seed=3),
    "gated": variant(activation="gated", k=None, l1=0.01),
}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "store"
    make_store(path, make_plan(width=8))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store_path: Path) -> Path:
    """Each of MEMBERS trained by itself."""
    out = tmp_path_factory.mktemp("alone")
    for name, config in MEMBERS.items():
        train(config, store_path, out / name, device="cpu")
    return out


def assert_same_runs(out: Path, expected: Path, names: Any = MEMBERS) -> None:
    for name in names:
        checkpoint = f"checkpoints/{saved_steps(expected / name)[-1]:06d}"
        for file in (
            "run.json",
            "sae.safetensors",
            "config.json",
            "evaluation.json",
            f"{checkpoint}/sae.safetensors",
            f"{checkpoint}/optimizer.safetensors",
            f"{checkpoint}/state.json",
        ):
            there, here = expected / name / file, out / name / file
            assert here.read_bytes() == there.read_bytes(), (name, file)
        assert metrics_of(out / name) == metrics_of(expected / name)


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_members_have_the_bits_of_runs_of_their_own(
    alone: Path, store_path: Path, tmp_path: Path
) -> None:
    result = sweep(MEMBERS, store_path, tmp_path / "sweep", device="cpu")
    assert result.finished
    assert list(result.members) == list(MEMBERS)
    assert_same_runs(tmp_path / "sweep", alone)
    for name, member in result.members.items():
        assert member.evaluation == json.loads((alone / name / "evaluation.json").read_text())


def test_a_finished_sweep_is_left_as_it_is(store_path: Path, tmp_path: Path) -> None:
    first = sweep({"a": BASE}, store_path, tmp_path / "sweep", device="cpu")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*.*")}
    again = sweep({"a": BASE}, store_path, tmp_path / "sweep", device="cpu")
    assert again == first
    changed = {p for p, when in before.items() if p.stat().st_mtime_ns != when}
    assert {path.name for path in changed} <= {".lock"}


def stop_at(steps: set[int]) -> Callable[[str, int, int, str], None]:
    def report(phase: str, done: int, total: int, rate: str) -> None:
        if phase == "training" and done in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def test_a_stopped_sweep_ends_with_the_same_bits(
    alone: Path, store_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    for _ in range(2):
        result = sweep(MEMBERS, store_path, out, device="cpu", report=stop_at({3, 16}))
        assert (result.finished, result.signal) == (False, signal.SIGTERM)
    assert {saved_steps(out / name)[-1] for name in MEMBERS} == {16}
    assert sweep(MEMBERS, store_path, out, device="cpu").finished
    assert_same_runs(out, alone)


@pytest.mark.parametrize(("nth", "common"), [(2, 0), (5, 7), (6, 7), (9, 14)])
def test_members_cut_off_between_their_checkpoints_go_on_together(
    alone: Path,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
    common: int,
) -> None:
    out, calls, save = tmp_path / "sweep", 0, members_of_passes.save_checkpoint

    def fail(*arguments: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(28, "No space left on device")
        return save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(members_of_passes, "save_checkpoint", fail)
        with pytest.raises(RunError, match=r"No space left.*run the same command again"):
            sweep(MEMBERS, store_path, out, device="cpu")
    assert common_step([saved_steps(out / name) for name in MEMBERS]) == common
    assert sweep(MEMBERS, store_path, out, device="cpu").finished
    assert_same_runs(out, alone)


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_bits(
    alone: Path, store_path: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "sweep.yaml", FILE)
    command = ("train-sae", "sweep", file, "--device", "cpu", "--store", store_path, "--out")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert ended(*command, whole).returncode == 0
    metrics, deadline = out / NAMES[1] / "metrics.jsonl", time.monotonic() + 120
    with forked(*command, out) as process:
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 11:
                break
            time.sleep(0.001)
    again = ended(*command, out)
    assert again.returncode == 0, again.stderr
    assert_same_runs(out, whole, NAMES)


def test_members_that_do_not_fit_together_are_trained_in_passes(
    alone: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "sweep", []
    sizes = {64: 600, 48: 400}
    monkeypatch.setattr(sweeps, "memory_bytes", lambda config, *_: sizes[config.n_latents])
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: 900 / sweeps.USABLE)
    result = sweep(
        MEMBERS, store_path, out, device="cpu", report=stop_at({9}), announce=said.append
    )
    assert not result.finished
    assert [re.sub(r"about.*memory: ", "", line) for line in said] == ["Pass 1 of 2: 1 SAEs, large"]
    # what is left is split further, never put together anew
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: 10_000)
    assert sweep(MEMBERS, store_path, out, device="cpu", announce=said.append).finished
    assert [line.partition(":")[0] for line in said[1:]] == ["Pass 1 of 2", "Pass 2 of 2"]
    assert_same_runs(out, alone)


def test_a_member_that_fits_no_memory_is_refused_with_the_numbers(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {64: 3_000_000_000, 48: 700_000_000}
    monkeypatch.setattr(sweeps, "memory_bytes", lambda config, *_: sizes[config.n_latents])
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: 1_000_000_000)
    sentence = r"1 of the members do not fit into memory: large takes about 3\.00 GB, 900 MB can"
    with pytest.raises(RunError, match=sentence):
        sweep(MEMBERS, store_path, tmp_path / "sweep", device="cpu")


def test_passes_are_few_and_keep_the_order() -> None:
    needs = {"a": 5, "b": 7, "c": 3, "d": 5}
    assert passes([list("abcd")], needs, 10) == [["b", "c"], ["a", "d"]]
    assert passes([list("abcd")], needs, 20) == [["a", "b", "c", "d"]]
    assert passes([["a", "c"], ["b"]], needs, 20) == [["a", "c"], ["b"]]
    with pytest.raises(RunError, match="1 of the members do not fit"):
        passes([list("abcd")], needs, 6)


def test_the_common_step_is_the_newest_that_all_have() -> None:
    assert common_step([[200, 400], [400, 600]]) == 400
    assert common_step([[200], []]) == 0
    assert common_step([[200], [200, 400], [200, 400]]) == 200


def test_a_member_that_diverges_is_recorded_and_the_others_go_on(
    alone: Path, store_path: Path, tmp_path: Path
) -> None:
    # a copy isn't held to the bounds
    members = {"wild": BASE.model_copy(update={"lr": 1e30}), **MEMBERS}
    out = tmp_path / "sweep"
    assert not sweep(members, store_path, out, device="cpu", report=stop_at({20})).finished
    failure = json.loads((out / "wild" / "failed.json").read_text())
    assert failure["step"] < 20
    result = sweep(members, store_path, out, device="cpu")
    assert result.finished
    assert result.failed == ["wild"]
    assert result.members["wild"].failure == failure["sentence"]
    assert "diverged at step" in failure["sentence"]
    assert_same_runs(out, alone)


def test_members_of_fewer_tokens_end_earlier(store_path: Path, tmp_path: Path) -> None:
    members = {
        "long": BASE,
        "short": variant(tokens=11 * ROWS),
        "middle": variant(tokens=20 * ROWS),
    }
    for name, config in members.items():
        train(config, store_path, tmp_path / "alone" / name, device="cpu")
    out = tmp_path / "sweep"
    for _ in range(2):
        sweep(members, store_path, out, device="cpu", report=stop_at({9, 17}))
    assert sweep(members, store_path, out, device="cpu").finished
    assert_same_runs(out, tmp_path / "alone", members)


def test_a_sweep_of_one_continues_as_a_run_and_the_reverse(
    alone: Path, store_path: Path, tmp_path: Path
) -> None:
    config, out = MEMBERS["large"], tmp_path / "sweep"
    sweep({"large": config}, store_path, out, device="cpu", report=stop_at({4}))
    train(config, store_path, out / "large", device="cpu", report=stop_at({10}))
    assert sweep({"large": config}, store_path, out, device="cpu").finished
    assert_same_runs(out, alone, ["large"])


def test_another_sweep_in_the_folder_is_refused(store_path: Path, tmp_path: Path) -> None:
    sweep({"a": variant(tokens=64)}, store_path, tmp_path / "sweep", device="cpu")
    with pytest.raises(RunError, match=r"differs in members.a.k \(there 4, here 3\)"):
        sweep({"a": variant(tokens=64, k=3)}, store_path, tmp_path / "sweep", device="cpu")


def test_the_command_trains_the_grid_and_prints_it(store_path: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "sweep.yaml", f"store: {store_path}\n" + FILE)
    result = invoke("sweep", file, "--out", tmp_path / "sweep", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for name in NAMES:
        assert result.stdout.count(name) == 2
        run = json.loads((tmp_path / "sweep" / name / "run.json").read_text())
        assert (run["config"]["order_seed"] or 0) == 0
    assert "Pass 1 of 1: 4 SAEs, about" in result.stderr
    status = invoke("status", tmp_path / "sweep")
    assert status.exit_code == 0
    assert status.stdout.count("finished") == 4


def test_the_command_says_which_members_failed(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = members_of_passes.Learner.advance

    def diverge(self: Any, *batch: Any) -> Any:
        if self.config.n_latents == 32 and self.step == 3:
            raise Diverged("Training diverged at step 4; use a lower --lr.")
        return advance(self, *batch)

    monkeypatch.setattr(members_of_passes.Learner, "advance", diverge)
    file = write(tmp_path / "sweep.yaml", FILE)
    result = invoke(
        "sweep", file, "--out", tmp_path / "s", "--store", store_path, "--device", "cpu"
    )
    assert result.exit_code == 1
    assert "Error: 2 of 4 members failed" in result.stderr
    assert "n_latents=32,seed=1: Training diverged at step 4" in result.stderr
    assert "n_latents=48,seed=1" in result.stdout
    status = invoke("status", tmp_path / "s")
    assert status.exit_code == 1
    assert status.stdout.count("failed") == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("k: 4\ngrid: {n_latents: 8}", r"grid should hold lines like `k: \[16, 32\]`"),
        ("grid: {n_latents: [8], kk: [1]}", r"grid, has an unknown key 'kk' \(did you mean k\?\)"),
        ("kk: 4", r"has an unknown key 'kk' \(did you mean k\?\)"),
        ("grid: {batch_rows: [8, 16]}", "batch_rows is the same for all members"),
        ("grid: {rule: [1]}", "rule is the same for all members"),
        ("runs: [{order_seed: 1}]", "order_seed is the same for all members"),
        ("runs: [{out: a}]", "out is the same for all members"),
        ("runs: {k: 1}", "runs should be a list"),
        ("runs: [{name: a/b}]", "'a/b' cannot name a folder"),
        ("runs: [{k: 3}, {k: 3}]", "2 members are called k=3"),
        ("runs: [{k: 3, name: a}, {k: 3, name: b}]", "members a and b are the same run"),
        ("grid: {k: [3, many]}", "member k=many: k should be a valid integer, got 'many'"),
        ("n_latents: 8\ngrid: {k: [3, 9]}", "member k=9: k must be at most n_latents, got 9 > 8"),
        ("grid: {k: [1], k: [2]}", "'k' is there twice in line 1"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused_by_key(
    tmp_path: Path, text: str, sentence: str
) -> None:
    file = write(tmp_path / "sweep.yaml", text)
    result = invoke("sweep", file, "--store", tmp_path / "none", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    message = result.stderr.splitlines()[-1]
    assert re.search(sentence, message), message
    assert str(file) in message
    assert not (tmp_path / "out").exists()


def test_a_file_spells_out_its_members(tmp_path: Path) -> None:
    file = write(
        tmp_path / "sweep.yaml",
        """
store: /s
out: o
seed: 5
n_latents: 64
grid: {k: [2, 4], lr: [1e-3, none]}
runs:
  - {name: gate, activation: gated, l1: 0.5}
  - {seed: 6, matryoshka: [8, 64]}
""".replace("none", "null"),
    )
    found = read_sweep_file(file, {"out": "/p"})
    assert (found.places.store, found.places.out) == ("/s", "/p")
    assert list(found.members) == [
        *("k=2,lr=0.001", "k=2,lr=none", "k=4,lr=0.001", "k=4,lr=none"),
        *("gate", "seed=6,matryoshka=8-64"),
    ]
    assert found.members["k=4,lr=none"] == TrainConfig(n_latents=64, k=4, tokens=10_000_000, seed=5)
    assert found.members["gate"].k is None
    last = found.members["seed=6,matryoshka=8-64"]
    assert (last.k, last.seed, last.order_seed) == (32, 6, 5)
