"""A password in an endpoint, a place or an address is never printed, logged or recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import sae_harvest.pipelines.evaluate.cli
import sae_harvest.pipelines.features.commands.cli
from sae_harvest.common import ray_cluster as cluster
from sae_harvest.common.errors import RunError, SaeHarvestError
from sae_harvest.common.masking import masked
from sae_harvest.harvest.run import log
from sae_harvest.store.objects import open_objects
from tests.commands import invoke

SECRET = "s3cr3t"
ENDPOINT = f"http://me:{SECRET}@127.0.0.1:9"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host:9000 is down", "http://***@host:9000 is down"),
        ("http://me@host/a@b", "http://***@host/a@b"),
        ("(ray://me:p/w@host:1)", "(ray://***@host:1)"),
        ("--address me:pw@host:6379: no", "--address ***@host:6379: no"),
        ("s3://me:pw@bucket/a and s3://you:pw@b", "s3://***@bucket/a and s3://***@b"),
        ("s3://bucket/a@b:c", "s3://bucket/a@b:c"),
        ("write to me@example.org at 12:30", "write to me@example.org at 12:30"),
        ("activations/resid_post.1 at 127.0.0.1:9", "activations/resid_post.1 at 127.0.0.1:9"),
    ],
)
def test_only_user_and_password_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


@given(
    password=st.text("abXY09!$%^&*()_+-=;,.~/:@", min_size=1).map(lambda rest: f"Zq{rest}zQ"),
    scheme=st.sampled_from(["http", "https", "s3", "ray"]),
)
def test_no_password_is_left_in_an_address(password: str, scheme: str) -> None:
    shown = masked(f"Cannot read {scheme}://me:{password}@host:9000/path: refused.")
    assert shown.endswith("@host:9000/path: refused.")
    assert "Zq" not in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "--store", f"s3://me:{SECRET}@bucket/store"),
        ("show", "--store", f"https://me:{SECRET}@host/store"),
        ("verify", "--store", f"s3://me:{SECRET}@bucket/store"),
        ("status", f"s3://me:{SECRET}@bucket/store"),
        ("run", "--model", f"https://me:{SECRET}@host/model", "--layer", 1),
        ("run", "--model", "x", "--layer", 1, "--corpus", f"s3://me:{SECRET}@b", "--tokens", "?"),
        ("show", "--store", "s3://bucket/store"),  # at the endpoint
    ],
)
def test_commands_do_not_print_it(
    arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"me:{SECRET}@127.0.0.1")  # refused before any request
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert SECRET not in result.output


@pytest.mark.parametrize(
    "command",
    [sae_harvest.pipelines.evaluate.cli.main, sae_harvest.pipelines.features.commands.cli.main],
)
def test_neither_do_the_other_commands(command: Any) -> None:
    result = CliRunner().invoke(command, ["nonsense", f"s3://me:{SECRET}@bucket"])
    assert result.exit_code == 2
    assert SECRET not in result.output


@pytest.mark.parametrize("address", [f"ray://me:{SECRET}@host:1", f"me:{SECRET}@127.0.0.1:9"])
def test_an_address_of_a_cluster_is_masked(address: str) -> None:
    with pytest.raises(RunError) as caught:
        cluster.connect(address, 1, "without")
    assert SECRET not in str(caught.value)


def test_an_endpoint_that_does_not_answer_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_harvest.store.bucket.GIVE_UP_SECONDS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", ENDPOINT)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    with pytest.raises(
        SaeHarvestError, match=r"http://\*\*\*@127.0.0.1:9 cannot be reached"
    ) as got:
        open_objects("s3://bucket/store").size("plan.json")
    assert SECRET not in str(got.value)


def test_the_log_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_HARVEST_CACHE", str(tmp_path))
    kept = log.HarvestLog("/runs/store")

    def fail() -> None:
        with kept:
            kept.write(f"joined ray://me:{SECRET}@host:1")
            raise ValueError(f"{ENDPOINT} is down")

    with pytest.raises(ValueError, match="is down"):
        fail()
    assert kept.path is not None
    told = kept.path.read_text()
    assert told.count("***") == 2
    assert SECRET not in told
