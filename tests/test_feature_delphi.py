"""delphi's caches of latents, written from tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.models import resolve_model
from sae_harvest.harvest.model.sites import Site
from sae_harvest.pipelines.exports import delphi
from sae_harvest.pipelines.exports.hookpoints import hookpoint
from sae_harvest.store.reader import ActivationStore
from tests.export_cases import Triples, built, exported, half, refusal, triples_of
from tests.feature_cases import DEAD, SAE_LATENTS


@pytest.fixture(scope="module")
def features(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tiny_store, tmp_path_factory.mktemp("delphi"))


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> ActivationStore:
    return ActivationStore.open(tiny_store)


@pytest.fixture(scope="module")
def firings(features: Path) -> Triples:
    return triples_of(features)


def split_files(folder: Path) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """By first and last latent."""
    found = {}
    for path in folder.glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))
        found[first, last] = load_file(path)
    return dict(sorted(found.items()))


def triples(folder: Path, length: int) -> Triples:
    found = {}
    for (first, last), tensors in split_files(folder).items():
        locations = tensors["locations"].astype(int)
        order = [tuple(line) for line in locations.tolist()]
        assert order == sorted(order)  # by context, position, latent
        for (context, position, latent), value in zip(
            order, tensors["activations"].tolist(), strict=True
        ):
            assert latent + first <= last
            found[context * length + position, latent + first] = value
    return found


def test_all_firings_and_tokens_are_in_the_cache(
    features: Path, store: ActivationStore, firings: Triples, tmp_path: Path
) -> None:
    out = exported(features, "delphi", tmp_path / "out")
    folder = out / "latents" / "h.1"
    assert [path.relative_to(out).as_posix() for path in out.rglob("h.1")] == ["latents/h.1"]
    assert triples(folder, 32) == half(firings)
    (((first, last), tensors),) = split_files(folder).items()
    assert (first, last) == (0, SAE_LATENTS - 1)
    assert {name: t.dtype for name, t in tensors.items()} == {
        "locations": np.uint16,
        "activations": np.float16,
        "tokens": np.int32,
    }
    np.testing.assert_array_equal(tensors["tokens"], store.tokens(0, store.n_contexts))
    config = json.loads((folder / "config.json").read_text())
    assert config["cache_ctx_len"] == 32
    assert config["n_tokens"] == store.n_rows
    assert config["n_splits"] == 1
    assert config["model_name"] == store.plan["model"]["name"]


def test_files_are_cut_at_so_many_firings(
    features: Path, firings: Triples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = len(firings) // 5
    monkeypatch.setattr(delphi, "SPLIT_FIRINGS", most)
    folder = exported(features, "delphi", tmp_path / "out") / "latents" / "h.1"
    files = split_files(folder)
    spans = list(files)
    assert len(spans) >= 5
    assert [spans[0][0], *(last + 1 for _, last in spans)] == [
        *(first for first, _ in spans),
        SAE_LATENTS,
    ]
    assert max(len(tensors["activations"]) for tensors in files.values()) <= most
    assert all(len(tensors["tokens"]) == 8 * 1024 // 32 for tensors in files.values())
    assert triples(folder, 32) == half(firings)
    assert json.loads((folder / "config.json").read_text())["n_splits"] == len(spans)


def test_some_latents_are_in_files_from_the_first_to_the_last(
    features: Path, firings: Triples, tmp_path: Path
) -> None:
    out = exported(
        features, "delphi", tmp_path / "out", "--latents", "3-5,20", "--name", "layers.1.mlp"
    )
    folder = out / "latents" / "layers.1.mlp"
    assert list(split_files(folder)) == [(3, 20)]
    expected = {key: v for key, v in firings.items() if key[1] in (3, 4, 5, 20)}
    assert triples(folder, 32) == half(expected)


def test_wide_numbers_where_short_ones_would_not_do(
    features: Path, firings: Triples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delphi, "SHORT", 255)  # fewer than contexts
    monkeypatch.setattr(delphi, "MAX_FLOAT16", 0.9 * max(firings.values()))
    folder = exported(features, "delphi", tmp_path / "out") / "latents" / "h.1"
    (tensors,) = split_files(folder).values()
    assert tensors["locations"].dtype == np.uint32
    assert tensors["activations"].dtype == np.float32
    assert triples(folder, 32) == firings


def test_what_delphi_takes_for_nothing_is_left_out(
    features: Path, firings: Triples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = float(np.median(list(firings.values())))
    monkeypatch.setattr(delphi, "LEAST", least)
    folder = exported(features, "delphi", tmp_path / "out") / "latents" / "h.1"
    assert triples(folder, 32) == half({key: v for key, v in firings.items() if v > least})


def test_a_cache_of_nothing_or_without_its_store_is_refused(
    features: Path, tiny_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "None of these latents fires" in refusal(features, "delphi", out, "--latents", f"{DEAD}")
    assert "Two of the tables are for h.1" in refusal([features, features], "delphi", out)
    assert str(tmp_path / "x") in refusal(features, "delphi", out, "--store", tmp_path / "x")
    moved = shutil.copytree(features, tmp_path / "moved")
    record = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(record | {"store": "/nowhere", "relative": {}}))
    assert "/nowhere" in refusal(moved, "delphi", out)
    exported(moved, "delphi", out, "--store", tiny_store)
    (moved / "run.json").write_text(json.dumps(record | {"store_digest": "0" * 32}))
    refusal(moved, "delphi", tmp_path / "other")


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("resid_post.2", "h.2"),
        ("resid_pre.2", "h.1"),
        ("attn_out.0", "h.0.attn"),
        ("mlp_out.1", "h.1.mlp"),
        ("resid_pre.0", None),
        ("resid_mid.1", None),
        ("mlp_act.1", None),
    ],
)
def test_a_site_is_called_after_the_module_that_puts_it_out(
    model_folder: Path, site: str, expected: str | None
) -> None:
    model = resolve_model(str(model_folder))
    if expected is not None:
        assert hookpoint(model, Site.parse(site)) == expected
        return
    with pytest.raises(InputError, match="give delphi's hookpoint with --name"):
        hookpoint(model, Site.parse(site))
