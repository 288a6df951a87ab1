"""One process at a time holds a folder, and a process that is gone holds none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from sae_harvest.common import locks
from sae_harvest.common.errors import RunError
from sae_harvest.common.locks import LOCK_FILE, HeldError, claimed, is_held, lock

HOLDER = """
import sys, time
from pathlib import Path
from sae_harvest.common.locks import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def enter(path: Path) -> None:
    with lock(path):
        pass


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    assert not is_held(path)
    assert not path.exists()
    with lock(path):
        assert is_held(path)
        with pytest.raises(HeldError):
            enter(path)
    assert not is_held(path)
    enter(path)


def test_a_waiting_process_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    path, order = tmp_path / "a.lock", list[str]()

    def second() -> None:
        with lock(path, wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with lock(path):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_held(path)
        process.kill()
        process.wait()
    assert not is_held(path)
    enter(path)


@pytest.mark.parametrize("code", locks.NO_LOCKS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*arguments: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with claimed(tmp_path / "out", "run.json"):
        assert is_held(tmp_path / "out" / LOCK_FILE)  # nobody can tell


def claim(out: Path) -> None:
    with claimed(out, "run.json"):
        pass


def test_a_folder_is_claimed_by_its_record_or_while_it_is_free(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    claim(out)
    assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    (out / ".run.json.tmp").touch()  # of a process that was killed at its start
    claim(out)
    (out / "notes.txt").touch()
    with pytest.raises(RunError, match=r"out holds other files and no run\.json; choose another"):
        claim(out)
    (out / "run.json").touch()
    claim(out)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file holds other files"):
        claim(tmp_path / "file")


def test_a_folder_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path, "run.json"):
        with pytest.raises(RunError, match=r"\AAnother process is writing to [^\n]*--out\.\Z"):
            claim(tmp_path)
        with pytest.raises(RunError, match=r"\Abusy\Z"), claimed(tmp_path, "a", "foreign", "busy"):
            pass
    (tmp_path / "b").touch()
    with pytest.raises(RunError, match=r"\Aforeign\Z"), claimed(tmp_path, "a", "foreign", "busy"):
        pass
