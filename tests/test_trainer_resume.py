"""Killed or stopped anywhere and continued, a run ends with the bits of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_harvest.train.config import TrainConfig
from sae_harvest.train.run.trainer import train
from tests.forked import ended, forked

SITE, TARGET = "resid_mid.1", "mlp_out.1"
STEPS, ROWS = 90, 64
SHARED = {
    "n_latents": 96,
    "tokens": STEPS * ROWS,
    "batch_rows": ROWS,
    "dead_after_tokens": 640,  # few enough that AuxK takes part
    "checkpoint_every": 7,
    "lr": 1e-3,
    "warmup_tokens": 10 * ROWS,
    "decay_share": 0.3,
}
CASES: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4, "activation": "batchtopk"},
    "jumprelu": {"k": 4, "activation": "jumprelu"},
    "relu_l1": {"activation": "relu_l1"},
    "relu_kl": {"k": 4, "activation": "relu_kl"},
    "gated": {"activation": "gated"},
    "multi-topk": {"k": 4, "multi_topk": 0.125, "normalization": "unit_norm"},
    "matryoshka": {"k": 4, "matryoshka": [16, 96], "normalization": "layer_norm"},
    "transcoder": {"k": 4, "target_site": TARGET},
}
CHECKPOINT = f"checkpoints/{STEPS:06d}"
FILES = (
    "run.json",
    "sae.safetensors",
    "config.json",
    "evaluation.json",
    f"{CHECKPOINT}/sae.safetensors",
    f"{CHECKPOINT}/optimizer.safetensors",
    f"{CHECKPOINT}/state.json",
)


@pytest.fixture(scope="module")
def store_path(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> Path:
    """Two sites of the fixture model: 3 shards of 1,024 rows, width 32."""
    from sae_harvest.harvest.run.config import HarvestConfig
    from sae_harvest.harvest.run.driver import Execution, run
    from sae_harvest.harvest.text.corpus import CorpusSpec

    path = tmp_path_factory.mktemp("two-sites") / "store"
    config = HarvestConfig(
        model=str(model_folder),
        corpus=CorpusSpec(name=str(corpus_file)),
        sites=(SITE, TARGET),
        tokens=3 * 1024,
        context_length=32,
        shard_rows=1024,
        compute_dtype="float32",
    )
    run(config, path, Execution(workers=0, device="cpu"))
    return path


def config_of(case: str) -> TrainConfig:
    return TrainConfig.model_validate(SHARED | CASES[case])


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, store_path: Path, request: pytest.FixtureRequest
) -> Path:
    """The case's run, left alone."""
    out = tmp_path_factory.mktemp(request.param) / "sae"
    assert train(config_of(request.param), store_path, out, SITE, "cpu").finished
    return out


def assert_same_result(out: Path, expected: Path) -> None:
    for name in FILES:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key != "tokens_per_second"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (out, expected)
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["topk"], indirect=True)
def test_a_run_killed_at_random_steps_ends_with_the_same_bits(
    finished: Path, store_path: Path, tmp_path: Path
) -> None:
    """Of one activation function: the others go on from checkpoints in the test below."""
    settings = SHARED | CASES["topk"] | {"store": str(store_path), "site": SITE, "device": "cpu"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "sae"
    command = ("train-sae", "run", "--config", tmp_path / "job.yaml", "--out", out)
    chance = random.Random(0)
    # not in the last steps, which may be over before the signal is there
    for kill_at in sorted(chance.sample(range(1, STEPS * 2 // 3), 3)):
        with forked(*command) as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                metrics = out / "metrics.jsonl"
                if metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_at:
                    break
                time.sleep(0.001)
            process.kill()
            assert process.wait() == -signal.SIGKILL
    again = ended(*command)
    assert again.returncode == 0, again.stderr
    assert_same_result(out, finished)


@pytest.mark.parametrize(
    ("finished", "case"), [(c, c) for c in CASES], indirect=["finished"], ids=list(CASES)
)
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(
    finished: Path, case: str, store_path: Path, tmp_path: Path
) -> None:
    out, stops = tmp_path / "sae", {1, 2, 8, 21, 59, STEPS - 1}

    def stop(phase: str, done: int, total: int, rate: str) -> None:
        if phase == "training" and done in stops:
            stops.remove(done)
            os.kill(os.getpid(), signal.SIGTERM)

    while not (result := train(config_of(case), store_path, out, SITE, "cpu", stop)).finished:
        assert result.signal == signal.SIGTERM
        assert result.steps not in stops
        assert (out / "checkpoints" / f"{result.steps:06d}").is_dir()
    assert not stops
    assert_same_result(out, finished)
