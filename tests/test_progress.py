"""Every long command says how far it is: on a terminal by a bar, elsewhere by a line a minute."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sae_harvest.common import console
from sae_harvest.common.console import Commands, Progress, Terminated, when_interrupted
from sae_harvest.harvest.commands.cli import main as harvest_main
from sae_harvest.pipelines.evaluate.cli import main as train_main
from sae_harvest.pipelines.features.commands.cli import main as features_main
from tests.commands import options
from tests.feature_cases import save_sae

LINE = re.compile(r"(\w+( \w+)?)( [\d,]+ of [\d,]+( \w+)?)?(, [\d,.]+ \S+/s)?, \d+ min so far")


@pytest.fixture
def quick_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of progress come a thousand times a second."""
    monkeypatch.setattr(console, "LINE_SECONDS", 0.001)


def lines(command: click.Command, *arguments: object) -> list[str]:
    """Lines of progress of a command that ends well, none of them of another form."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    told = result.stderr.splitlines()
    assert [line for line in told if not LINE.fullmatch(line)] == []
    return told


@pytest.mark.usefixtures("quick_lines")
def test_long_commands_print_lines_without_a_terminal(
    folders: tuple[Path, Path, Path], model_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    store, sae, features = folders
    short = options(model_folder, corpus_file, tmp_path / "store", tokens=1024)
    told = {
        "harvesting": lines(harvest_main, *short),
        "verifying": lines(harvest_main, "verify", "--store", store),
        "repairing|preparing": lines(harvest_main, "verify", "--store", store, "--repair"),
        "merging": lines(harvest_main, "merge", "--into", tmp_path / "all", store),
        "exporting": lines(
            harvest_main, "export", "--store", store, "--out", tmp_path / "rows",
            "--format", "parquet",
        ),
        "evaluating": lines(
            train_main, "eval", "--sae", sae, "--store", store, "--device", "cpu"
        ),
        "encoding": lines(
            features_main, "build", "--store", store, "--sae", save_sae(store, tmp_path / "sae"),
            "--out", tmp_path / "features", "--device", "cpu",
        ),
        "writing": lines(
            features_main, "export", "--features", features, "--format", "openai",
            "--out", tmp_path / "openai", "--latents", "0-9",
        ),
        "writing pages": lines(
            features_main, "site", "--features", features, "--out", tmp_path / "site"
        ),
    }  # fmt: skip
    for phase, printed in told.items():
        assert any(re.match(phase, line) for line in printed), (phase, printed)


@pytest.mark.usefixtures("quick_lines")
def test_lines_go_on_while_nothing_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tokens") as progress:
        time.sleep(0.03)
        progress("harvesting", 1234, 5678, "9 tokens/s")
        time.sleep(0.03)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "preparing, 0 min so far"
    assert told[-1] == "harvesting 1,234 of 5,678 tokens, 9 tokens/s, 0 min so far"


def test_a_short_command_prints_no_progress_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress("rows") as progress:
        progress("exporting", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.001)
    parent, child = pty.openpty()
    drawn = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal is closed
            while data := os.read(parent, 1 << 16):
                drawn.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with Progress("rows") as progress:
            progress("exporting", 1, 2)
            time.sleep(0.02)
    reader.join()
    os.close(parent)
    assert "1/2" in drawn.decode()
    assert "min so far" not in drawn.decode()


def test_a_rate_is_told_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = Progress("tokens")
    report = progress.counting("harvesting", lambda speed: f"{speed:,.0f} tokens/s")
    report(500, 9000)
    assert progress.latest == ("harvesting", 500, 9000, "")
    now[0] += 10
    report(1500, 9000)
    assert progress.latest == ("harvesting", 1500, 9000, "100 tokens/s")


def test_bars_of_libraries_are_off_in_our_commands() -> None:
    """A GGUF file is converted under a bare tqdm, weights load under transformers' own."""
    code = (
        "import sae_harvest.common.console, tqdm.auto\n"
        "list(tqdm.auto.tqdm(range(3), desc='Converting'))\n"
        "import huggingface_hub.utils as hub\n"
        "assert hub.are_progress_bars_disabled()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in console.QUIET_LIBRARIES}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def raising(error: type[BaseException], kept: str | Callable[[], str]) -> click.Command:
    @click.group(cls=Commands)
    def main() -> None:
        pass

    @main.command()
    def work() -> None:
        with when_interrupted("Said by the outer block."), when_interrupted(kept):
            raise error

    return main


def test_an_interrupted_command_says_what_is_kept() -> None:
    kept = "3 shards committed in runs/s; the same command continues."
    result = CliRunner().invoke(raising(KeyboardInterrupt, kept), ["work"])
    assert (result.exit_code, result.stderr) == (130, f"Interrupted. {kept}\n")
    result = CliRunner().invoke(raising(KeyboardInterrupt, lambda: kept), ["work"])
    assert (result.exit_code, result.stderr) == (130, f"Interrupted. {kept}\n")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, Terminated])
def test_a_sigterm_is_told_from_ctrl_c_whatever_a_library_makes_of_it(
    raised: type[KeyboardInterrupt],
) -> None:
    """Ray raises KeyboardInterrupt where a signal's handler raised something else."""

    @click.group(cls=Commands)
    def main() -> None:
        pass

    @main.command()
    def work() -> None:
        with when_interrupted("All is kept."):
            try:
                signal.raise_signal(signal.SIGTERM)
            except Terminated:
                raise raised from None

    result = CliRunner().invoke(main, ["work"])
    assert (result.exit_code, result.stderr) == (143, "Terminated. All is kept.\n")
