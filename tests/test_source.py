"""Tables find their SAE, store and model where these are now, and take no others."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from sae_harvest.common.errors import InputError, RunError, SaeHarvestError
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.pipelines.features.tables.folder import read_run
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations, relative_places, sae_of, store_of
from sae_harvest.pipelines.viewer import run as run_module
from sae_harvest.pipelines.viewer.compare import Comparison
from sae_harvest.pipelines.viewer.server import Viewer
from sae_harvest.pipelines.viewer.tables import Tables
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from tests.dictionaries import random_sae
from tests.made_tables import write_tables
from tests.viewer_cases import N


@pytest.fixture
def together(tmp_path: Path, tiny_store: Path) -> Path:
    """A folder with store, sae and features, as a run leaves them."""
    root = tmp_path / "a" / "run"
    shutil.copytree(tiny_store, root / "store")
    store = ActivationStore.open(root / "store")
    sae = random_sae(store, N, 4, RowRule())
    sae.save(root / "sae")
    features = write_tables(
        root / "features",
        N,
        sae=str(root / "sae"),
        sae_digest=sae.digest,
        store=store.place,
        store_digest=store.digest,
    )
    path = features / "run.json"
    relative = {"relative": relative_places(features, store.place, str(root / "sae"))}
    assert relative["relative"] == {"store": "../store", "sae": "../sae"}
    path.write_text(json.dumps(json.loads(path.read_text()) | relative))
    return root


def found(features: Path, moved: Locations = NOTHING_MOVED) -> tuple[str, str]:
    """Digest of the SAE, and place of the store."""
    run = read_run(features)
    assert run is not None
    sae, store = sae_of(features, run, moved.saes), store_of(features, run, moved.stores)
    return sae.digest, store.place


def test_what_moves_together_stays_together(together: Path, tmp_path: Path) -> None:
    digest, place = found(together / "features")
    assert place == str(together / "store")
    there = tmp_path / "b [1]"
    together.rename(there)
    (together / "sae").mkdir(parents=True)  # where they were is something else now
    (together / "store").mkdir()
    assert found(there / "features") == (digest, str(there / "store"))
    assert LiveModel.open(there / "features").activations("the cat").token_ids
    (tmp_path / "link").symlink_to(there)
    assert found(tmp_path / "link" / "features")[0] == digest


def test_tables_that_move_alone_find_the_rest_where_it_was(together: Path, tmp_path: Path) -> None:
    before = found(together / "features")
    (together / "features").rename(tmp_path / "features")
    assert found(tmp_path / "features") == before
    store = ActivationStore.open(together / "store")
    random_sae(store, N, 4, RowRule(), seed=9).save(tmp_path / ".." / "sae")
    assert found(tmp_path / "features") == before  # another one lies where it would be relative


def test_given_places_are_looked_at_instead_and_have_to_hold_the_right_thing(
    together: Path, tmp_path: Path
) -> None:
    digest, _ = found(together / "features")
    for name in ("sae", "store"):
        (together / name).rename(tmp_path / name)
    features = together / "features"
    with pytest.raises(RunError, match=r"say where it is with --sae"):
        found(features)
    with pytest.raises(RunError, match=r"say where it is with --store"):
        found(features, Locations(saes=[tmp_path / "sae"]))
    moved = Locations([tmp_path / "sae"], [str(tmp_path / "store")])
    assert found(features, moved) == (digest, str(tmp_path / "store"))
    other = random_sae(ActivationStore.open(tmp_path / "store"), N, 4, RowRule(), seed=9)
    other.save(tmp_path / "other")
    with pytest.raises(RunError, match="other holds another SAE than the one"):
        found(features, Locations([tmp_path / "other"], moved.stores))
    both = Locations([tmp_path / "other", tmp_path / "sae"], moved.stores)
    assert found(features, both)[0] == digest
    model = ActivationStore.open(tmp_path / "store").plan["model"]["name"]
    shutil.copytree(model, tmp_path / "model")
    here = Locations(moved.saes, moved.stores, [str(tmp_path / "model")])
    assert LiveModel.open(features, moved=here).activations("the cat").token_ids
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="other weights"):
        LiveModel.open(features, moved=here)


def test_serve_and_site_take_the_places(
    together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(together / "features", tmp_path / "features")
    served: list[Viewer] = []
    monkeypatch.setattr(run_module, "run_server", lambda viewer, *_: served.append(viewer))
    for name in ("sae", "store"):
        (together / name).rename(tmp_path / f"moved-{name}")
    given = ["--features", together / "features", "--compare", tmp_path / "features"]
    invoke = partial(CliRunner().invoke, main)
    refused = invoke([str(word) for word in ("site", *given, "--out", tmp_path / "site")])
    assert refused.exit_code == 1
    assert "say where it is with --sae" in refused.stderr
    assert not (tmp_path / "site").exists()
    sae, store = ("--sae", tmp_path / "moved-sae"), ("--store", tmp_path / "moved-store")
    made = invoke([str(word) for word in ("site", *given, *sae, "--out", tmp_path / "site")])
    assert made.exit_code == 0, made.output
    started = invoke([str(word) for word in ("serve", *given, *sae, *store)])
    assert started.exit_code == 0, started.output
    assert served[0].shown.models.activations("the cat")["tokens"]
    assert served[0].comparison is not None


def test_a_comparison_tells_two_given_saes_apart_by_their_digests(
    together: Path, tmp_path: Path
) -> None:
    store = ActivationStore.open(together / "store")
    other = random_sae(store, N, 4, RowRule(), seed=9)
    other.save(tmp_path / "other")
    theirs = write_tables(tmp_path / "theirs", N, seed=1, sae_digest=other.digest)
    (together / "sae").rename(tmp_path / "ours")
    tables = Tables(together / "features"), Tables(theirs)
    with pytest.raises(SaeHarvestError):
        Comparison(*tables)
    for saes in ([tmp_path / "ours", tmp_path / "other"], [tmp_path / "other", tmp_path / "ours"]):
        assert Comparison(*tables, saes).overview()["n_latents"] == N
