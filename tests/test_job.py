"""A training run as a batch job: exit codes, signals, status, and the templates."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from sae_harvest.common.errors import DamagedError, RunError, SaeHarvestError
from sae_harvest.common.locks import LOCK_FILE, lock
from sae_harvest.pipelines.evaluate.cli import main
from sae_harvest.train.options import RunSettings
from sae_harvest.train.run import run_state as member
from sae_harvest.train.run import trainer
from sae_harvest.train.run.exit_codes import EXIT_TRY_AGAIN, may_pass
from sae_harvest.train.step.learner import Diverged
from sae_harvest.train.sweeps.sweepfile import read_sweep_file
from tests.commands import PATIENCE
from tests.forked import forked
from tests.synthetic import make_plan, make_store

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "docker" / "jobs"
STEPS = 30
SETTINGS = {
    "n_latents": 48,
    "k": 4,
    "tokens": STEPS * 64,
    "batch_rows": 64,
    "checkpoint_every": 7,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "store"
    make_store(path, make_plan(width=8))
    return path


@pytest.fixture
def job(store_path: Path, tmp_path: Path) -> Path:
    """A file of settings whose folder is `out` beside it."""
    path = tmp_path / "job.yaml"
    places = {"store": str(store_path), "out": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump(SETTINGS | places))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def last_line(result: Result) -> str:
    assert "Traceback" not in result.output
    return result.stderr.strip().splitlines()[-1]


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Sends signals to this process while that step is done."""
    advance = member.Learner.advance

    def patched(self: Any, *batch: Any) -> Any:
        if self.step == step - 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        return advance(self, *batch)

    monkeypatch.setattr(member.Learner, "advance", patched)


def test_a_job_is_a_file_and_the_same_command_leaves_it_finished(job: Path) -> None:
    first = invoke("run", "--config", job)
    assert first.exit_code == 0, first.stderr
    assert "without outliers" in first.stdout
    out = job.parent / "out"
    before = (out / "sae.safetensors").stat().st_mtime_ns
    again = invoke("run", "--config", job)
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert (out / "sae.safetensors").stat().st_mtime_ns == before
    status = invoke("status", out)
    assert status.exit_code == 0
    assert status.stdout.splitlines()[1].split()[1:5] == ["finished", "30", "30", "30"]


@pytest.mark.parametrize(
    ("numbers", "options", "code"),
    [
        ([signal.SIGTERM], [], 0),
        ([signal.SIGTERM, signal.SIGTERM], [], 0),
        ([signal.SIGTERM], ["--stopped-code", "3"], 3),
        ([signal.SIGINT], [], 130),
        ([signal.SIGINT, signal.SIGTERM], ["--stopped-code", "3"], 130),
    ],
)
def test_a_stopped_job_saves_says_so_and_continues(
    job: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int], options: list[str], code: int
) -> None:
    out = job.parent / "out"
    with monkeypatch.context() as patch:
        signal_at(patch, 10, *numbers)
        result = invoke("run", "--config", job, *options)
    assert result.exit_code == code
    assert last_line(result) == (
        f"Stopped after step 10, saved in {out}; the same command continues."
    )
    assert (out / "checkpoints" / "000010").is_dir()
    status = invoke("status", out)
    assert status.exit_code == 3
    assert status.stdout.splitlines()[1].split()[1:5] == ["unfinished", "10", "30", "10"]
    assert invoke("run", "--config", job).exit_code == 0
    assert invoke("status", out).exit_code == 0


def test_sigterm_while_evaluating_ends_at_once_and_the_job_goes_on(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_all", stop)
        result = invoke("run", "--config", job, "--stopped-code", "3")
    assert result.exit_code == 3
    assert last_line(result) == "Stopped. The same command continues."
    assert invoke("status", job.parent / "out").exit_code == 3
    assert invoke("run", "--config", job).exit_code == 0


@pytest.mark.slow
def test_a_real_process_ends_with_0_when_terminated_and_continues(job: Path) -> None:
    metrics = job.parent / "out" / "metrics.jsonl"
    with forked("train-sae", "run", "--config", job, "--tokens", 2000 * 64) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        # a second command in the folder, meanwhile
        second = invoke("run", "--config", job, "--tokens", 2000 * 64)
        assert second.exit_code == EXIT_TRY_AGAIN
        assert "Another process is writing to" in last_line(second)
        assert "running" in invoke("status", job.parent / "out").stdout
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    assert "the same command continues." in message
    assert invoke("status", job.parent / "out").exit_code == 3


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (SafetensorError("Error: I/O error: No space left on device (os error 28)"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("Error while deserializing header"), False),
    ],
)
def test_what_may_pass_ends_with_75_and_what_may_not_with_1(
    job: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, passes: bool
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(member, "save_checkpoint", fail)
        result = invoke("run", "--config", job)
    assert result.exit_code == (EXIT_TRY_AGAIN if passes else 1)
    assert last_line(result).startswith("Error: Cannot read or write in ")
    assert invoke("run", "--config", job).exit_code == 0


def test_damage_and_divergence_do_not_pass() -> None:
    assert not may_pass(DamagedError("activations/… is altered"))
    assert not may_pass(RunError("Training diverged"))
    wrapped = SaeHarvestError("cannot")
    wrapped.__cause__ = RunError("cannot")
    wrapped.__cause__.__cause__ = OSError(errno.ETIMEDOUT, "timed out")
    assert may_pass(wrapped)


@pytest.mark.slow
def test_a_bucket_out_of_reach_ends_with_75(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    result = invoke("run", "--config", job, "--store", "s3://bucket/store")
    assert result.exit_code == EXIT_TRY_AGAIN, result.stderr
    assert "cannot be reached" in last_line(result)


def test_usage_ends_with_2_and_errors_with_1(job: Path, tmp_path: Path) -> None:
    assert invoke("run", "--config", job, "--k", "0").exit_code == 2
    assert invoke("run", "--config", tmp_path / "none.yaml").exit_code == 2
    assert invoke("run", "--config", job, "--store", tmp_path / "none").exit_code == 1
    assert invoke("status", tmp_path).exit_code == 1
    assert "holds no run" in last_line(invoke("status", tmp_path))


def test_a_run_that_diverged_says_so_in_its_status(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*batch: Any) -> Any:
        raise Diverged("Training diverged at step 1; use a lower --lr.")

    with monkeypatch.context() as patch:
        patch.setattr(member.Learner, "advance", diverge)
        assert invoke("run", "--config", job).exit_code == 1
    status = invoke("status", job.parent / "out")
    assert (status.exit_code, last_line(status).partition(": ")[2]) == (
        1,
        "Training diverged at step 1; use a lower --lr.",
    )


def test_status_tells_a_running_job_and_reads_a_half_written_line(job: Path) -> None:
    assert invoke("run", "--config", job).exit_code == 0
    out = job.parent / "out"
    (out / "evaluation.json").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    with lock(out / LOCK_FILE):
        status = invoke("status", out)
    assert status.exit_code == 3
    assert status.stdout.splitlines()[1].split()[1:5] == ["running", "30", "30", "30"]


def test_eval_measures_any_sae_and_writes_only_where_asked(job: Path, store_path: Path) -> None:
    assert invoke("run", "--config", job).exit_code == 0
    out = job.parent / "out"
    before = sorted(out.rglob("*"))
    shown = invoke("eval", "--sae", out, "--store", store_path, "--device", "cpu")
    assert shown.exit_code == 0, shown.stderr
    assert "without outliers" in shown.stdout
    assert sorted(out.rglob("*")) == before
    path = job.parent / "measured.json"
    invoke("eval", "--sae", out, "--store", store_path, "--device", "cpu", "--out", path)
    assert json.loads(path.read_text()) == json.loads((out / "evaluation.json").read_text())
    refused = invoke("eval", "--sae", store_path, "--store", store_path)
    assert refused.exit_code == 1
    assert "holds no trained SAE" in last_line(refused)


def test_the_template_of_a_run_and_of_a_sweep_are_settings() -> None:
    found = RunSettings(yaml.safe_load((JOBS / "run.yaml").read_text()), "run.yaml", {})
    assert found.places().out == str(Path("runs/gpt2-8/sae").absolute())
    assert (found.config().n_latents, found.config().k) == (24576, 32)
    assert len(read_sweep_file(JOBS / "sweep.yaml", {}).members) == 14


def test_the_template_for_kubernetes_fits_the_command_and_its_codes() -> None:
    settings, kind = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text())
    assert kind["apiVersion"] == "batch/v1"
    spec = kind["spec"]["template"]["spec"]
    assert spec["restartPolicy"] == "Never"  # a failure policy is refused with any other
    (container,) = spec["containers"]
    _, *arguments = container["command"] + container["args"]
    assert arguments[0] in main.commands
    known = {word for option in main.commands["run"].params for word in option.opts}
    assert {word for word in arguments if word.startswith("--")} <= known
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in spec["volumes"]} == set(mounts)
    (file, text) = next(iter(settings["data"].items()))
    assert f"{mounts['config']}/{file}" in arguments
    found = RunSettings(yaml.safe_load(text), file, {})
    assert Path(found.places().out).is_relative_to(mounts["runs"])
    assert found.config().tokens == 100_000_000
    codes = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in kind["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    stopped = int(arguments[arguments.index("--stopped-code") + 1])
    assert codes == {"Ignore": [stopped], "FailJob": [1, 2]}


def script(folder: Path, name: str, text: str) -> None:
    """An executable that stands for a scheduler's."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("code", "turns", "ends", "said"),
    [
        (0, 0, 0, "Finished."),
        (3, 1, 0, "requeue 17"),
        (75, 0, 0, "requeue 17"),
        (1, 0, 1, ""),
        (2, 0, 2, ""),
        (3, 50, 3, "giving up"),
    ],
)
def test_the_template_for_slurm_queues_again_what_is_not_finished(
    tmp_path: Path, code: int, turns: int, ends: int, said: str
) -> None:
    script(tmp_path, "srun", f'echo "$@" > {tmp_path}/called; exit {code}')
    script(tmp_path, "scontrol", 'echo "$@"')
    script(tmp_path, "sleep", "")
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": str(turns),
    }
    command = ["bash", str(JOBS / "slurm.sh"), "run.yaml", "--seed", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (ends, "")
    assert said in done.stdout
    called = (tmp_path / "called").read_text().strip()
    assert called == "train-sae run --config run.yaml --stopped-code 3 --seed 4"


@pytest.mark.parametrize(
    ("codes", "ends", "turns"), [([0], 0, 1), ([75, -9, 0], 0, 3), ([1], 1, 1), ([75] * 9, 1, 4)]
)
def test_the_template_for_ray_submits_again_what_may_pass(
    tmp_path: Path, codes: list[int], ends: int, turns: int
) -> None:
    (tmp_path / "run.yaml").write_text("k: 4\n")
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    script(
        tmp_path,
        "ray",
        f"""cd {tmp_path}
        if [ "$2" = submit ]; then
            echo "$@" >> calls
            head -1 codes > code; sed -i 1d codes
            [ "$(cat code)" = 0 ]
        else
            echo "Job entrypoint command failed with exit code $(cat code), last available logs"
        fi""",
    )
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PAUSE": "0",
        "TURNS": "4",
    }
    command = ["bash", str(JOBS / "ray-job.sh"), str(tmp_path / "run.yaml"), "--seed", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == ends, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == turns
    assert all(call.endswith("-- train-sae run --config run.yaml --seed 4") for call in calls)


@pytest.mark.parametrize("name", ["slurm.sh", "ray-job.sh"])
def test_templates_are_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(JOBS / name)], check=True)


def test_every_setting_of_a_run_is_an_option() -> None:
    options = {param.name for param in main.commands["run"].params}
    assert {setting.parameter for setting in RunSettings.settings()} < options
