"""The whole path against a real S3 server: harvest, kill, resume, verify, train, build tables."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
import zarr
from obstore.store import S3Store
from zarr.storage import ObjectStore

from sae_harvest.common.errors import StoreError
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import open_objects
from sae_harvest.store.reader import ActivationStore
from tests.commands import digest_of, invoke, options, refusal, wait_for
from tests.forked import ended, forked
from tests.s3_server import S3Server, s3_server, without_aws

pytestmark = pytest.mark.slow

KILLS = 3
SHARDS = 12
MANY = {"tokens": SHARDS * 256, "shard_rows": 256}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """For commands; this process speaks to the server as well."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return without_aws(dict(os.environ)) | server.environment


@pytest.fixture(scope="module")
def local_digest(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> str:
    """Digest of the same harvest into a folder."""
    place = tmp_path_factory.mktemp("local") / "store"
    return digest_of(invoke(*options(model_folder, corpus_file, place, **MANY)))


@pytest.fixture
def harvest_into(model_folder: Path, corpus_file: Path) -> Callable[..., list[str]]:
    """Arguments of the harvest into a place."""

    def arguments(place: object, **more: object) -> list[str]:
        corpus = more.pop("corpus", corpus_file)
        return options(model_folder, corpus, place, **(MANY | more))

    return arguments


def run(command: str, *arguments: object, env: dict[str, str]) -> str:
    """Standard output of an installed command; it must succeed."""
    result = ended(command, *arguments, environment=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_harvest_train_and_tables_from_a_bucket(
    server: S3Server,
    environment: dict[str, str],
    harvest_into: Callable[..., list[str]],
    local_digest: str,
    tmp_path: Path,
) -> None:
    place = f"s3://{server.bucket}/whole/store"
    given = harvest_into(place, workers=1)
    assert digest_of(ended("harvest", *given, environment=environment)) == local_digest
    assert "all as committed" in run("harvest", "verify", "--store", place, env=environment)
    assert f"{SHARDS} shards committed, all sealed" in run(
        "harvest", "status", "--store", place, env=environment
    )
    shape = ("--n-latents", 64, "--k", 4, "--tokens", 8192, "--batch-rows", 256)
    sae, features = tmp_path / "sae", tmp_path / "features"
    trained = run("train-sae", "run", "--store", place, "--out", sae, *shape, env=environment)
    assert "FVU" in trained
    built = run(
        "sae-features",
        *("build", "--store", place, "--sae", sae, "--out", features),
        env=environment,
    )
    assert "64 latents" in built
    sql = "SELECT count(*) AS n FROM latents"
    answer = run("sae-features", "query", sql, "--features", features, env=environment)
    assert answer.split()[-1] == "64"


def test_rows_in_a_bucket_are_those_in_a_folder_for_us_and_for_zarr(
    server: S3Server,
    environment: dict[str, str],
    harvest_into: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    place = f"s3://{server.bucket}/rows"
    for where in (place, tmp_path / "store"):
        given = harvest_into(where)
        digest_of(invoke(*given))
    ours, local = ActivationStore.open(place), ActivationStore.open(tmp_path / "store")
    expected = local.read("resid_post.1", 0, local.n_rows)
    np.testing.assert_array_equal(ours.read("resid_post.1", 0, ours.n_rows), expected)
    np.testing.assert_array_equal(ours.tokens(3, 90), local.tokens(3, 90))
    assert ours.documents(5).equals(local.documents(5))
    bucket = S3Store(server.bucket, prefix="rows", client_options={"allow_http": True}, config={})
    group = zarr.open_group(ObjectStore(bucket, read_only=True), mode="r")
    np.testing.assert_array_equal(np.asarray(group["activations/resid_post.1"][:]), expected)


def test_killed_anywhere_and_continued_gives_the_same_store(
    server: S3Server,
    environment: dict[str, str],
    harvest_into: Callable[..., list[str]],
    local_digest: str,
) -> None:
    place = f"s3://{server.bucket}/killed"
    objects = open_objects(place)
    given = harvest_into(place)
    rng = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        before = len(objects.keys("commits/"))
        with forked("harvest", *given, environment=environment) as process:
            wait_for(lambda n=before: len(objects.keys("commits/")) > n)
            time.sleep(rng.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed += len(objects.keys("seals/")) == 0
    assert killed
    assert digest_of(ended("harvest", *given, environment=environment)) == local_digest
    report = verify(objects, lambda done, total: None)
    assert (report.digest, report.damage) == (local_digest, [])


def test_damage_in_a_bucket_is_named_refused_and_mended(
    server: S3Server,
    environment: dict[str, str],
    harvest_into: Callable[..., list[str]],
    local_digest: str,
) -> None:
    place = f"s3://{server.bucket}/damaged"
    given = harvest_into(place)
    assert digest_of(invoke(*given)) == local_digest
    bucket = S3Store(server.bucket, client_options={"allow_http": True})
    key = "activations/resid_post.1/c.7.0"
    data = bytearray(obstore.get(bucket, f"damaged/{key}").bytes())
    data[1000] ^= 1
    obstore.put(bucket, f"damaged/{key}", bytes(data))
    obstore.delete(bucket, "damaged/tokens/c.9.0")
    told = ended("harvest", "verify", "--store", place, environment=environment)
    assert "2 damaged objects" in refusal_of_verify(told)
    assert key in told.stderr
    assert "tokens/c.9.0 is missing" in told.stderr
    with pytest.raises(StoreError, match=r"c\.7\.0"):
        ActivationStore.open(place).read("resid_post.1", 0, 2560)
    mended = ended(
        "harvest", "verify", "--store", place, "--repair", "--workers", 0, environment=environment
    )
    assert mended.returncode == 0, mended.stderr
    assert local_digest in mended.stdout


def refusal_of_verify(result: subprocess.CompletedProcess[str]) -> str:
    """The last line of a verification that found damage, after checking how it ended."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_corpus_in_a_bucket_gives_the_contexts_of_its_copy_on_disk(
    server: S3Server,
    environment: dict[str, str],
    corpus_file: Path,
    harvest_into: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    bucket = S3Store(server.bucket, client_options={"allow_http": True})
    obstore.put(bucket, "texts/stories.jsonl", corpus_file.read_bytes())
    corpus = f"s3://{server.bucket}/texts"
    digest_of(invoke(*harvest_into(tmp_path / "remote", corpus=corpus)))
    digest_of(invoke(*harvest_into(tmp_path / "local")))
    there, here = (ActivationStore.open(tmp_path / name) for name in ("remote", "local"))
    np.testing.assert_array_equal(there.tokens(0, 96), here.tokens(0, 96))


def test_a_missing_bucket_and_a_dead_server_are_one_sentence(
    environment: dict[str, str], harvest_into: Callable[..., list[str]]
) -> None:
    given = harvest_into("s3://nosuchbucket/x")
    assert "nosuchbucket" in refusal(ended("harvest", *given, environment=environment))
    dead = environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    given = harvest_into("s3://harvest/x")
    assert "cannot be reached" in refusal(ended("harvest", *given, environment=dead))
