"""`harvest verify --repair` makes exactly what is damaged again, and the store is what it was."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from sae_harvest.common.errors import DamagedError
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.records import encode_record
from tests.commands import digest_of, invoke, options, refusal, wait_for
from tests.faulty_disk import FaultyDisk, Killed, faulty
from tests.forked import forked
from tests.test_faults import assert_whole
from tests.test_grow import inodes

SITE = "resid_post.1"
OBJECTS = (
    "activations/resid_post.1/c.{}.0",
    "norms/resid_post.1/c.{}",
    "tokens/c.{}.0",
    "contexts/{:06d}.parquet",
    "documents/{:06d}.parquet",
    "commits/{:06d}.json",
)
METADATA = ("seals/000008.json", "zarr.json", "activations/resid_post.1/zarr.json", "status.json")
REPAIR = ("verify", "--repair", "--workers", 0)

Harm = Callable[[Path], object]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def delete(path: Path) -> None:
    path.unlink()


HARMS: tuple[Harm, ...] = (flip, cut, delete)


@pytest.fixture
def sealed(tmp_path: Path, tiny_store: Path) -> Path:
    """A copy of the fixture store, with the heartbeat of a harvest that was killed."""
    path = Path(shutil.copytree(tiny_store, tmp_path / "sealed"))
    (path / "status.json").write_bytes(encode_record({"pid": 1}))
    return path


@pytest.fixture
def digest(tiny_store: Path) -> str:
    return ActivationStore.open(tiny_store).digest


def of_shards(keys: dict[str, tuple[int, int]], shards: tuple[int, ...]) -> set[str]:
    """Keys of objects of some shards."""
    return {
        key for key in keys for shard in shards for name in OBJECTS if key == name.format(shard)
    }


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_damaged_is_made_again_and_nothing_else(
    sealed: Path, digest: str, name: str, harm: Harm
) -> None:
    before = inodes(sealed)
    damaged = {name.format(shard) for shard in (2, 5)}
    for key in damaged:
        harm(sealed / key)
    found = verify(LocalObjects(sealed), lambda done, total: None).damage
    assert {item.key for item in found} == damaged
    result = invoke(*REPAIR, "--store", sealed)
    assert result.exit_code == 0, result.output
    assert "2 damaged objects" in result.stdout
    assert f"Digest {digest}." in result.stdout
    for key in damaged:
        assert re.search(rf"{sealed}/{key} (is|has) ", result.stderr)
    assert_whole(sealed, digest)
    after = inodes(sealed)
    assert {key for key in before if after[key] != before[key]} <= damaged
    assert of_shards(after, (2, 5)) == of_shards(before, (2, 5))


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_written_again_without_a_model(
    sealed: Path, digest: str, name: str, harm: Harm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sae_harvest.harvest.run.driver.prepare_again", lambda *_: pytest.fail("no model is needed")
    )
    before = inodes(sealed)
    harm(sealed / name)
    result = invoke(*REPAIR, "--store", sealed)
    if (harm, name) == (delete, "seals/000008.json"):  # shards without a seal: not finished
        assert "Not sealed yet." in result.stdout
        return
    assert result.exit_code == 0, result.output
    assert_whole(sealed, digest)
    after = inodes(sealed)
    assert {key for key in before if key != name and after[key] != before[key]} == set()


@pytest.mark.parametrize("harm", HARMS)
def test_the_plan_is_restored_from_a_seal(sealed: Path, digest: str, harm: Harm) -> None:
    harm(sealed / "plan.json")
    assert "plan.json" in refusal(invoke("verify", "--store", sealed))
    assert invoke(*REPAIR, "--store", sealed).exit_code == 0
    assert_whole(sealed, digest)


def test_a_plan_without_any_seal_to_restore_it_from_is_refused(sealed: Path) -> None:
    (sealed / "seals/000008.json").unlink()
    flip(sealed / "plan.json")
    before = inodes(sealed)
    assert "Nothing is sealed" in refusal(invoke(*REPAIR, "--store", sealed))
    (sealed / "plan.json").unlink()
    assert "holds no activation store" in refusal(invoke(*REPAIR, "--store", sealed))
    assert inodes(sealed).items() <= before.items()


def test_a_store_ruined_all_over_is_mended(sealed: Path, digest: str) -> None:
    for number, name in enumerate(OBJECTS):
        for shard in (number, number + 1):
            HARMS[1 + (number + shard) % 2](sealed / name.format(shard))
    for name in ("plan.json", "zarr.json", "status.json"):
        flip(sealed / name)
    assert invoke(*REPAIR, "--store", sealed).exit_code == 0
    assert_whole(sealed, digest)


def test_a_seal_that_is_gone_comes_back_with_the_same_command(
    sealed: Path, digest: str, model_folder: Path, corpus_file: Path
) -> None:
    (sealed / "seals/000008.json").unlink()
    assert "Not sealed yet." in invoke("verify", "--store", sealed).stdout
    result = invoke(*options(model_folder, corpus_file, sealed, tokens=8192))
    assert "0 of them now" in result.stdout
    assert digest_of(result) == digest


def test_a_store_without_damage_is_left_as_it_is(sealed: Path, digest: str) -> None:
    before = inodes(sealed)
    result = invoke(*REPAIR, "--store", sealed)
    assert f"{sealed}: 0 damaged objects; shards harvested again: none." in result.stdout
    assert f"Digest {digest}." in result.stdout
    assert inodes(sealed) == before


@pytest.mark.parametrize("changed", ["model", "corpus", "no model", "no corpus"])
def test_a_model_or_corpus_that_changed_is_refused_and_nothing_is_removed(
    tmp_path: Path, model_folder: Path, corpus_file: Path, changed: str
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    corpus = Path(shutil.copy(corpus_file, tmp_path / "corpus.jsonl"))
    path = tmp_path / "store"
    digest_of(invoke(*options(model, corpus, path, tokens=2048)))
    flip(path / OBJECTS[0].format(1))
    before = inodes(path)
    if changed == "model":
        spoil(model)
    elif changed == "corpus":
        corpus.write_text(corpus.read_text() + json.dumps({"text": "one more"}) + "\n")
    elif changed == "no model":
        shutil.rmtree(model)
    else:
        corpus.unlink()
    message = refusal_on_repair(path)
    if changed in ("model", "corpus"):
        assert f"The sources of the store have changed: {changed}." in message
    else:
        assert str(model if changed == "no model" else corpus) in message
    assert inodes(path) == before


def spoil(model: Path) -> None:
    """Other weights of the same shape."""
    import torch
    from transformers import GPT2LMHeadModel

    loaded = GPT2LMHeadModel.from_pretrained(model)
    with torch.no_grad():
        loaded.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    loaded.save_pretrained(model)


def refusal_on_repair(path: Path) -> str:
    return refusal(invoke(*REPAIR, "--store", path))


@pytest.mark.slow
def test_a_repair_killed_midway_is_done_again(tmp_path: Path, sealed: Path, digest: str) -> None:
    for number in range(8):
        flip(sealed / OBJECTS[number % 3].format(number))
        delete(sealed / OBJECTS[3 + number % 3].format(number))
    gone = sealed / OBJECTS[0].format(0)
    with forked("harvest", *REPAIR, "--store", sealed) as process:
        assert wait_for(lambda: not gone.exists() or process.poll() is not None)
        time.sleep(0.02)
        process.kill()
    assert invoke(*REPAIR, "--store", sealed).exit_code == 0
    assert_whole(sealed, digest)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["replace", "link", "unlink"])
def test_a_repair_that_dies_at_any_change_is_done_again(
    tmp_path: Path, sealed: Path, digest: str, unflushed: None, function: str
) -> None:
    """Dies before the n-th change of the store, for every n."""
    flip(sealed / OBJECTS[0].format(3))
    delete(sealed / OBJECTS[5].format(3))
    cut(sealed / OBJECTS[3].format(6))
    flip(sealed / "plan.json")
    for nth in count(1):
        path = Path(shutil.copytree(sealed, tmp_path / f"{nth}"))
        with faulty(FaultyDisk(function, nth)) as disk, suppress(Killed):
            result = invoke(*REPAIR, "--store", path)
            assert not isinstance(result.exception, Exception), result.exception
        if disk.count < nth:  # it came to its end
            break
        with suppress(DamagedError):  # as long as plan.json is not restored
            report = verify(LocalObjects(path), lambda done, total: None)
            assert report.digest in (None, digest)
        assert invoke(*REPAIR, "--store", path).exit_code == 0
        assert_whole(path, digest)
        shutil.rmtree(path)
    assert nth >= 2


@pytest.mark.parametrize("name", [f"exact/{SITE}/000001.parquet", f"quantization/{SITE}/c.1.0.0"])
@pytest.mark.parametrize("harm", HARMS)
def test_quantized_rows_are_mended_together_with_what_they_were_made_with(
    tmp_path: Path, model_folder: Path, corpus_file: Path, name: str, harm: Harm
) -> None:
    path = tmp_path / "store"
    arguments = options(model_folder, corpus_file, path, tokens=3072, dtype="int8")
    digest = digest_of(invoke(*arguments))
    before = inodes(path)
    harm(path / name)
    assert invoke(*REPAIR, "--store", path).exit_code == 0
    assert_whole(path, digest)
    after = inodes(path)
    assert {key for key in before if before[key] != after[key]} == {
        name,
        f"activations/{SITE}/c.1.0",
    }
