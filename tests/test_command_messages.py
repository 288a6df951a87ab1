"""What commands say to what people type: a bare path, a count, a store without shards."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run.prepare import check_context_length
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.writer import create_store, read_plan
from tests.commands import invoke, options, refusal
from tests.synthetic import make_plan


def test_a_store_without_a_shard_does_not_pass_verification(tmp_path: Path) -> None:
    create_store(LocalObjects(tmp_path / "store"), make_plan(), {})
    message = refusal(invoke("verify", "--store", tmp_path / "store"))
    assert "holds no shard: its harvest was stopped before the first one" in message


@pytest.mark.parametrize("command", ["show", "status", "verify", "export"])
def test_a_bare_path_is_answered_with_the_option_to_type(command: str, tmp_path: Path) -> None:
    message = refusal(invoke(command, tmp_path), code=2)
    assert f"Name the store with an option: main {command} --store PLACE." in message


def test_counts_are_typed_as_people_write_them(
    model_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    counts = {"tokens": "2.048k", "shard_rows": "1_024", "seed": "1e6"}
    result = invoke(*options(model_folder, corpus_file, store, **counts))
    assert "2,048 rows" in result.stdout, result.output
    plan = read_plan(LocalObjects(store))
    assert (plan.shard_rows, plan.seed) == (1024, 1_000_000)
    row = invoke("show", "--store", store, "--row", "1_000")
    assert row.exit_code == 0, row.output


@pytest.mark.parametrize("command", ["harvest", "train-sae", "sae-features", "sae-pipeline"])
def test_the_package_run_as_a_module_has_every_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sae_harvest", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sae_harvest", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"Usage: python -m sae_harvest {command} ")


def test_contexts_of_a_model_without_a_limit_may_be_of_any_length() -> None:
    """XLNet's configuration says -1."""
    check_context_length(SimpleNamespace(max_position_embeddings=-1), "xlnet", 512)
    check_context_length(SimpleNamespace(), "mamba", 512)
    with pytest.raises(InputError, match="gpt2 sees at most 64 tokens at a time"):
        check_context_length(SimpleNamespace(max_position_embeddings=64), "gpt2", 128)
