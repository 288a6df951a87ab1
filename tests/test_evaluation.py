"""An evaluation judges a dictionary on the rows its training would read, and reads no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_harvest.common.errors import DamagedError
from sae_harvest.pipelines.evaluate.downstream import heldout_contexts
from sae_harvest.pipelines.evaluate.splicing import replaced_rows
from sae_harvest.store.loading.chunks import SelectedRows
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.evaluate import evaluate, remarks
from sae_harvest.train.sae.sae import SAE
from tests.synthetic import (
    OTHER,
    SITE,
    make_plan,
    make_store,
    make_two_sites,
    replace_array,
    rows_of,
)

RULE = RowRule(heldout_fraction=0.4)
HELDOUT = RULE.model_copy(update={"split": "heldout"})


def dictionary(d_in: int, d_out: int | None = None, **fields: Any) -> SAE:
    torch.manual_seed(0)
    config = SAEConfig(
        d_in=d_in,
        d_out=d_out,
        n_latents=16,
        k=4,
        site=SITE,
        target_site=None if d_out is None else OTHER,
        rule=RULE,
        **fields,
    )
    tensors = {name: torch.randn(shape) for name, shape in SAE.shapes(config).items()}
    return SAE(config, **tensors)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    root = tmp_path_factory.mktemp("evaluation") / "s"
    make_store(root)
    return ActivationStore.open(root)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """The shards whose norms, documents and activations were read."""
    found: dict[str, set[int]] = {"norms": set(), "row_documents": set(), "read": set()}
    for name, shards in found.items():
        original = getattr(ActivationStore, name)

        def noting(
            self: ActivationStore,
            *arguments: Any,
            original: Any = original,
            shards: set[int] = shards,
        ) -> Any:
            numbers = [a for a in arguments if isinstance(a, int)]
            per_shard = self.shard_rows if len(numbers) > 1 else 1
            last = numbers[-1] if len(numbers) == 1 else numbers[1] - 1
            shards.update(range(numbers[0] // per_shard, last // per_shard + 1))
            return original(self, *arguments)

        monkeypatch.setattr(ActivationStore, name, noting)
    return found


def test_a_transcoder_is_judged_on_rows_that_training_would_read(tmp_path: Path) -> None:
    make_two_sites(tmp_path / "s", 6)
    store = ActivationStore.open(tmp_path / "s")
    found = evaluate(dictionary(8, 24), store, RULE, 10**6)
    # position 0 is massive at one site, position 5 at the other
    expected = SelectedRows(store, (SITE, OTHER), HELDOUT).counts.sum()
    assert found["without_outliers"]["rows"] == expected > 0
    assert found["with_outliers"]["rows"] == expected * 16 / 14


def test_only_what_is_judged_is_read(store: ActivationStore, read: dict[str, set[int]]) -> None:
    heldout = np.flatnonzero(
        store.selected(SITE, HELDOUT.model_copy(update={"max_norm_medians": None}))
    )
    wanted = set(np.unique(heldout[:40] // store.shard_rows).tolist())
    assert len(wanted) < store.n_shards / 2
    for shards in read.values():
        shards.clear()
    assert evaluate(dictionary(8), store, RULE, 40)["with_outliers"]["rows"] == 40
    assert read["read"] == wanted
    assert read["norms"] == read["row_documents"] == set(range(max(wanted) + 1))


def test_downstream_selects_rows_of_its_contexts_only(
    store: ActivationStore, read: dict[str, set[int]]
) -> None:
    sae = dictionary(8)
    contexts = heldout_contexts(store, [sae], 10_000)[[0, 3, -1]]
    for shards in read.values():
        shards.clear()
    found = replaced_rows(store, sae, contexts)
    assert read["norms"] == set((contexts // 8).tolist())
    assert not read["row_documents"]
    every = store.selected(SITE, RULE.model_copy(update={"split": "all"})).reshape(-1, 16)
    assert np.array_equal(found, every[contexts])


def test_rows_that_are_not_finite_are_refused_as_training_refuses_them(tmp_path: Path) -> None:
    plan = make_plan()
    make_store(tmp_path / "s", plan)
    store = ActivationStore.open(tmp_path / "s")
    heldout = store.selected(SITE, HELDOUT)[: store.shard_rows]
    row = int(np.flatnonzero(heldout)[3])
    trained = int(np.flatnonzero(~heldout)[3])
    path = f"activations/{SITE}"
    objects = LocalObjects(tmp_path / "s")
    for harmed, refused in ((trained, False), (row, True)):
        x = rows_of(plan)[: store.shard_rows].astype(np.float16)
        x[harmed, 2] = np.nan
        replace_array(objects, plan, path, 0, x)
        store = ActivationStore.open(tmp_path / "s")
        if refused:
            with pytest.raises(DamagedError, match=rf"{SITE} that are not finite, in row {row};"):
                evaluate(dictionary(8), store, RULE, 10**6)
        else:
            assert evaluate(dictionary(8), store, RULE, 10**6)["with_outliers"]["fvu"] > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_norms_that_are_not_finite_choose_no_rows(tmp_path: Path, bad: float) -> None:
    """A comparison with NaN is false: the row would be left out without a word."""
    plan = make_plan()
    make_store(tmp_path / "s", plan)
    norms = np.linalg.norm(rows_of(plan)[3 * 128 : 4 * 128], axis=1)
    norms[7] = bad
    path = f"norms/{SITE}"
    objects = LocalObjects(tmp_path / "s")
    replace_array(objects, plan, path, 3, norms)
    store = ActivationStore.open(tmp_path / "s")
    for use in (
        lambda: SelectedRows(store, (SITE,), RULE),
        lambda: evaluate(dictionary(8), store, RULE, 10**6),
    ):
        with pytest.raises(DamagedError, match=f"norms of {SITE} that are not finite, in row 391;"):
            use()
    assert SelectedRows(store, (SITE,), RowRule(max_norm_medians=None)).counts.sum() > 0


def figures(rows: int = 10, fvu: float | None = 0.5, dead_share: float | None = 0.1) -> Any:
    group = {"rows": rows, "fvu": fvu, "l0": None, "dead_share": dead_share}
    return {"without_outliers": group, "with_outliers": group, "split": "train"}


def test_a_dictionary_that_learned_nothing_is_remarked_on() -> None:
    assert remarks(figures()) == []
    assert remarks(figures(fvu=1.0)) == []
    [dead] = remarks(figures(fvu=1.2, dead_share=1.0))
    assert dead.startswith("No latent fired")
    [above] = remarks(figures(fvu=1.25))
    assert above.startswith("FVU is 1.25, above 1")
    [none] = remarks(figures(rows=0, fvu=None, dead_share=None))
    assert none.startswith("No row of the store was held out")
    [trained] = remarks(figures() | {"split": "all"})
    assert "--split all" in trained
