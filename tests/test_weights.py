"""A model's folder whose weights are damaged or lead elsewhere is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.models import resolve_model
from sae_harvest.harvest.model.weights import weights_hash
from tests.commands import invoke, options, refusal
from tests.hostile import outcome

INDEX = "model.safetensors.index.json"


def write_index(folder: Path, content: object) -> None:
    """Makes the folder one with several files, as large models have."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": {"w": "../secret.safetensors"}},
        {"weight_map": {"w": "/etc/passwd"}},
        {"weight_map": {"w": "a\0b"}},
        {"weight_map": {"w": 3}},
        {"weight_map": {"w": ["model-1.safetensors"]}},
        {"weight_map": {"w": "model-2.safetensors"}},
        {"weight_map": 3},
        {},
        [],
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_an_index_that_leads_elsewhere_or_nowhere_is_refused(folder: Path, content: object) -> None:
    write_index(folder, content)
    with pytest.raises(InputError, match="index"):
        resolve_model(str(folder))
    assert outcome(lambda: resolve_model(str(folder))) is None


def test_an_index_of_files_that_are_there_is_taken(folder: Path) -> None:
    write_index(folder, {"weight_map": {"w": "model-1.safetensors"}})
    assert resolve_model(str(folder)).kind == "directory"


def remove_target(file: Path) -> None:
    file.with_name("model-extra.safetensors").symlink_to(file.with_name("nowhere"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def make_nonsense(file: Path) -> None:
    file.write_bytes(b"[" * 100_000)


def make_folder(file: Path) -> None:
    file.with_name("model-extra.safetensors").mkdir()


@pytest.mark.parametrize("damage", [remove_target, cut, make_nonsense, make_folder])
def test_weights_that_cannot_be_read_end_a_harvest_in_one_sentence(
    folder: Path, corpus_file: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(folder / "model.safetensors")
    result = invoke(*options(folder, corpus_file, tmp_path / "store"))
    assert "model" in refusal(result)


def test_the_hash_is_of_names_and_bytes(folder: Path) -> None:
    before = weights_hash(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    assert weights_hash(folder) != before
