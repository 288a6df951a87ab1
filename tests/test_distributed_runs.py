"""Runs of several processes: their files are those of one, and any number of them goes on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

import sae_harvest.train.parallel.checkpoint_shards as slices
from sae_harvest.common.errors import InputError, RunError, SaeHarvestError
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.distributed import group_of
from sae_harvest.train.run.checkpoint import load_checkpoint, save_checkpoint, saved_steps
from sae_harvest.train.run.exit_codes import may_pass
from sae_harvest.train.run.trainer import train
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.sae.sharded_sae import digest_of
from tests.processes import CPU, answers, start, together
from tests.synthetic import make_plan, make_store
from tests.test_learner import KINDS, begin, config_of, data

STEPS, SAVED_EVERY = 40, 10
CONFIG = TrainConfig(
    n_latents=97,  # divided by nothing
    k=4,
    tokens=STEPS * 128,
    batch_rows=128,
    dead_after_tokens=256,  # so few that AuxK takes part
    checkpoint_every=SAVED_EVERY,
    lr=1e-3,
)
STATE = {"total_variance": 1.0, "loader": {"epoch": 0, "step": 1}}  # of a checkpoint


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed") / "store"
    make_store(path, make_plan(width=8))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store_path: Path) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "sae"
    train(CONFIG, store_path, out, device="cpu")
    return out


def run(parallel, store, out, config=CONFIG):
    """A process of a run; what it ended with: steps, or a sentence and whether it may pass."""
    group = group_of(parallel, config.n_latents, config.batch_rows, CPU)
    try:
        return train(config, store, out, device="cpu", group=group).steps
    except SaeHarvestError as error:
        return str(error), may_pass(error)


def assert_equal(out: Path, expected: Path) -> None:
    """Two finished runs have the same dictionary to 1e-5, and the same files."""
    for name in ("sae.safetensors", f"checkpoints/{STEPS:06d}/optimizer.safetensors"):
        found, wanted = load_file(out / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)
    for name in ("config.json", "run.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert saved_steps(out) == saved_steps(expected)
    found, wanted = (json.loads((path / "evaluation.json").read_text()) for path in (out, expected))
    assert found.pop("sae_digest") == SAE.load(out).digest
    assert found.keys() == wanted.keys() - {"sae_digest"}
    for group in ("without_outliers", "with_outliers"):
        assert found[group] == pytest.approx(wanted[group], rel=1e-4)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def save_again(parallel, out, n_latents, into):
    """Writes a checkpoint that was read, in every process of a group."""
    group = group_of(parallel, n_latents, 12, CPU)
    [step] = saved_steps(out)
    found = load_checkpoint(out, step, "cpu", group)
    state = {key: value for key, value in found.state.items() if key not in ("step", "xxh3")}
    save_checkpoint(into, step, found.sae, found.tensors, state, n_latents, group)
    return len(found.sae.W_enc)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by one process, of dictionaries with all the tensors there are."""
    found = {}
    for kind in ("topk", "jumprelu", "gated", "transcoder"):
        fields = KINDS.get(kind, {"k": 4, "target_site": "mlp_out.1"})
        learner = begin(config_of(n_latents=94, **fields))
        for name, tensor in learner.tensors().items():  # no two rows alike
            if not name.startswith("average"):
                tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
        found[kind] = tmp_path_factory.mktemp(kind)
        save_checkpoint(found[kind], 1, learner.sae, learner.tensors(), STATE)
    return found


@pytest.mark.parametrize("parallel", ["data", "latents"])
def test_checkpoints_of_several_processes_are_the_bytes_of_one(tmp_path, checkpoints, parallel):
    for kind, out in checkpoints.items():
        parts = together(save_again, 3, parallel, out, 94, tmp_path / kind)
        assert parts == ([94] * 3 if parallel == "data" else [31, 31, 32])
        for path in (out / "checkpoints" / "000001").iterdir():
            again = tmp_path / kind / "checkpoints" / "000001" / path.name
            assert again.read_bytes() == path.read_bytes(), path


def load_damaged(parallel, out, n_latents):
    try:
        load_checkpoint(out, 1, "cpu", group_of(parallel, n_latents, 12, CPU))
    except RunError as error:
        return str(error)


@pytest.mark.parametrize("name", ["sae.safetensors", "state.json"])
def test_every_process_names_a_damaged_file(tmp_path, checkpoints, name):
    shutil.copytree(checkpoints["topk"], tmp_path / "sae")
    path = tmp_path / "sae" / "checkpoints" / "000001" / name
    path.write_bytes(path.read_bytes()[:-100] + b"x" * 100)
    sentences = together(load_damaged, 2, "latents", tmp_path / "sae", 94)
    assert all(name in sentence for sentence in sentences)
    assert "delete that folder to go on from the start" in sentences[0]


def test_large_files_are_hashed_in_pieces_that_do_not_depend_on_processes(
    tmp_path, checkpoints, monkeypatch
):
    monkeypatch.setattr(slices, "HASH_BYTES", 1000)
    learner = begin(config_of(k=4))
    save_checkpoint(tmp_path, 1, learner.sae, learner.tensors(), STATE)
    state = load_checkpoint(tmp_path, 1, "cpu").state
    path = tmp_path / "checkpoints" / "000001" / "sae.safetensors"
    data = path.read_bytes()
    pieces = [data[first : first + 1000] for first in range(0, len(data), 1000)]
    digests = b"".join(xxhash.xxh3_128(piece).digest() for piece in pieces)
    assert state["xxh3"]["sae.safetensors"] == xxhash.xxh3_128(digests).hexdigest()
    small = json.loads((checkpoints["topk"] / "checkpoints" / "000001" / "state.json").read_text())
    whole = (checkpoints["topk"] / "checkpoints" / "000001" / "sae.safetensors").read_bytes()
    assert small["xxh3"]["sae.safetensors"] == xxhash.xxh3_128(whole).hexdigest()


def killed_in_the_middle(store: Path, out: Path, parallel: str, world: int) -> list:
    """What the processes of a run end with when the last of them is killed; None for that one."""
    started = start(run, world, parallel, store, out)
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > STEPS // 2):
        time.sleep(0.01)
        assert all(process.is_alive() for process, _ in started)
    started[-1][0].kill()
    killed = time.monotonic()
    found = answers(started)
    assert time.monotonic() - killed < 60
    return found


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["latents", "data"])
def test_a_run_that_lost_a_process_goes_on_with_fewer(tmp_path, store_path, alone, parallel):
    *others, killed = killed_in_the_middle(store_path, tmp_path / "4", parallel, 4)
    assert killed is None
    for sentence, try_again in others:
        assert "has ended or no longer answers" in sentence
        assert try_again
    saved = saved_steps(tmp_path / "4")
    assert saved
    assert saved[-1] < STEPS
    assert not (tmp_path / "4" / "failed.json").exists()
    # by the other way of division, and by one process
    shutil.copytree(tmp_path / "4", tmp_path / "1")
    other = {"latents": "data", "data": "latents"}[parallel]
    assert together(run, 2, other, store_path, tmp_path / "4") == [STEPS] * 2
    assert_equal(tmp_path / "4", alone)
    train(CONFIG, store_path, tmp_path / "1", device="cpu")
    assert_equal(tmp_path / "1", alone)
    # a finished run, asked for again, has nothing to do
    before = (tmp_path / "4" / "evaluation.json").stat().st_mtime_ns
    assert together(run, 3 if other == "latents" else 2, other, store_path, tmp_path / "4")
    assert (tmp_path / "4" / "evaluation.json").stat().st_mtime_ns == before


def test_a_folder_that_is_not_shared_is_refused(tmp_path, store_path):
    found = together(run_in_own_folder, 2, store_path, tmp_path)
    assert "is not the same folder on every machine" in found[0][0]
    assert "is not the same folder on this machine" in found[1][0]
    assert "storage that all of them share" in found[0][0]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def run_in_own_folder(store, folder):
    import torch.distributed as dist

    import sae_harvest.train.parallel.distributed

    sae_harvest.train.parallel.distributed.SIGHT_SECONDS = 0.1
    out = folder / str(dist.get_rank())
    out.mkdir()
    return run("latents", store, out)


def too_many(parallel, n_latents, batch_rows):
    try:
        group_of(parallel, n_latents, batch_rows, CPU)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("parallel", "sentence"),
    [("data", "17 rows cannot be divided by 2 workers"), ("latents", "1 latents cannot be")],
)
def test_more_processes_than_parts_are_refused(parallel, sentence):
    for found in together(too_many, 2, parallel, 1, 17):
        assert sentence in found


def encode_divided(sae_folder, x):
    """Latents and reconstructions of a dictionary divided among processes."""
    from sae_harvest.train.sae.sharded_sae import ShardedSAE, load_part

    group = group_of("latents", 94, 12, CPU)
    part, n_latents = load_part(sae_folder, "cpu", group)
    whole = ShardedSAE(part, n_latents, group)
    indices, values = whole.encode(x)
    return indices.numpy(), values.numpy(), whole.decode(indices, values, x).numpy()


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated", "transcoder"])
def test_a_divided_dictionary_is_used_as_a_whole_one(checkpoints, kind):
    folder = checkpoints[kind] / "checkpoints" / "000001"
    sae, x = SAE.load(folder), data(50, seed=5)
    assert digest_of(folder) == sae.digest
    indices, values = sae.encode(x)
    for found in together(encode_divided, 3, folder, x):
        assert (found[0] == indices.numpy())[found[1] > 0].all()
        assert (found[1] == values.numpy()).all()
        expected = sae.decode(indices, values, x)
        torch.testing.assert_close(torch.from_numpy(found[2]), expected, rtol=1e-4, atol=1e-4)
