"""Files are whole or absent, and have the mode that the user's umask says."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae_harvest.common.atomic import making, replacing, write_text
from sae_harvest.common.errors import RunError
from sae_harvest.store.objects import LocalObjects
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.run.checkpoint import save_checkpoint
from sae_harvest.train.run.files import write_json, write_tensors
from sae_harvest.train.sae.formats import export_sae
from sae_harvest.train.sae.formats.pickles import write_pt
from sae_harvest.train.sae.sae import SAE


@pytest.fixture(params=[0o022, 0o002, 0o077])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode that new files have under the umask that is set meanwhile."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_the_umask_decides_the_mode_of_every_file(tmp_path: Path, mode: int) -> None:
    write_text(tmp_path / "text", "a")
    write_json(tmp_path / "json", {})
    write_tensors(tmp_path / "sae.safetensors", {"a": torch.zeros(3)})
    write_pt(tmp_path / "ae.pt", {"a": torch.zeros(3)})
    objects = LocalObjects(tmp_path)
    objects.publish("published", [b"a"])
    objects.replace("replaced", [b"a"])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(modes, mode)
    assert len(modes) == 6


@pytest.mark.parametrize("mode", [0o077, 0o002], indirect=True)
def test_the_umask_decides_for_saes_checkpoints_and_exports(
    tmp_path: Path, mode: int, unflushed: None
) -> None:
    sae = SAE(
        SAEConfig(d_in=4, n_latents=6, k=2, site="resid_post.1"),
        *(torch.ones(6, 4), torch.ones(6, 4), torch.zeros(6), torch.zeros(4)),
    )
    sae.save(tmp_path / "sae")
    save_checkpoint(tmp_path, 1, sae, {"last_fired": torch.zeros(6).long()}, {})
    for name in ("saelens", "sparsify", "dictionary_learning"):
        export_sae(tmp_path / "sae", name, tmp_path / name)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 + 4 + 3 * 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"Cannot write .*file .*No space left") as refused:
        fail()
    assert isinstance(refused.value.__cause__, OSError)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "file", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match=r"\ACannot write [^\n]*\.\Z"):
            write_text(path, "a")
    write_text(tmp_path / "file", "a")
    with pytest.raises(RunError, match=r"\ACannot write [^\n]*\.\Z"):
        write_json(tmp_path / "file" / "below", {})


def test_a_file_is_flushed_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    replace = Path.replace

    def flush(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    def rename(self: Path, target: Path) -> Path:
        steps.append((self, target))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    write_text(tmp_path / "file", "a")
    temporary = tmp_path / ".file.tmp"
    assert steps == [temporary, (temporary, tmp_path / "file"), tmp_path]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    left = tmp_path / ".out.tmp"
    left.mkdir()
    (left / "old").touch()  # of a process that was killed

    def make(fail: bool) -> None:
        with making(tmp_path / "out") as temporary:
            assert temporary == left
            assert not temporary.exists()
            temporary.mkdir()
            (temporary / "new").touch()
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(fail=True)
    assert list(tmp_path.iterdir()) == []
    make(fail=False)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [
        Path("out"),
        Path("out/new"),
    ]
