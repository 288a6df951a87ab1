"""Recipes: the released suite's shape, and the same recipe made small enough to run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from sae_harvest.common.errors import InputError
from sae_harvest.common.locks import LOCK_FILE, lock
from sae_harvest.pipelines.cli import main
from sae_harvest.pipelines.recipe import packaged_recipes, read_recipe
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.sweeps.sweepfile import parse_sweep
from tests.commands import refusal

KINDS = ("attn_out", "mlp_out", "resid_mid", "resid_post")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, arguments)])


@pytest.fixture
def small(model_folder: Path, corpus_file: Path) -> list[str]:
    """`gpt2-small` on the fixture model and corpus, a few steps each."""
    changes: dict[str, Any] = {
        "harvest.model": model_folder,
        "harvest.corpus": f"{{name: {corpus_file}}}",
        "harvest.tokens": 2048,
        "harvest.context_length": 32,
        "train.batch_rows": 128,
        "train.tokens": 2560,
        "train.k": 4,
        "train.grid.n_latents": [32, 64],
    }
    return [f"--set={key}={value}" for key, value in changes.items()] + ["--workers=0"]


def test_the_suite_is_the_released_one() -> None:
    assert "gpt2-small" in packaged_recipes()
    recipe = read_recipe("gpt2-small", {})
    assert recipe.layers == "all"
    assert recipe.sites == KINDS
    harvest = recipe.harvest_config(11)
    assert harvest.model == "gpt2"
    assert harvest.context_length == 64
    assert harvest.sites == tuple(f"{kind}.11" for kind in KINDS)
    sweep = parse_sweep(recipe.train, "train", {"store": "s", "out": "o"})
    configs = list(sweep.members.values())
    assert sorted(config.n_latents for config in configs) == [32_768, 131_072]
    assert {(c.k, c.activation, c.normalization) for c in configs} == {(32, "topk", "layer_norm")}


def test_every_layer_and_site_gets_its_saes(small: list[str], tmp_path: Path) -> None:
    small.append("--set=sites=[attn_out, resid_mid]")
    result = run("gpt2-small", "--out", tmp_path / "suite", *small)
    assert result.exit_code == 0, result.output
    rows = pq.read_table(tmp_path / "suite" / "suite.parquet").to_pylist()
    made = {(row["site"], row["n_latents"]) for row in rows}
    kinds, layers = ("attn_out", "resid_mid"), range(3)
    assert made == {(f"{kind}.{layer}", n) for kind in kinds for layer in layers for n in (32, 64)}
    for row in rows:
        sae = SAE.load(tmp_path / "suite" / row["folder"])
        assert (sae.config.site, sae.config.n_latents, sae.config.k) == (
            row["site"],
            row["n_latents"],
            4,
        )
        assert 0 < row["fvu"] < 2
        assert row["heldout_rows"] > 0
    assert not list((tmp_path / "suite").glob("layer.*")), "stores take room"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("sae.safetensors")}
    again = run("gpt2-small", "--out", tmp_path / "suite", *small)
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is done twice"


def test_stores_stay_when_asked(small: list[str], tmp_path: Path) -> None:
    chosen = ["--set=layers=[1]", "--set=sites=[mlp_out]", "--set=keep_stores=true"]
    result = run("gpt2-small", "--out", tmp_path / "suite", *small, *chosen)
    assert result.exit_code == 0, result.output
    store = ActivationStore.open(tmp_path / "suite" / "layer.1" / "store")
    assert store.sites == ("mlp_out.1",)


def test_what_is_no_recipe_is_one_sentence(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "suite"
    assert "gpt2-small" in refusal(run("gpt2-large", "--out", out))
    assert "harvest.tokns" in refusal(run("gpt2-small", "--out", out, "--set=harvest.tokns=5"))
    assert "resid_pots" in refusal(run("gpt2-small", "--out", out, "--set=sites=[resid_pots]"))
    assert "no further keys" in refusal(run("gpt2-small", "--out", out, "--set=layers.x=1"))
    assert "KEY=VALUE" in refusal(run("gpt2-small", "--out", out, "--set=layers"), 2)
    assert "n_latnts" in refusal(run("gpt2-small", "--out", out, "--set=train.n_latnts=1"), 2)
    assert not out.exists()


def test_another_recipe_in_the_folder_is_refused(small: list[str], tmp_path: Path) -> None:
    one = ["--set=layers=[0]", "--set=sites=[mlp_out]"]
    assert run("gpt2-small", "--out", tmp_path / "suite", *small, *one).exit_code == 0
    other = run("gpt2-small", "--out", tmp_path / "suite", *small, *one, "--set=train.k=2")
    assert "differing: train.k: 4 → 2. " in refusal(other)
    with lock(tmp_path / "suite" / LOCK_FILE):
        again = run("gpt2-small", "--out", tmp_path / "suite", *small, *one)
    assert "Another process is writing to" in refusal(again, 75)


def test_counts_of_a_recipe_are_spelled_as_people_do() -> None:
    recipe = read_recipe("gpt2-small", {"harvest.tokens": "1M", "train.tokens": "2.5M"})
    assert recipe.harvest_config(0).tokens == 10**6
    with pytest.raises(InputError, match=r"recipe: harvest\.tokens: [^`\[]*valid integer"):
        read_recipe("gpt2-small", {"harvest.tokens": "many"})
