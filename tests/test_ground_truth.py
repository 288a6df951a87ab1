"""A synthetic store holds what its ground truth says, in the frequencies that were asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from sae_harvest.common.errors import InputError, PlanMismatchError, RunError, SaeHarvestError
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.commands.cli import main
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.synthetic.config import SyntheticConfig, SyntheticSettings
from sae_harvest.train.synthetic.sampling import Sampler
from sae_harvest.train.synthetic.store import Synthetic, make
from sae_harvest.train.synthetic.truth import Features, Firings

pytestmark = pytest.mark.usefixtures("unflushed")

SMALL = {"features": 48, "width": 16, "l0": 3, "parents": 4, "children": 2}
CONFIG = SyntheticConfig(**SMALL, rows=130 * 128)
N_ROOTS = 40


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground_truth") / "out"
    make(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def made(out: Path) -> Synthetic:
    return Synthetic.open(out)


def firings(made: Synthetic) -> Firings:
    found = [made.firings(shard) for shard in range(made.store.n_shards)]
    names = ("row", "feature", "magnitude")
    return Firings(*(np.concatenate([getattr(f, name) for f in found]) for name in names))


def dense(made: Synthetic) -> np.ndarray:
    """Magnitudes of all rows, [rows, features]."""
    found = firings(made)
    magnitudes = np.zeros((made.store.n_rows, len(made.features)))
    magnitudes[found.row, found.feature] = found.magnitude
    return magnitudes


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2])
def test_frequencies_are_a_power_law_whose_sum_is_l0(exponent):
    config = SyntheticConfig(features=100, l0=2.5, exponent=exponent, parents=0)
    found = config.frequencies()
    assert found.sum() == pytest.approx(2.5)
    assert found.max() <= 0.2
    free = np.flatnonzero(found < 0.2)
    rank = np.arange(1, 101)[free]
    assert np.allclose(found[free] * rank**exponent, found[free[0]] * rank[0] ** exponent)


def test_frequencies_of_children_worked_out_by_hand():
    """Four equal roots, of which one has two children on half of its rows: 4 p + p / 2 = 0.45."""
    config = SyntheticConfig(features=6, l0=0.45, exponent=0, parents=1, children=2)
    assert config.parent().tolist() == [-1, -1, -1, -1, 0, 0]
    assert np.allclose(config.frequencies(), [0.1, 0.1, 0.1, 0.1, 0.025, 0.025])


def test_rows_are_the_sums_of_what_fires(tmp_path):
    made = make(SyntheticConfig(**SMALL, noise=0, rows=1024), tmp_path)
    x = made.store.read("synthetic", 0, 1024)
    assert np.allclose(x, dense(made) @ made.features.directions, atol=2e-3)  # float16
    assert np.allclose(np.linalg.norm(made.features.directions, axis=1), 1, atol=1e-6)


def test_noise_has_the_length_that_was_asked_for(tmp_path):
    made = make(SyntheticConfig(**SMALL, noise=0.5, rows=4096), tmp_path)
    rest = made.store.read("synthetic", 0, 4096) - dense(made) @ made.features.directions
    assert np.square(rest).sum(1).mean() == pytest.approx(0.25, rel=0.03)
    assert abs(rest.mean()) < 0.005


def test_a_feature_fires_as_often_as_it_should(tmp_path):
    config = SyntheticConfig(**SMALL, correlation=0, rows=16_384)
    found = (dense(make(config, tmp_path)) > 0).mean(0)
    expected = config.frequencies()
    error = np.sqrt(expected * (1 - expected) / 16_384)
    assert (np.abs(found - expected) < 4 * error).all()
    assert found.sum() == pytest.approx(3, rel=0.02)


def test_a_child_fires_only_with_its_parent_and_alone_of_its_siblings(made):
    fires = dense(made) > 0
    children = np.arange(N_ROOTS, 48)
    parents = made.features.parent[children]
    assert parents.tolist() == [0, 0, 5, 5, 10, 10, 15, 15]
    assert not (fires[:, children] & ~fires[:, parents]).any()
    siblings = fires[:, children].reshape(-1, 4, 2).sum(2)
    assert siblings.max() == 1
    share = siblings.sum() / fires[:, parents[::2]].sum()
    assert share == pytest.approx(0.5, abs=0.02)


def test_features_of_a_group_fire_together_and_others_do_not(made):
    fires = (dense(made) > 0)[:, :N_ROOTS].astype(float)
    together = np.corrcoef(fires.T)
    group = made.features.group[:N_ROOTS]
    assert np.bincount(group).tolist() == [8] * 5
    same = (group[:, None] == group) & ~np.eye(N_ROOTS, dtype=bool)
    assert together[same].mean() > 0.05
    assert abs(together[group[:, None] != group].mean()) < 0.01
    assert (made.features.group[N_ROOTS:] == -1).all()


def test_rows_of_a_document_are_alike(made):
    """Half of the correlation comes from the document, so counts vary more than by chance."""
    found = firings(made)
    counts = np.zeros((made.store.n_contexts, 48))
    np.add.at(counts, (found.row // 128, found.feature), 1)
    p = counts.mean(0) / 128
    assert (counts.var(0) / (128 * p * (1 - p)))[:N_ROOTS].mean() > 1.5


def test_magnitudes_have_mean_1_and_the_spread_that_was_asked_for(made):
    logarithm = np.log(firings(made).magnitude.astype(float))
    assert np.exp(logarithm).mean() == pytest.approx(1, abs=0.01)
    assert logarithm.std() == pytest.approx(0.25, abs=0.01)


def test_a_token_names_the_strongest_feature(made):
    magnitudes = dense(made)
    strongest = np.where(magnitudes.any(1), magnitudes.argmax(1) + 1, 0)
    tokens = made.store.tokens(0, made.store.n_contexts).ravel()
    assert tokens.tolist() == strongest.tolist()


def test_the_store_is_whole_and_its_contexts_are_documents(out, made):
    report = verify(LocalObjects(out / "store"), lambda done, total: None)
    assert (report.damage, report.leftovers) == ([], [])
    store = made.store
    assert (store.n_rows, store.n_shards, store.sites) == (130 * 128, 3, ("synthetic",))
    document, text_hash = store.row_documents(1)
    assert document.tolist() == (64 + np.arange(64 * 128) // 128).tolist()
    assert len(np.unique(text_hash)) == 64


def test_tables_of_the_truth_are_sorted_and_say_their_format(out):
    for path in sorted((out / "ground_truth").rglob("*.parquet")):
        table = pq.read_table(path)
        assert table.schema.metadata[b"sae_harvest_ground_truth"] == b"1"
        names = ["feature"] if path.name == "features.parquet" else ["row", "feature"]
        assert table.equals(table.sort_by([(name, "ascending") for name in names]))
    features = pq.read_table(out / "ground_truth" / "features.parquet")
    assert features["parent"].null_count == N_ROOTS
    assert features["group"].null_count == 8


def test_contexts_do_not_depend_on_the_order_in_which_they_are_drawn():
    sampler = Sampler(CONFIG, Features.of(CONFIG))
    together, all_firings = sampler.contexts(3, 6)
    for context in (5, 3, 4):
        x, found = Sampler(CONFIG, Features.of(CONFIG)).contexts(context, context + 1)
        assert np.array_equal(x, together[(context - 3) * 128 : (context - 2) * 128])
        here = all_firings.row // 128 == context
        assert np.array_equal(found.magnitude, all_firings.magnitude[here])
        assert np.array_equal(found.row, all_firings.row[here])


def test_an_interrupted_store_is_continued(out, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make(CONFIG, tmp_path, stop)
    seen: list[tuple[int, int]] = []
    made = make(CONFIG, tmp_path, lambda *done: seen.append(done))
    assert seen == [(8192, 16_640), (16_384, 16_640), (16_640, 16_640)]
    whole = Synthetic.open(out)
    assert made.store.digest == whole.store.digest
    for shard in range(3):
        assert np.array_equal(made.firings(shard).magnitude, whole.firings(shard).magnitude)


def test_another_seed_gives_other_features_and_rows(made, tmp_path):
    other = make(CONFIG.model_copy(update={"seed": 1, "rows": 1024}), tmp_path)
    assert not np.allclose(other.features.directions, made.features.directions)
    assert not np.array_equal(other.firings(0).row[:100], made.firings(0).row[:100])


def test_the_command_writes_a_store_that_an_sae_is_trained_on(tmp_path):
    words = ["--features", "40", "--width", "16", "--l0", "2", "--parents", "4", "--rows", "4096"]
    result = CliRunner().invoke(main, ["synthetic", "--out", f"{tmp_path}/s", *words])
    assert result.exit_code == 0, result.output
    assert "Wrote 4,096 rows of 40 features in 16 dimensions to" in result.stdout
    store = ActivationStore.open(tmp_path / "s" / "store")
    assert store.plan["corpus"]["features"] == 40
    run = ["--n-latents", "64", "--k", "2", "--tokens", "2048", "--batch-rows", "256"]
    places = ["--store", f"{tmp_path}/s/store", "--out", f"{tmp_path}/sae", "--device", "cpu"]
    result = CliRunner().invoke(main, ["run", *places, *run])
    assert result.exit_code == 0, result.output
    assert SAE.load(tmp_path / "sae").config.model == "synthetic"


def test_options_and_fields_are_the_same():
    typed = {option for parameter in main.commands["synthetic"].params for option in parameter.opts}
    settings = SyntheticSettings.settings()
    assert {setting.spelling for setting in settings} | {"--config"} == typed
    assert all(setting.field.description for setting in settings)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"features": 100, "parents": 21}, r"parents must be at most .* got 21 > 100 / 5"),
        ({"features": 10, "parents": 0, "l0": 3}, r"l0 must be at most 2 .* got 3"),
        ({"correlation": 1}, "less than 1"),
    ],
)
def test_features_that_cannot_be_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        SyntheticConfig(**fields)


def test_a_folder_with_something_else_in_it_is_refused_in_a_sentence(out, tmp_path):
    with pytest.raises(PlanMismatchError, match=r"corpus\.l0: 3\.0 → 2\.0.* or another --out"):
        make(CONFIG.model_copy(update={"l0": 2.0}), out)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "letter").touch()
    with pytest.raises(SaeHarvestError, match=r"holds no store .* choose another --out"):
        make(CONFIG, tmp_path)


def test_damaged_or_missing_truth_is_refused_in_a_sentence(tmp_path):
    make(SyntheticConfig(**SMALL, rows=1024), tmp_path / "a")
    make(SyntheticConfig(**SMALL | {"width": 8}, rows=1024), tmp_path / "b")
    truth = tmp_path / "a" / "ground_truth"
    (truth / "firings" / "000000.parquet").write_bytes(b"no table")
    made = Synthetic.open(tmp_path / "a")
    with pytest.raises(RunError, match=r"000000\.parquet is damaged"):
        made.firings(0)
    with pytest.raises(RunError, match=r"000001\.parquet is missing"):
        made.firings(1)
    other = tmp_path / "b" / "ground_truth"
    other.rename(tmp_path / "kept")
    with pytest.raises(InputError, match="holds no ground truth"):
        Synthetic.open(tmp_path / "b")
    truth.rename(other)
    with pytest.raises(InputError, match="is not the ground truth of"):
        Synthetic.open(tmp_path / "b")
