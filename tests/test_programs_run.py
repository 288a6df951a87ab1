"""Programs of real tables: the file, the figures, interruption, and where they are shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rich.console import Console

from sae_harvest.common.errors import RunError
from sae_harvest.common.locks import lock
from sae_harvest.pipelines.evaluate.baselines import RANDOM
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF
from sae_harvest.pipelines.evaluate.programs import asking, run, scoring
from sae_harvest.pipelines.evaluate.programs.asking import ModelActivations
from sae_harvest.pipelines.evaluate.programs.forms import ANY
from sae_harvest.pipelines.evaluate.programs.n2g import Input
from sae_harvest.pipelines.evaluate.programs.run import write_programs
from sae_harvest.pipelines.evaluate.programs.scoring import KINDS
from sae_harvest.pipelines.evaluate.programs.source import TablesSource
from sae_harvest.pipelines.evaluate.programs.suffixes import Suffixes, TokenRows
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.pipelines.features.reading.query import asked
from sae_harvest.pipelines.features.reading.show import render_latent
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.source import NOTHING_MOVED
from sae_harvest.pipelines.viewer.latent import latent_page
from sae_harvest.pipelines.viewer.tables import Tables
from tests.feature_cases import DEAD, SAE_LATENTS, read_table, refusal

N2G_LATENTS = 3
pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.fixture(scope="module")
def made(
    folders: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list]:
    """Tables with programs, and the figures."""
    place = tmp_path_factory.mktemp("programs") / "features"
    shutil.copytree(folders[2], place)
    return place, write_programs(place, n2g_latents=N2G_LATENTS)


def test_every_latent_has_its_programs_sorted_and_scored(made: tuple[Path, list]) -> None:
    features, _ = made
    assert not [path for path in features.iterdir() if path.name.startswith((".", "programs."))
                and path.name != "programs.parquet"]  # fmt: skip
    metadata = pq.read_schema(features / "programs.parquet").metadata
    assert metadata[b"sae_harvest_programs"] == b"1"
    rows = read_table(features, "programs")
    keys = [(row["latent"], row["kind"]) for row in rows]
    assert keys == sorted(keys)
    for kind in KINDS:
        assert [n for n, k in keys if k == kind] == [*range(SAE_LATENTS)]
    sampled = {n for n, k in keys if k == "n2g"}
    assert len(sampled) == N2G_LATENTS
    assert DEAD not in sampled
    assert sampled == {n for n, k in keys if k == "n2g_exceptions"}
    source = TablesSource.open(features, NOTHING_MOVED)
    own = source.own.rows
    for row in rows:
        assert len(row["patterns"]) == len(row["predictions"])
        if not row["positives"]:
            assert row["f1"] is None
            continue
        # the machine form predicts what was scored
        x = predicted(own, row["patterns"], row["predictions"])[own.test]
        test = source.own.firings(row["latent"])[1]
        y = np.zeros(len(own.token))
        y[test.row] = test.value
        hit, fires = x >= np.float32(row["threshold"] or np.inf), y[own.test] > 0
        assert row["rows"] == own.test.sum()
        assert row["positives"] == fires.sum()
        assert row["f1"] == pytest.approx(2 * (hit & fires).sum() / (hit.sum() + fires.sum()))
        assert row["f1_low"] <= row["f1"] + 1e-6
        assert row["f1"] <= row["f1_high"] + 1e-6
        share = fires.mean()
        assert row["always_f1"] == pytest.approx(2 * share / (1 + share))


def predicted(
    rows: TokenRows, patterns: Sequence[Sequence[int]], predictions: Sequence[float]
) -> np.ndarray:
    """As docs/tables.md says: of the patterns that match, the one with most tokens decides."""
    found = np.zeros(len(rows.token), np.float32)
    ranked = zip(patterns, predictions, strict=True)
    for pattern, value in sorted(ranked, key=lambda one: (n_tokens(one[0]), len(one[0]), one[1])):
        matches = np.ones(len(found), bool)
        for back, token in enumerate(reversed(pattern)):
            if token != ANY:
                matches &= rows.before(back) == token
        found[matches] = value
    return found


def n_tokens(pattern: Sequence[int]) -> int:
    return sum(token != ANY for token in pattern)


def test_figures_stand_beside_their_baselines(made: tuple[Path, list]) -> None:
    features, figures = made
    found = {(f.metric, f.subject, f.part): f for f in figures}
    for kind in (*KINDS, "n2g", "n2g_exceptions"):
        for subject in (SAE_ITSELF, RANDOM, run.OTHER, run.CONSTANT):
            if subject == RANDOM or ("program_f1", subject, kind) in found:
                figure = found["program_f1", subject, kind]
                assert figure.unit == "latents"
                assert 0 <= figure.low <= figure.value <= figure.high <= 1
    rows = [r for r in read_table(features, "programs") if (r["positives"] or 0) >= 10]
    some = [r["f1"] for r in rows if r["kind"] == "ngrams"]
    figure = found["program_f1", SAE_ITSELF, "ngrams"]
    assert (figure.count, figure.value) == (len(some), pytest.approx(np.mean(some)))
    other = [r["other_auprc"] for r in rows if r["kind"] == "ngrams"]
    assert found["program_auprc", run.OTHER, "ngrams"].value == pytest.approx(np.mean(other))
    constant = found["program_f1", run.CONSTANT, "tokens"]
    assert constant.value == pytest.approx(np.mean([r["always_f1"] for r in rows
                                                    if r["kind"] == "tokens"]))  # fmt: skip


def test_the_file_is_the_same_in_pieces_of_any_size(
    made: tuple[Path, list], folders: tuple[Path, Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    features, figures = made
    shutil.copytree(folders[2], tmp_path / "again")
    monkeypatch.setattr(scoring, "AT_ONCE", 1)
    monkeypatch.setattr(asking, "BATCH_TOKENS", 64)
    again = write_programs(tmp_path / "again", n2g_latents=N2G_LATENTS)
    name = "programs.parquet"
    assert pq.read_table(tmp_path / "again" / name).equals(pq.read_table(features / name))
    assert again == figures


def test_contexts_may_come_in_any_order(made: tuple[Path, list]) -> None:
    source = TablesSource.open(made[0], NOTHING_MOVED)
    rows, length = source.own.rows, source.own.rows.context_length
    order = np.random.default_rng(0).permutation(len(rows.token) // length)
    moved = (order[:, None] * length + np.arange(length)).reshape(-1)  # new place → old row
    place = np.argsort(moved)
    there = TokenRows(
        rows.token[moved], rows.train[moved], rows.test[moved], rows.cluster[moved], length
    )
    one, two = source.own.suffixes, Suffixes.of(there)
    for latent in (3, 11):
        scores = []
        for suffixes, new in ((one, None), (two, place)):
            train, test = (
                part if new is None else by_row(part, new) for part in source.own.firings(latent)
            )
            tries = scoring.learn(suffixes, latent, train)
            group = scoring.score("ngrams", tries, suffixes, test, suffixes.cluster_rows)
            scores.append((group.scores, tries))
        (first, tries), (second, other) = scores
        assert second.values == pytest.approx(first.values, abs=1e-9)
        assert np.sort(other.value) == pytest.approx(np.sort(tries.value))
        assert other.threshold == pytest.approx(tries.threshold)


def by_row(firings: scoring.SplitFirings, place: np.ndarray) -> scoring.SplitFirings:
    order = np.argsort(place[firings.row])
    return scoring.SplitFirings(firings.starts, place[firings.row][order], firings.value[order])


def test_a_killed_search_goes_on_without_repeating_latents(
    made: tuple[Path, list], folders: tuple[Path, Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    features = tmp_path / "features"
    shutil.copytree(folders[2], features)
    monkeypatch.setattr("sae_harvest.pipelines.evaluate.programs.finding.LATENTS_AT_ONCE", 1)
    asked_of, original = list[int](), ModelActivations.__call__

    def killed(self: ModelActivations, inputs: Sequence[Input]) -> np.ndarray:
        asked_of.extend(latent for latent, _ in inputs)
        if len(set(asked_of)) == N2G_LATENTS:
            raise KeyboardInterrupt
        return original(self, inputs)

    monkeypatch.setattr(ModelActivations, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        write_programs(features, n2g_latents=N2G_LATENTS)
    assert not (features / "programs.parquet").exists()
    finished = set(asked_of[:-1]) - {asked_of[-1]}
    assert len(finished) == N2G_LATENTS - 1
    again = list[int]()

    def watched(self: ModelActivations, inputs: Sequence[Input]) -> np.ndarray:
        if self.sae_digest == source_digest:
            again.extend(latent for latent, _ in inputs)
        return original(self, inputs)

    source_digest = TablesSource.open(features, NOTHING_MOVED).sae.digest
    monkeypatch.setattr(
        ModelActivations, "sae_digest", property(lambda self: self._live.sae.digest), raising=False
    )
    monkeypatch.setattr(ModelActivations, "__call__", watched)
    write_programs(features, n2g_latents=N2G_LATENTS)
    assert set(again).isdisjoint(finished)
    assert len(set(again)) == 1
    name = "programs.parquet"
    assert pq.read_table(features / name).equals(pq.read_table(made[0] / name))


def test_the_model_gives_the_activations_of_the_tables(folders: tuple[Path, Path, Path]) -> None:
    features = folders[2]
    live = LiveModel.open(features)
    ask, text = ModelActivations(live, batch_tokens=40), live.tokens("the cat sees the bridge")
    found = live.activations("the cat sees the bridge")
    inputs = [
        (latent, tuple(text[: n + 1])) for n in range(len(text)) for latent in range(SAE_LATENTS)
    ]
    expected = np.zeros((len(text), SAE_LATENTS))
    for n in range(len(text)):
        np.add.at(expected[n], found.indices[n], found.values[n])
    assert ask(inputs) == pytest.approx(expected.ravel(), abs=1e-4)
    assert ask.asked == len(inputs)
    assert isinstance(ask.padding, int)


def test_programs_are_shown_and_queried(made: tuple[Path, list]) -> None:
    features, _ = made
    (latent,) = {r["latent"] for r in read_table(features, "programs") if r["kind"] == "n2g"} & {
        min(r["latent"] for r in read_table(features, "programs") if r["kind"] == "n2g")
    }
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render_latent(features, latent, 2))
    text = console.export_text()
    assert "programs, scored on" in text
    assert "n2g_exceptions" in text
    with asked(features, "SELECT count(*) FROM programs WHERE kind = 'ngrams'") as question:
        _, rows = question.rows(None)
        assert [*rows] == [(SAE_LATENTS,)]
    page = latent_page(Tables(features), latent)
    assert [p["kind"] for p in page["programs"]] == ["n2g", "n2g_exceptions", "ngrams", "tokens"]
    json.dumps(page, allow_nan=False)


def test_the_command_prints_means_with_their_baselines(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[2], tmp_path / "features")
    arguments = ["programs", "--features", str(tmp_path / "features"), "--n2g-latents", "0"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    for word in ("random", "constant", "ngrams", "is written"):
        assert word in result.output
    assert "n2g" not in {r["kind"] for r in read_table(tmp_path / "features", "programs")}
    page = latent_page(Tables(tmp_path / "features"), DEAD)
    assert [p["f1"] for p in page["programs"]] == [None, None]


def test_what_cannot_be_done_is_said(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(folders[2], features)
    with (
        lock(features / run.LOCK),
        pytest.raises(RunError, match="Another process is writing programs"),
    ):
        write_programs(features, n2g_latents=0)
    record = json.loads((features / "run.json").read_text())
    (features / "run.json").write_text(json.dumps(record | {"sae": "delphi"}))
    assert "a cache of delphi" in refusal("programs", "--features", features)
    (features / "run.json").write_text(json.dumps(record))
    (features / "firings" / "000001.parquet").unlink()
    assert "files of firings, expected" in refusal("programs", "--features", features)
    (features / "programs.parquet").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"programs\.parquet is damaged"):
        TablesSource.open(features, NOTHING_MOVED)
