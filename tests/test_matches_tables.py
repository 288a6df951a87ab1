"""`sae-features diff` over real tables: two SAEs on one store, and stores of the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.evaluate.matching import spans as spans_module
from sae_harvest.pipelines.evaluate.matching.common import Side, common_rows
from sae_harvest.pipelines.evaluate.matching.diff import diff, summary
from sae_harvest.pipelines.evaluate.matching.spans import Spans
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.sae import SAE
from tests.dictionaries import SITE
from tests.feature_cases import refusal
from tests.match_cases import slow

pytest_plugins = ("tests.viewer_fixtures",)

FEW = FeatureConfig(
    n_top=1, n_decile=0, n_random=0, n_inactive=0, n_hard=0, window_tokens=4, n_neighbours=1,
    n_tokens=1, n_logits=1,
)  # fmt: skip
OTHER_RULE = RowRule(max_norm_medians=1.1, heldout_fraction=0.3)


@pytest.fixture(scope="module")
def other(folders, tmp_path_factory):
    """Tables of the same SAE with its latents in another order, fewer of them, and other rows."""
    store, sae, _ = folders
    folder = tmp_path_factory.mktemp("other")
    whole = SAE.load(sae)
    order = torch.from_numpy(np.random.default_rng(0).permutation(whole.config.n_latents)[:40])
    config = whole.config.model_copy(update={"n_latents": 40, "k": 5, "rule": OTHER_RULE})
    rows = [x[order].contiguous() for x in (whole.W_enc, whole.W_dec, whole.b_enc)]
    SAE(config, *rows, whole.b_dec).save(folder / "sae")
    build(store, folder / "sae", folder / "features", FEW, device="cpu")
    return folder / "features"


def dense(features: Path, n_rows: int) -> np.ndarray:
    """Activations [rows, latents] from the files, for readers of Parquet."""
    table = pq.read_table(features / "firings")
    run = json.loads((features / "run.json").read_text())
    found = np.zeros((n_rows, run["n_latents"]), np.float32)
    found[table["row"].to_numpy(), table["latent"].to_numpy()] = table["value"].to_numpy()
    return found


@pytest.fixture(scope="module")
def compared(folders, other, tmp_path_factory):
    out = tmp_path_factory.mktemp("diff") / "out"
    return out, diff(folders[2], other, out)


def test_all_rows_that_both_rules_read_are_counted(folders, other, compared):
    store, _, features = folders
    out, found = compared
    opened = ActivationStore.open(store)
    rules = [RowRule(max_norm_medians=limit, split="all") for limit in (1.2, 1.1)]
    read = np.logical_and.reduce([opened.selected(SITE, rule) for rule in rules])
    assert found.record["rows"] == read.sum() < opened.n_rows
    a, b = (dense(f, opened.n_rows)[read] for f in (features, other))
    expected = slow(a, b)
    got = set()
    for row in pq.read_table(out / "matches.parquet").to_pylist():
        one = -1 if row["class"] == "born" else row["latent_a"]
        two = -1 if row["class"] == "died" else row["latent_b"]
        got.add((one, two, row["class"], row["child"]))
        x, y = a[:, row["latent_a"]] > 0, b[:, row["latent_b"]] > 0
        assert (row["both_fire"], row["a_only"], row["b_only"]) == (
            (x & y).sum(), (x & ~y).sum(), (y & ~x).sum()
        )  # fmt: skip
        assert row["jaccard"] == pytest.approx((x & y).sum() / (x | y).sum())
        assert row["coverage"] == pytest.approx((x & y).sum() / x.sum())
        assert row["precision"] == pytest.approx((x & y).sum() / y.sum())
    assert got == expected
    assert {name for *_, name, _ in got} >= {"same", "died"}


def test_cosines_are_those_of_decoder_rows(folders, other, compared):
    out, _ = compared
    mine, theirs = SAE.load(folders[1]).W_dec, SAE.load(other.parent / "sae").W_dec
    for row in pq.read_table(out / "matches.parquet").to_pylist():
        one, two = mine[row["latent_a"]], theirs[row["latent_b"]]
        expected = torch.nn.functional.cosine_similarity(one, two, dim=0).item()
        assert row["decoder_cosine"] == pytest.approx(expected, abs=1e-5)
        if row["class"] != "absorbed":
            assert row["parent_cosine"] is None
            continue
        weights, child = (mine, one) if row["child"] == "A" else (theirs, two)
        parent = weights[row["parent"]]
        expected = torch.nn.functional.cosine_similarity(child, parent, dim=0).item()
        assert row["parent_cosine"] == pytest.approx(expected, abs=1e-5)


def test_contexts_show_both_latents_on_the_rows_where_they_disagree(folders, other, compared):
    store, _, features = folders
    out, _ = compared
    opened = ActivationStore.open(store)
    a, b = (dense(f, opened.n_rows) for f in (features, other))
    for side, rules in ((a, 1.1), (b, 1.2)):
        side[~opened.selected(SITE, RowRule(max_norm_medians=rules, split="all"))] = 0
    rows = pq.read_table(out / "disagreements.parquet").to_pylist()
    assert rows
    for row in rows:
        begin = row["context"] * opened.context_length + row["window_start"]
        here = slice(begin, begin + len(row["token_ids"]))
        assert row["activations_a"] == a[here, row["latent_a"]].tolist()
        assert row["activations_b"] == b[here, row["latent_b"]].tolist()
        assert row["row"] % opened.context_length == row["position"]
        fires, silent = ("b", "a") if row["kind"] == "B only" else ("a", "b")
        at = row["row"] - begin
        assert row[f"activations_{fires}"][at] > 0 or row["kind"] == "parent silent"
        assert row[f"activations_{silent}"][at] == 0 or row["kind"] == "parent silent"
        tokens = opened.tokens(row["context"], row["context"] + 1)[0]
        start = row["window_start"]
        assert row["token_ids"] == tokens[start : start + len(row["token_ids"])].tolist()
        assert row["token_ends"][-1] == len(row["text"])
        shard, inside = divmod(row["row"], opened.shard_rows)
        assert row["document"] == opened.row_documents(shard)[0][inside]


def test_spans_of_other_files_change_nothing(folders, other, compared, tmp_path, monkeypatch):
    out, _ = compared
    rows = common_rows(Side.open(folders[2]), Side.open(other))
    assert len(Spans(rows)) == 1
    monkeypatch.setattr(spans_module, "SPAN_FIRINGS", 1)
    assert len(Spans(rows)) > 1
    diff(folders[2], other, tmp_path / "out")
    for name in ("matches", "disagreements"):
        one, two = (pq.read_table(f / f"{name}.parquet") for f in (out, tmp_path / "out"))
        assert one.equals(two)


def test_the_command_says_what_became_of_the_latents(folders, other, compared, tmp_path):
    out, found = compared
    result = CliRunner().invoke(
        main, ["diff", str(folders[2]), str(other), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    for line in summary(found):
        assert line in result.stdout
    counts = found.record["latents"]
    assert sum(counts["a"].values()) == 48
    assert sum(counts["b"].values()) == 40
    [[by_sql]] = duckdb.sql(
        f"SELECT count(DISTINCT latent_a) FROM '{out}/matches.parquet' WHERE class = 'same'"
    ).fetchall()
    assert by_sql == counts["a"]["same"]
    record = json.loads((out / "matches.json").read_text())
    assert record["a"]["sae_digest"] == SAE.load(folders[1]).digest
    message = refusal("diff", folders[2], other, "--out", tmp_path / "out")
    assert "holds something already" in message


def test_other_rows_are_refused_in_a_sentence(folders, other, tmp_path, monkeypatch):
    a, b = Side.open(folders[2]), Side.open(other)
    tokens, digest = ActivationStore.tokens, ActivationStore.digest
    theirs = ActivationStore.open(folders[0])
    object.__setattr__(b, "store", theirs)
    monkeypatch.setattr(
        ActivationStore,
        "digest",
        property(lambda self: "other" if self is theirs else digest.fget(self)),
    )
    assert common_rows(a, b).n_rows == a.store.n_rows  # other activations of the same tokens

    def changed(self, first, last):
        return tokens(self, first, last) + (self is theirs)

    monkeypatch.setattr(ActivationStore, "tokens", changed)
    with pytest.raises(InputError, match="hold other texts, first in context 0"):
        common_rows(a, b)
    monkeypatch.setattr(
        ActivationStore,
        "context_length",
        property(lambda self: 16 if self is theirs else 32),
    )
    with pytest.raises(InputError, match="contexts of 32 and 16 tokens"):
        common_rows(a, b)
    with pytest.raises(RunError, match="no feature tables"):
        diff(folders[2], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_server_shows_classes_pairs_and_contexts(folders, other, compared):
    pytest.importorskip("uvicorn", reason="the viewer's server is an extra: .[viewer]")
    from sae_harvest.pipelines.viewer.server import open_viewer
    from tests.viewer_cases import served

    out, found = compared
    pairs = pq.read_table(out / "matches.parquet").to_pylist()
    with served(open_viewer(folders[2], other, matches=out)) as client:
        about = client.ask("/api/start").json["matches"]
        assert about["rows"] == found.record["rows"]
        assert {c["name"]: c["pairs"] for c in about["classes"]} == found.pairs
        got = []
        for offset in range(0, found.pairs["same"], about["page"]):
            got += client.ask(f"/api/matches?class=same&offset={offset}").json["rows"]
        expected = [p for p in pairs if p["class"] == "same"]
        assert {(r["latent_a"], r["latent_b"]) for r in got} == {
            (p["latent_a"], p["latent_b"]) for p in expected
        }
        assert [r["jaccard"] for r in got] == sorted((r["jaccard"] for r in got), reverse=True)
        some = [context for row in got for context in row["contexts"]]
        for context in some:
            assert context["stratum"] == ("A only" if context["fires"] == "a" else "B only")
            assert dict(map(tuple, context["heat"]))[context["place"]] == context["activation"]
        assert some
        died = client.ask("/api/matches?class=died").json["rows"]
        assert [r["a_only"] for r in died] == sorted((r["a_only"] for r in died), reverse=True)
        assert client.ask("/api/matches?class=odd").status == 400
        assert client.ask("/api/matches?class=same&offset=-1").status == 400
    with served(open_viewer(folders[2], other)) as client:
        assert client.ask("/api/start").json["matches"] is None
        assert "--matches" in client.ask("/api/matches?class=same").json["error"]
    with pytest.raises(RunError, match=r"matches of other tables than .* \(another sae_digest\)"):
        open_viewer(other, folders[2], matches=out)
    with pytest.raises(InputError, match="give the tables of the second with --compare"):
        open_viewer(folders[2], matches=out)
    with pytest.raises(RunError, match=r"holds no matches \(no matches.json there\)"):
        open_viewer(folders[2], other, matches=folders[2])


def test_damaged_matches_are_refused_in_a_sentence(folders, other, compared, tmp_path):
    from sae_harvest.pipelines.viewer.matches import Matches
    from sae_harvest.pipelines.viewer.tables import Tables

    out, _ = compared
    tables = Tables(folders[2]), Tables(other)
    for name in ("matches.parquet", "disagreements.parquet"):
        copy = tmp_path / name
        shutil.copytree(out, copy)
        (copy / name).write_bytes(b"PAR1")
        with pytest.raises(RunError, match=rf"{name} is missing or damaged"):
            Matches(copy, *tables)
    copy = tmp_path / "format"
    shutil.copytree(out, copy)
    (copy / "matches.json").write_text('{"matches": "9"}')
    with pytest.raises(RunError, match="holds matches of format 9, this version reads 1"):
        Matches(copy, *tables)
    (copy / "matches.json").write_text('{"matches": "1", "a": 3}')
    with pytest.raises(RunError, match=r"matches\.json is damaged \("):
        Matches(copy, *tables)
    shutil.copy(out / "matches.json", copy)
    pq.write_table(pa.table({"pair": [1]}), copy / "disagreements.parquet")
    with pytest.raises(RunError, match="no table of disagreements: it has other columns"):
        Matches(copy, *tables)
    table = pq.read_table(out / "disagreements.parquet")
    start = pa.array(table["window_start"].to_numpy() + 50, pa.int32())
    moved = table.set_column(table.schema.get_field_index("window_start"), "window_start", start)
    pq.write_table(moved, copy / "disagreements.parquet")
    with pytest.raises(RunError, match=r"a context of pair \d+ does not fit its text"):
        Matches(copy, *tables).page("same", 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["server", "site"])
def test_the_compare_page_shows_what_became_of_the_latents(
    page, folders, other, compared, tmp_path, kind
):
    from sae_harvest.pipelines.viewer.server import open_viewer
    from sae_harvest.pipelines.viewer.site import write_site
    from tests.viewer_cases import served

    out, found = compared
    if kind == "site":
        write_site(folders[2], other, tmp_path / "out", matches=out)
        walk_matches(page, f"file://{tmp_path}/out/index.html", found)
    else:
        with served(open_viewer(folders[2], other, matches=out)) as client:
            walk_matches(page, f"http://127.0.0.1:{client.port}/", found)


def walk_matches(page, base, found):
    from tests.viewer_cases import go

    go(page, base, "compare")
    page.wait_for_selector(".pair")
    assert page.locator(".pair").count() == min(20, found.pairs["same"])
    page.get_by_role("button", name="died").click()
    page.wait_for_selector(f".pager:has-text('of {found.pairs['died']} pairs')")
    assert page.locator(".disagreement .kind").first.inner_text() == "A only"
    page.get_by_role("button", name="same").click()
    page.wait_for_selector(f".pager:has-text('of {found.pairs['same']} pairs')")
    page.get_by_role("button", name="next →").first.click()
    page.wait_for_selector(f".pager:has-text('21–{found.pairs['same']}')")
    page.locator(".pair a.latent").nth(1).click()
    page.wait_for_selector("h1:has-text('Latent')")
    assert "#/b/latent/" in page.url
