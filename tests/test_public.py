"""The public names: which there are, and that what their documentation shows works."""

from __future__ import annotations

import doctest
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import sae_harvest as sh

ERRORS = {
    *("DamagedError", "InputError", "NotAStoreError", "PlanMismatchError"),
    *("RunError", "SaeHarvestError", "StoreError", "UnfinishedError"),
}
OTHERS = {
    *("ActivationDataset", "ActivationStore", "CorpusSpec", "FeatureConfig", "Features"),
    *("Generated", "HarvestConfig", "Latent", "LiveText", "Provenance", "RowRule", "SAE"),
    *(
        "SAEConfig",
        "ShuffledLoader",
        "TrainConfig",
        "build_features",
        "harvest_activations",
        "load_sae",
    ),
    *("open_features", "open_store", "trace_row", "train_sae"),
}


@pytest.fixture
def user(
    folders: tuple[Path, Path, Path],
    model_folder: Path,
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A user's folder with a model, a text and the outputs of a demo, and we are in it."""
    for source, name in zip(folders, ("store", "sae", "features"), strict=True):
        shutil.copytree(source, tmp_path / "runs" / "demo" / name)
    shutil.copytree(model_folder, tmp_path / "my-model")
    (tmp_path / "texts").mkdir()
    shutil.copy(corpus_file, tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_public_names_are_these() -> None:
    assert set(sh.__all__) == ERRORS | OTHERS | {"__version__"}
    assert set(sh._MODULES) == ERRORS | OTHERS
    assert set(sh.__all__) <= set(dir(sh))
    for name in sh.__all__:
        getattr(sh, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sh.nothing  # noqa: B018
    for name in ERRORS:
        assert issubclass(getattr(sh, name), sh.SaeHarvestError)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, sae_harvest; print(*sorted({'torch', 'numpy', 'ray'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (printed.returncode, printed.stdout.strip()) == (0, "")


@pytest.mark.parametrize("name", sorted(ERRORS | OTHERS))
def test_a_public_name_is_documented(name: str) -> None:
    thing = getattr(sh, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing) and name in OTHERS:
        for member, value in vars(thing).items():
            if not member.startswith("_") and callable(getattr(value, "__func__", value)):
                assert inspect.getdoc(value), f"{name}.{member}"
    if name in OTHERS:
        assert ">>> " in inspect.getdoc(thing), f"{name} shows no example"  # type: ignore[operator]
    if inspect.isfunction(thing):
        documentation = inspect.getdoc(thing) or ""
        assert "Raises:" in documentation
        for parameter in inspect.signature(thing).parameters:
            assert f"{parameter}: " in documentation, f"{name} does not explain {parameter}"


@pytest.mark.parametrize("name", sorted(ERRORS | OTHERS))
def test_the_examples_of_a_public_name_run(name: str, user: Path) -> None:
    names = {name: getattr(sh, name) for name in OTHERS}
    finder = doctest.DocTestFinder(recurse=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    printed: list[str] = []
    for test in finder.find(getattr(sh, name), name, globs=dict(names)):
        runner.run(test, out=printed.append)
    assert runner.failures == 0, "".join(printed)


def test_a_dataset_gives_the_rows_of_the_store(user: Path) -> None:
    store = sh.open_store("runs/demo/store")
    site, rule = store.sites[0], sh.RowRule(split="all", max_norm_medians=None)
    dataset = sh.ActivationDataset(store, batch_rows=512, rule=rule)
    batches = list(DataLoader(dataset, batch_size=None, num_workers=0))
    assert len(batches) == len(dataset) == 16
    rows = torch.cat(batches).numpy()
    wanted = np.asarray(store.read(site, 0, store.n_rows), np.float32)
    order = [np.lexsort(x.T) for x in (rows, wanted)]
    np.testing.assert_array_equal(rows[order[0]], wanted[order[1]])
    for again, batch in zip(dataset, batches, strict=True):
        assert torch.equal(again, batch)
    twice = list(sh.ActivationDataset(store, batch_rows=512, rule=rule, epochs=2))
    assert len(twice) == 32
    assert not torch.equal(twice[0], twice[16])
    endless = sh.ActivationDataset(store, batch_rows=4096, rule=rule, epochs=None)
    assert len([batch for batch, _ in zip(endless, range(5), strict=False)]) == 5
    with pytest.raises(TypeError, match="no length"):
        len(endless)
    with pytest.raises(sh.InputError, match="num_workers=0"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))
    with pytest.raises(sh.InputError, match="0 epochs"):
        sh.ActivationDataset(store, epochs=0)


def test_forward_and_dense_activations_are_those_of_encode_and_decode(user: Path) -> None:
    store, sae = sh.open_store("runs/demo/store"), sh.load_sae("runs/demo/sae")
    x = torch.from_numpy(store.read(store.sites[0], 0, 64)).float()
    indices, values = sae.encode(x)
    dense = torch.zeros(64, sae.config.n_latents)
    for row in range(64):
        for latent, value in zip(indices[row], values[row], strict=True):
            dense[row, latent] += value
    assert torch.equal(sae.encode_dense(x), dense)
    assert torch.equal(sae(x), sae.decode(indices, values, x))
    assert torch.equal(sae(x.reshape(4, 16, -1)), sae(x).reshape(4, 16, -1))
    assert sae.to("cpu").digest == sae.digest
    with pytest.raises(sh.InputError, match="dimensions"):
        sae(x[:, 1:])


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning", "openai"])
def test_an_sae_of_any_format_is_recognised(name: str, user: Path) -> None:
    from sae_harvest.train.sae.formats import format_named

    ours = sh.load_sae("runs/demo/sae")
    if name == "openai":
        config = ours.config.model_copy(update={"normalization": "layer_norm", "input_scale": 1.0})
        ours = sh.SAE(config, **ours.tensors())
    out = Path("peer.pt" if name == "openai" else "peer")
    if name != "openai":
        out.mkdir()
    format_named(name).write(ours, out)
    found = sh.load_sae(out, site="resid_post.1")
    x = torch.from_numpy(sh.open_store("runs/demo/store").read("resid_post.1", 0, 32)).float()
    torch.testing.assert_close(found(x), ours(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(sh.InputError, match="no SAE that can be recognised"):
        sh.load_sae("texts")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sh.train_sae("runs/demo/store", "x", n_latent=3), "no option n_latent"),
        (lambda: sh.train_sae("runs/demo/store", "x", n_latents=0, k=1, tokens=9), "^n_latents: "),
        (lambda: sh.harvest_activations("x", model="gpt2"), "^sites: "),
        (lambda: sh.build_features("s", "a", "x", n_top=0), "^n_top: "),
        (lambda: sh.open_features("runs/demo/features").latent(64), "no latent 64"),
        (lambda: sh.open_features("runs/demo/features").sql("DROP TABLE latents"), "one SELECT"),
        (lambda: sh.open_features("runs/demo/store"), "holds no"),
    ],
)
def test_a_wrong_argument_is_one_sentence(user: Path, call: Any, sentence: str) -> None:
    with pytest.raises(sh.SaeHarvestError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not Path("x").exists()


SCRIPT = """
import sae_harvest as sh
import store  # the user's own

store = sh.harvest_activations(
    "runs/store", model="my-model", corpus="texts", layer=1, tokens=4096, context_length=32
)
for batch in sh.ActivationDataset(store, batch_rows=512):
    print(tuple(batch.shape))
sae = sh.train_sae(store, "runs/sae", n_latents=64, k=4, tokens=16384, batch_rows=256)
indices, values = sae.encode(batch)
features = sh.build_features(store, "runs/sae", "runs/features", n_top=5)
print(features.sql("SELECT count(*) AS n FROM latents")["n"][0])
print(len(features.latent(3).contexts) > 0, sh.trace_row(store, 40).kind)
print(features.steer("the cat", {3: 2.0}, n_tokens=3).token_texts)
"""


def test_a_script_named_train_beside_one_named_store_goes_the_whole_way(user: Path) -> None:
    (user / "train.py").write_text(SCRIPT)
    (user / "store.py").write_text("print('my own')\n")
    result = subprocess.run(
        [sys.executable, "train.py"], cwd=user, capture_output=True, text=True, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "my own"
    assert set(lines[1:-3]) == {"(512, 32)"}
    assert lines[-3:-1] == ["64", "True text"]
    assert lines[-1].startswith("[")
