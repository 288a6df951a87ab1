"""A cache folder that cannot be written, or is full, or has no home to be in, stops nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import Result

from sae_harvest.common import cache
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run import log
from tests.commands import digest_of, invoke, options

UNWRITABLE = "/proc/nobody"  # not even root can make it


@pytest.fixture(autouse=True)
def without_a_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable names a cache folder; what is known of folders is forgotten, before and after."""
    for name in ("SAE_HARVEST_CACHE", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    cache._writable.cache_clear()
    yield
    cache._writable.cache_clear()


def notes(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("Note: ")]


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME", "SAE_HARVEST_CACHE"])
def test_a_harvest_needs_no_cache_folder(
    variable: str,
    model_folder: Path,
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, UNWRITABLE)
    arguments = options(model_folder, corpus_file, tmp_path / "store", tokens=1024)
    result = invoke(*arguments)
    digest_of(result)
    [note] = notes(result)
    assert note.startswith(f"Note: {UNWRITABLE}")
    assert "logs are not kept; set SAE_HARVEST_CACHE to a folder that can be." in note
    status = invoke("status", "--store", tmp_path / "store")
    assert "Log:" not in status.stdout
    assert status.exit_code == 0


def test_a_process_without_any_home_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    folder = cache.cache_dir()
    assert folder.is_dir()
    assert cache.kept_cache_dir() is None
    assert log.log_path("/runs/store") is None


def test_the_note_is_printed_once_and_the_folder_goes_with_the_process() -> None:
    code = (
        "from sae_harvest.common.cache import cache_dir, use_numba_cache\n"
        "use_numba_cache(); use_numba_cache(); print(cache_dir())\n"
        "(cache_dir() / 'models').mkdir()\n"
    )
    environment = os.environ | {"HOME": UNWRITABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("Note: ") == 1
    assert not Path(done.stdout.strip()).exists()


class FullDisk:
    """A file of a disk on which nothing has room any more."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_cache_folder_is_like_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("SAE_HARVEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert cache.cache_dir() != tmp_path / "cache"
    told = capsys.readouterr().err
    assert f"{tmp_path / 'cache'} cannot be written (No space left on device)" in told
    assert told.count("\n") == 1


def test_a_log_whose_disk_fills_up_is_given_up_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAE_HARVEST_CACHE", str(tmp_path))
    with log.HarvestLog("/runs/store") as kept:
        kept.write("begun")
        whole: IO[str] | None
        whole, kept._file = kept._file, FullDisk()  # type: ignore[assignment]
        kept.write("lost")
        kept.write("lost as well")
    assert whole is not None
    whole.close()
    assert kept.path is not None
    assert kept.path.read_text().endswith("begun\n")
    assert capsys.readouterr().err == (
        f"Note: the log {kept.path} cannot be written (No space left on device); the harvest "
        "continues without it.\n"
    )


def test_a_log_folder_that_is_a_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAE_HARVEST_CACHE", str(tmp_path))
    (tmp_path / "logs").touch()
    with log.HarvestLog("/runs/store") as kept:
        kept.write("nowhere")
    assert "the harvest continues without it" in capsys.readouterr().err


def test_no_folder_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_usable(**_: Any) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setenv("SAE_HARVEST_CACHE", UNWRITABLE)
    monkeypatch.setattr(cache.tempfile, "mkdtemp", none_usable)
    with pytest.raises(InputError, match=r"and no temporary folder either .*set SAE_HARVEST_CACHE"):
        cache.cache_dir()


def test_compiled_kernels_go_where_they_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", UNWRITABLE)
    cache.use_numba_cache()
    assert os.environ["NUMBA_CACHE_DIR"] != UNWRITABLE
    assert Path(os.environ["NUMBA_CACHE_DIR"]).is_dir()
