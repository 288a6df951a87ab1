"""Notes and tags: whose they are, and that they stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.viewer.notes import NOTES_FILE, Notes


def test_notes_and_tags_are_those_of_one_sae(tmp_path):
    notes = Notes.beside(tmp_path, "one")
    assert notes.get(3) == {"note": "", "tags": []}
    assert notes.put(3, "a <b>note</b>\x00", [" law ", "law", "", "café"]) == {
        "note": "a <b>note</b>\x00",
        "tags": ["café", "law"],
    }
    notes.put(1, "", ["law"])
    assert list(notes.noted()) == [1, 3]
    assert Notes.beside(tmp_path, "two").noted() == {}
    assert notes.put(3, "  ", []) == {"note": "", "tags": []}
    assert list(notes.noted()) == [1]
    with pytest.raises(InputError, match="at most 20,000 characters, this one has 20,001"):
        notes.put(3, "a" * 20_001, [])
    with pytest.raises(InputError, match="at most 20 tags"):
        notes.put(3, "", ["a" * 41])


def test_notes_of_a_folder_that_cannot_be_written_are_kept_beside_it(tmp_path, monkeypatch):
    features = tmp_path / "features"
    features.mkdir()
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != features
    )  # root may write anywhere
    notes = Notes.beside(features, "sae")
    assert notes.path == tmp_path / f"features.{NOTES_FILE}"
    notes.put(1, "kept", [])
    assert not list(features.iterdir())


def test_a_damaged_file_of_notes_is_named(tmp_path):
    (tmp_path / NOTES_FILE).write_bytes(b"not a database, and long enough to be seen as none" * 9)
    with pytest.raises(RunError, match=NOTES_FILE):
        Notes.beside(tmp_path, "sae").get(1)


def test_what_was_saved_survives_a_kill(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from sae_harvest.pipelines.viewer.notes import Notes\n"
        "notes = Notes.beside(Path(sys.argv[1]), 'sae')\n"
        "for n in range(10**6):\n"
        "    notes.put(n, f'note {n}', ['tag'])\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = -1
    for line in process.stdout:
        said = int(line)
        if said == 5:
            process.send_signal(signal.SIGKILL)
    process.wait()
    kept = Notes.beside(tmp_path, "sae").noted()
    assert set(range(said + 1)) <= set(kept)
    for latent, entry in kept.items():  # a note never without its tag
        assert entry == {"note": f"note {latent}", "tags": ["tag"]}


def test_writers_wait_for_each_other(tmp_path):
    notes = Notes.beside(tmp_path, "sae")

    def write(first):
        for n in range(first, first + 8):
            notes.put(n, f"note {n}", [])

    threads = [threading.Thread(target=write, args=(8 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(notes.noted()) == list(range(32))


def test_an_empty_file_of_notes_is_no_notes(tmp_path):
    (tmp_path / NOTES_FILE).touch()
    notes = Notes.beside(tmp_path, "sae")
    assert notes.get(1) == {"note": "", "tags": []}
    assert notes.noted() == {}
    notes.put(1, "kept", [])
    assert notes.get(1)["note"] == "kept"
