"""What a feature build and the readers of its tables refuse, each in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from sae_harvest.common.errors import DamagedError, RunError
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.pipelines.features.encoding import sources
from sae_harvest.pipelines.features.encoding.dictionary import Dictionary, Neurons
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from tests.dictionaries import SITE, random_sae
from tests.feature_cases import (
    BUILD_CONFIG,
    RULE,
    SAE_LATENTS,
    build_refusal,
    read_table,
    refusal,
    save_sae,
)

Folders = tuple[Path, Path, Path]
OPTIONS = ("--top", 4, "--random", 3, "--window", 9)


@pytest.fixture
def broken(folders: Folders, tmp_path: Path) -> Path:
    """A copy of the tables, to be damaged."""
    shutil.copytree(folders[2], tmp_path / "features")
    return tmp_path / "features"


def test_an_sae_that_does_not_fit_is_refused(folders: Folders, tmp_path: Path) -> None:
    store, out = ActivationStore.open(folders[0]), tmp_path / "out"
    foreign = random_sae(store, 24, 4, RULE, model="other", model_weights="xxh3:0")
    foreign.save(tmp_path / "foreign")
    told = build_refusal(store.place, tmp_path / "foreign", out)
    assert "was trained on other with other weights" in told
    random_sae(store, 24, 4, RULE, d_in=31).save(tmp_path / "narrow")
    told = build_refusal(store.place, tmp_path / "narrow", out)
    assert "31" in told
    assert "32" in told
    random_sae(store, 24, 4, RULE, site="resid_post.0").save(tmp_path / "elsewhere")
    told = build_refusal(store.place, tmp_path / "elsewhere", out)
    assert "resid_post.0" in told
    assert SITE in told
    sae = folders[1]
    assert f"was trained on {SITE}" in build_refusal(store.place, sae, out, "--site", "mlp_act.1")
    assert f"{SITE} has none" in build_refusal(store.place, Path("identity"), out)  # no neurons
    assert not out.exists()


def test_folders_that_are_not_what_was_asked_for_are_refused(
    folders: Folders, tmp_path: Path
) -> None:
    store, sae, features = folders
    out = tmp_path / "out"
    assert "store" in build_refusal(tmp_path, sae, out)
    assert "no trained SAE" in build_refusal(store, tmp_path, out)
    assert "no trained SAE" in build_refusal(store, features, out)
    (tmp_path / "foreign").mkdir()
    file = tmp_path / "foreign" / "thesis.txt"
    file.write_text("years of work")
    assert "files that are not tables" in build_refusal(store, sae, tmp_path / "foreign")
    assert "files that are not tables" in build_refusal(store, sae, file)
    assert "Cannot write" in build_refusal(store, sae, file / "features")
    trained = save_sae(store, tmp_path / "sae")
    (trained / "run.json").write_text('{"n_latents": 48}\n')  # training writes one, too
    before = sorted(path.name for path in trained.iterdir())
    assert "files that are not tables" in build_refusal(store, trained, trained)
    assert "no feature tables" in refusal("show", 0, "--features", trained)
    assert sorted(path.name for path in trained.iterdir()) == before
    assert file.read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "sae"]
    assert "no feature tables" in refusal("query", "SELECT 1", "--features", out)
    assert "no feature tables" in refusal("query", "SELECT 1", "--features", file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused_by_number(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """For an SAE and for neurons; a row that the rule leaves out may hold anything."""
    store, read = ActivationStore.open(folders[0]), ActivationStore.read
    rule = RULE.model_copy(update={"split": "all"})
    selected = store.selected_in_shard(SITE, rule, 2)
    bad, spared = (2048 + int(np.flatnonzero(selected == one)[5]) for one in (True, False))
    row = spared

    def damaged(self: ActivationStore, site: str, start: int, stop: int, *rest: Any) -> Any:
        x = read(self, site, start, stop, *rest).copy()
        if start <= row < stop:
            x[row - start, 3] = value
        return x

    monkeypatch.setattr(ActivationStore, "read", damaged)
    given = sources.SourceSpec(store.place, str(folders[1]), None, None, "cpu")
    sources.StoreSource(given, None).firings(2048, 3072, 256, Event())
    row = bad
    told = build_refusal(store.place, folders[1], tmp_path / "out")
    assert f"holds values of {SITE} that are not finite, in row {bad};" in told
    assert not (tmp_path / "out" / "run.json").exists()
    neurons = Dictionary(SITE, RowRule(split="all"), Neurons(32), 32, 32, "identity", None, SITE)
    monkeypatch.setattr(sources, "load_dictionary", lambda *_: neurons)
    with pytest.raises(DamagedError, match=f"in row {bad};"):
        sources.StoreSource(given, None).firings(2048, 3072, 256, Event())


def test_missing_and_damaged_tables_are_refused_by_name(folders: Folders, broken: Path) -> None:
    store, sae, _ = folders
    (broken / "tokens.parquet").unlink()
    assert "tokens.parquet is missing" in refusal("show", 1, "--features", broken)
    assert "tokens.parquet is missing" in refusal("query", "FROM latents", "--features", broken)
    with pytest.raises(RunError, match=r"tokens\.parquet is missing"):
        build(store, sae, broken, BUILD_CONFIG)
    (broken / "tokens.parquet").write_bytes(b"PAR1 and then nothing")
    assert "tokens.parquet is damaged" in refusal("show", 1, "--features", broken)


def test_firings_that_are_gone_or_damaged_are_refused_by_name(broken: Path) -> None:
    last = broken / "firings" / "000000.parquet"
    last.write_bytes(b"PAR1 and then nothing")
    told = refusal("query", "SELECT count(*) FROM firings", "--features", broken)
    assert "firings" in told
    shutil.rmtree(broken / "firings")
    assert "firings" in refusal("query", "SELECT count(*) FROM firings", "--features", broken)


def test_damaged_ancestry_is_refused_by_name(folders: Folders, broken: Path) -> None:
    store, sae, _ = folders
    for text in ("{", "", "\udcff"):
        (broken / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "run.json is damaged" in refusal("show", 1, "--features", broken)
        assert "run.json is damaged" in build_refusal(store, sae, broken, *OPTIONS)
    for text in ("[]", "null", "3"):
        (broken / "run.json").write_text(text)
        assert "no feature tables" in refusal("show", 1, "--features", broken)
        assert "files that are not tables" in build_refusal(store, sae, broken, *OPTIONS)


def test_tables_of_another_format_are_refused(folders: Folders, broken: Path) -> None:
    run = (broken / "run.json").read_text()
    assert '"tables": "3"' in run
    (broken / "run.json").write_text(run.replace('"tables": "3"', '"tables": "1"'))
    for told in (
        refusal("show", 1, "--features", broken),
        refusal("query", "FROM latents", "--features", broken),
        build_refusal(folders[0], folders[1], broken, *OPTIONS),
    ):
        assert "tables of format 1, this version reads 3" in told


def test_every_table_says_its_format(folders: Folders) -> None:
    files = list(folders[2].rglob("*.parquet"))
    assert len(files) == 6 + 8
    for file in files:
        assert pq.read_schema(file).metadata[b"sae_harvest_tables"] == b"3"


def test_a_disk_that_refuses_is_named(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "features"
    out.symlink_to("/proc/1/task")  # a folder that nothing can be written into
    told = build_refusal(folders[0], folders[1], out)
    assert str(out) in told


@pytest.mark.parametrize("option", [("--seed", 2**63), ("--seed", 10**30)])
def test_options_out_of_bounds_are_refused_before_anything_is_made(
    folders: Folders, tmp_path: Path, option: tuple[str, int]
) -> None:
    given = ["build", "--store", folders[0], "--sae", folders[1], "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, [str(word) for word in (*given, *option)])
    assert result.exit_code in (1, 2), result.exception
    assert "Error: " in result.stderr
    assert "seed" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM nowhere", "nowhere"),
        ("SELECT nothing FROM latents", "nothing"),
        ("SELECT error('on purpose')", "on purpose"),
        ("", "empty"),
        ("/* a thought */", "empty"),
    ],
)
def test_bad_sql_is_one_sentence(folders: Folders, sql: str, said: str) -> None:
    assert said in refusal("query", sql, "--features", folders[2])


@pytest.mark.parametrize("latent", [SAE_LATENTS, 2**31, 2**63, 10**60])
def test_an_unknown_latent_is_one_sentence(folders: Folders, latent: int) -> None:
    assert f"0 to {SAE_LATENTS - 1}" in refusal("show", latent, "--features", folders[2])
    assert len(read_table(folders[2], "latents")) == SAE_LATENTS
