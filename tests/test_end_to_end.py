"""From a store to a latent on the screen, typed in a user's own folder, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import dead_network, locked_checkout

pytestmark = pytest.mark.slow

PACKAGES = ("harvest", "store", "train", "pipelines")


def type_in(folder: Path, command: str, *arguments: object, env: dict[str, str]) -> str:
    """Standard output of an installed command run in `folder`; it must succeed."""
    program = Path(sys.executable).parent / command
    result = subprocess.run(
        [program, *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder whose files bear our packages' names, and fail when imported."""
    folder = tmp_path_factory.mktemp("thesis")
    for name in PACKAGES:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('the user’s own {name}.py')\n")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No network, and a checkout that is read only: the packages are copied and locked."""
    checkout = locked_checkout(tmp_path_factory.mktemp("copy"))
    return dead_network() | checkout | {"PYTHONDONTWRITEBYTECODE": "1"}


def test_train_build_show_and_query(
    folder: Path, environment: dict[str, str], tiny_store: Path
) -> None:
    shape = ("--n-latents", 64, "--k", 4, "--tokens", 8192, "--batch-rows", 256)
    train = ("run", "--store", tiny_store, "--out", "sae", *shape)
    assert "FVU" in type_in(folder, "train-sae", *train, env=environment)
    build = ("build", "--store", tiny_store, "--sae", "sae", "--out", "features")
    assert "features: 64 latents" in type_in(folder, "sae-features", *build, env=environment)
    sql = "SELECT latent FROM latents WHERE NOT dead ORDER BY n_fire DESC LIMIT 1"
    found = type_in(folder, "sae-features", "query", sql, "--features", "features", env=environment)
    latent = int(found.split()[-1])
    shown = type_in(
        folder, "sae-features", "show", latent, "--features", "features", env=environment
    )
    assert f"latent {latent}" in shown
    assert "top contexts" in shown
    checkout = Path(environment["PYTHONPATH"])
    assert not [p for p in checkout.rglob("*") if "__pycache__" in p.parts]


def test_commands_come_from_the_copy(environment: dict[str, str], folder: Path) -> None:
    # Otherwise the read-only copy above would prove nothing.
    printed = subprocess.run(
        [sys.executable, "-P", "-c", "import sae_harvest; print(sae_harvest.__file__)"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.startswith(environment["PYTHONPATH"])
