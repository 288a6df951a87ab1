"""Tables of a real store: what they hold, who may read them, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console

from sae_harvest.common.errors import RunError
from sae_harvest.harvest.model.models import load_tokenizer, resolve_model
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.pipelines.features.counting import neighbours as neighbours_module
from sae_harvest.pipelines.features.counting.neighbours import counted_rows
from sae_harvest.pipelines.features.encoding import sources
from sae_harvest.pipelines.features.reading.show import highlight, render_latent
from sae_harvest.pipelines.features.tables.contexts import STRATA
from sae_harvest.pipelines.features.tables.folder import TABLES
from sae_harvest.pipelines.features.tables.rows import for_scores
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE
from tests.dictionaries import SITE, random_sae
from tests.feature_cases import (
    BUILD_CONFIG,
    DEAD,
    ENTRIES,
    RULE,
    SAE_LATENTS,
    assert_same_files,
    build_refusal,
    contents,
    encode_blocks,
    made_case,
    read_table,
    save_sae,
    tokens_of,
)
from tests.forked import SERVER

Folders = tuple[Path, Path, Path]
Truth = tuple[ActivationStore, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def truth(folders: Folders) -> Truth:
    return truth_of(folders[0], folders[1])


def truth_of(place: Path, sae_folder: Path) -> Truth:
    """Store, rows that are read, activations [rows, n_latents]; 0 where nothing is read."""
    store, sae = ActivationStore.open(place), SAE.load(sae_folder)
    read = store.selected(SITE, RULE.model_copy(update={"split": "all"}))
    assert 0.5 < read.mean() < 0.99
    x = torch.from_numpy(store.read(SITE, 0, store.n_rows)[read]).float()
    indices, values = sae.encode(x)
    dense = np.zeros((store.n_rows, sae.config.n_latents), np.float32)
    np.add.at(dense, (np.flatnonzero(read)[:, None], indices.numpy()), values.numpy())
    return store, read, dense


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_every_table_is_there_and_sorted(folders: Folders) -> None:
    features = folders[2]
    assert {p.name for p in features.iterdir()} == ENTRIES
    keys: dict[str, Any] = {
        "latents": lambda row: row["latent"],
        "contexts": lambda row: (row["latent"], STRATA.index(row["stratum"]), row["rank"]),
        "histograms": lambda row: (row["latent"], row["bin"]),
        "neighbours": lambda row: (row["latent"], row["other"]),
        "tokens": lambda row: (row["token"], -row["count"], row["latent"]),
        "documents": lambda row: row["document"],
    }
    assert set(keys) == set(TABLES)
    for name, key in keys.items():
        order = [key(row) for row in read_table(features, name)]
        assert order == sorted(order)
        assert len(set(order)) == len(order)
    assert [r["latent"] for r in read_table(features, "latents")] == list(range(SAE_LATENTS))


def test_counts_are_those_of_encoding_every_row_the_rule_reads(
    folders: Folders, truth: Truth
) -> None:
    store, read, dense = truth
    by_context = dense.reshape(store.n_contexts, -1, SAE_LATENTS)
    for row in read_table(folders[2], "latents"):
        a = dense[:, row["latent"]].astype(float)
        assert row["n_fire"] == (a > 0).sum()
        assert row["n_contexts"] == (by_context[:, :, row["latent"]] > 0).any(axis=1).sum()
        assert row["density"] == pytest.approx((a > 0).sum() / read.sum())
        assert row["max"] == a.max()
        assert row["mean_square"] == pytest.approx((a**2).sum() / read.sum())
        assert row["dead"] == (row["latent"] == DEAD)
        assert len(row["top_logit_tokens"]) == len(row["bottom_logits"]) == BUILD_CONFIG.n_logits
    run = json.loads((folders[2] / "run.json").read_text())
    assert run["tables"] == "3"
    for name, folder in (("store", folders[0]), ("sae", folders[1])):
        assert (folders[2] / run["relative"][name]).resolve() == folder.resolve()
    assert run["n_rows"] == run["cofire_rows"] == read.sum()
    assert run["n_firings"] == (dense > 0).sum()
    assert run["store_digest"] == store.digest
    assert run["sae_digest"] == SAE.load(folders[1]).digest


def test_firings_are_all_there_is(folders: Folders, truth: Truth) -> None:
    dense, features = truth[2], folders[2]
    firings = read_table(features, "firings/*")
    latent, row = np.nonzero(dense.T)
    found = sorted((f["latent"], f["row"], f["value"]) for f in firings)
    assert found == list(zip(latent, row, dense[row, latent], strict=True))


def test_contexts_say_what_the_store_and_the_sae_say(folders: Folders, truth: Truth) -> None:
    store, read, dense = truth
    tokenizer = load_tokenizer(resolve_model(store.plan["model"]["name"]))
    tokens = store.tokens(0, store.n_contexts)
    parts = [store.row_documents(shard) for shard in range(store.n_shards)]
    documents, hashes = (np.concatenate(p) for p in zip(*parts, strict=True))
    scored, window = for_scores(hashes), BUILD_CONFIG.window_tokens
    contexts = read_table(folders[2], "contexts")
    assert {row["stratum"] for row in contexts} == set(STRATA)
    for row in contexts:
        begin = row["window_start"]
        here = slice(row["context"] * store.context_length + begin, None)
        assert row["row"] == row["context"] * store.context_length + row["position"]
        assert 0 <= begin <= row["position"] < begin + window <= store.context_length
        assert row["document"] == documents[row["row"]]
        assert row["split"] == ("score" if scored[row["row"]] else "explain")
        assert row["token_ids"] == tokens[row["context"], begin : begin + window].tolist()
        assert row["activations"] == dense[here, row["latent"]][:window].tolist()
        assert row["activation"] == dense[row["row"], row["latent"]]
        assert row["text"] == tokenizer.decode(row["token_ids"])
        assert row["token_ends"][-1] == len(row["text"])
        for piece, token in zip(tokens_of(row), row["token_ids"], strict=True):
            alone = tokenizer.decode([token])
            assert piece == alone or "\ufffd" in alone
        silent = row["stratum"] in ("inactive", "hard_negative")
        assert (sum(row["activations"]) == 0) == (row["activation"] == 0) == silent
        assert read[row["row"]]
    of_document = {row["document"]: row["split"] for row in contexts}
    assert all(row["split"] == of_document[row["document"]] for row in contexts)
    assert set(of_document.values()) == {"explain", "score"}


def test_top_and_random_are_complete(folders: Folders, truth: Truth) -> None:
    store, _, dense = truth
    contexts = read_table(folders[2], "contexts")
    documents = np.concatenate([store.row_documents(s)[0] for s in range(store.n_shards)])
    for latent in range(SAE_LATENTS):
        mine = [row for row in contexts if row["latent"] == latent]
        best: dict[int, int] = {}
        for row in np.argsort(-dense[:, latent], kind="stable").tolist():
            if dense[row, latent] > 0:
                best.setdefault(documents[row], row)
        top = [row["row"] for row in mine if row["stratum"] == "top"]
        assert top == list(best.values())[: BUILD_CONFIG.n_top]
        drawn = {row["row"] for row in mine if row["stratum"] == "random"}
        assert len(drawn) == min(BUILD_CONFIG.n_random, (dense[:, latent] > 0).sum())
    dead = {row["stratum"] for row in contexts if row["latent"] == DEAD}
    assert {"inactive"} <= dead <= {"inactive", "hard_negative"}


def test_documents_are_listed_once_with_their_titles(folders: Folders, truth: Truth) -> None:
    store = truth[0]
    rows = read_table(folders[2], "documents")
    numbers = [row["document"] for row in rows]
    assert numbers == sorted(set(numbers))
    seen = np.concatenate([store.row_documents(shard)[0] for shard in range(store.n_shards)])
    assert set(numbers) == set(seen[seen >= 0].tolist())
    assert all(row["title"] == row["id"].replace("story-", "Story ") for row in rows)
    assert "text" not in rows[0]  # which stays in the store


def test_firing_together_is_counted_on_some_contexts_of_a_large_store(
    folders: Folders, truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, read, dense = truth
    pairs = int((dense > 0).sum()) ** 2 / int(read.sum())
    monkeypatch.setattr(neighbours_module, "MAX_PAIRS", int(0.3 * pairs))
    run = build(*folders[:2], tmp_path / "out", BUILD_CONFIG).run
    counted = counted_rows(0, len(read), truth[0].context_length, int(0.3 * pairs) / pairs)
    assert 0.2 < counted.mean() < 0.4
    assert run["cofire_rows"] == (read & counted).sum()
    fires = (dense > 0) & counted[:, None]
    for row in read_table(tmp_path / "out", "neighbours"):
        one, other = fires[:, row["latent"]], fires[:, row["other"]]
        assert row["cofire"] == (one & other).sum()
        assert row["jaccard"] == pytest.approx((one & other).sum() / max(1, (one | other).sum()))


@pytest.mark.parametrize("fields", [{"k": None, "activation": "relu"}, {"k": 1}])
def test_sparsity_of_any_kind(folders: Folders, tmp_path: Path, fields: dict[str, Any]) -> None:
    sae = save_sae(folders[0], tmp_path / "sae", **fields)
    dense = truth_of(folders[0], sae)[2]
    run = build(folders[0], sae, tmp_path / "out", BUILD_CONFIG).run
    assert run["n_firings"] == (dense > 0).sum()
    counts = [row["n_fire"] for row in read_table(tmp_path / "out", "latents")]
    assert counts == (dense > 0).sum(axis=0).tolist()


def test_an_sae_that_never_fires_has_tables(folders: Folders, tmp_path: Path) -> None:
    store = ActivationStore.open(folders[0])
    sae = random_sae(store, 5, 2, RULE)
    sae.b_enc[:] = -1e6
    sae.save(tmp_path / "sae")
    built = build(folders[0], tmp_path / "sae", tmp_path / "out", BUILD_CONFIG)
    assert built.run["n_firings"] == 0
    assert [row["dead"] for row in read_table(tmp_path / "out", "latents")] == [True] * 5
    assert {row["stratum"] for row in read_table(tmp_path / "out", "contexts")} == {"inactive"}
    assert read_table(tmp_path / "out", "tokens") == []
    assert {r["cofire_rank"] for r in read_table(tmp_path / "out", "neighbours")} == {None}
    assert "never fired" in run("show", 1, "--features", tmp_path / "out").stdout
    counted = run("query", "SELECT count(*) FROM firings", "--features", tmp_path / "out")
    assert counted.stdout.split()[-1] == "0"


def test_building_again_does_nothing_and_another_build_is_refused_by_name(
    folders: Folders, tmp_path: Path
) -> None:
    store, sae, features = folders
    before = {path: path.stat().st_mtime_ns for path in features.rglob("*")}
    again = build(store, sae, features, BUILD_CONFIG)
    assert again.seconds is None
    assert again.run["n_latents"] == SAE_LATENTS
    moved = tmp_path / "moved"
    shutil.copytree(sae, moved)
    assert build(store, moved, features, BUILD_CONFIG).seconds is None
    assert "--seed: 0 → 1)" in build_refusal(store, sae, features, "--seed", 1)
    other = save_sae(store, tmp_path / "other", seed=1)
    with pytest.raises(RunError, match=r"another build \(differing: sae_digest: .* → .*\)"):
        build(store, other, features, BUILD_CONFIG)
    assert {path: path.stat().st_mtime_ns for path in features.rglob("*")} == before


def test_an_sae_trained_again_in_the_same_place_is_read_again(
    folders: Folders, tmp_path: Path
) -> None:
    store, sae, out = folders[0], save_sae(folders[0], tmp_path / "sae"), tmp_path / "out"
    build(store, sae, out, BUILD_CONFIG)
    shutil.rmtree(out)
    save_sae(store, sae, seed=1)
    build(store, sae, out, BUILD_CONFIG)
    counts = [row["n_fire"] for row in read_table(out, "latents")]
    assert counts == (truth_of(store, sae)[2] > 0).sum(axis=0).tolist()


def test_a_build_is_the_same_bytes_every_time(folders: Folders, tmp_path: Path) -> None:
    store, sae, features = folders
    build(store, sae, tmp_path / "again", BUILD_CONFIG)
    assert_same_files(tmp_path / "again", features)


@pytest.mark.parametrize("n_contexts", [1, 4])
def test_tables_are_the_same_bytes_for_other_blocks(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_contexts: int
) -> None:
    monkeypatch.setattr(sources, "block_rows", lambda *_: n_contexts * 32)
    build(*folders[:2], tmp_path / "out", BUILD_CONFIG)
    here, there = contents(tmp_path / "out"), contents(folders[2])
    assert sum(name.startswith("firings/") for name in here) == 256 / n_contexts
    for name in TABLES:
        assert here[f"{name}.parquet"] == there[f"{name}.parquet"]


def test_progress_goes_through_every_part_to_its_end(folders: Folders, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build(*folders[:2], tmp_path / "out", BUILD_CONFIG, on_progress=lambda *done: seen.append(done))
    names = list(dict.fromkeys(what for what, _, _ in seen))
    assert names == ["encoding", "counting", "comparing", "showing"]
    for name in names:
        steps = [(done, total) for what, done, total in seen if what == name]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_the_build_command_says_what_it_did(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    arguments = ("build", "--store", folders[0], "--sae", folders[1], "--out", out)
    none = ("--random", 0, "--decile", 0, "--silent", 0)
    first = run(*arguments, *none)
    assert first.exit_code == 0, first.output
    assert "48 latents" in first.stdout
    assert {row["stratum"] for row in read_table(out, "contexts")} == {"top"}
    assert "there already" in run(*arguments, *none).stdout
    assert "random contexts" not in run("show", 1, "--features", out).stdout


def test_query_prints_rows_and_says_when_there_are_more(folders: Folders) -> None:
    features = folders[2]
    sql = "SELECT latent, n_fire, dead, top_tokens FROM latents ORDER BY latent"
    result = run("query", sql, "--features", features, "--limit", 8)
    assert result.exit_code == 0
    lines = list(csv.reader(io.StringIO(result.stdout)))
    expected = read_table(features, "latents")[:8]
    assert lines[0] == ["latent", "n_fire", "dead", "top_tokens"]
    assert [line[1] for line in lines[1:]] == [str(row["n_fire"]) for row in expected]
    assert [json.loads(line[3]) for line in lines[1:]] == [row["top_tokens"] for row in expected]
    assert result.stderr == ""  # a pipe gets all that it asked for
    table = run("query", sql, "--features", features, "--limit", 8, "--format", "table")
    assert "--limit 8" in table.stderr
    joined = "SELECT count(*) AS n FROM contexts JOIN documents USING (document)"
    result = run("query", joined, "--features", features)
    inside = [row for row in read_table(features, "contexts") if row["document"] >= 0]
    assert result.stdout.split() == ["n", str(len(inside))]


def shown(features: Path, latent: int, **options: Any) -> str:
    console = Console(width=400, force_terminal=True, color_system="truecolor", **options)
    with console.capture() as capture:
        console.print(render_latent(features, latent, 10))
    return capture.get()


def test_show_prints_contexts_with_their_activations_as_heat(folders: Folders) -> None:
    features = folders[2]
    contexts = [row for row in read_table(features, "contexts") if row["latent"] == 3]
    text = shown(features, 3, no_color=False)
    plain = run("show", 3, "--features", features).stdout.replace("\n", "")
    for row in contexts[: BUILD_CONFIG.n_top]:
        joined = "".join(tokens_of(row)).replace("\n", "↵")
        assert joined.split()[0] in plain
        assert f"{row['activation']:.2f}" in plain
        peak = tokens_of(row)[row["position"] - row["window_start"]]
        assert f"m{peak}\x1b[0m" in text
    hottest = tokens_of(contexts[0])[contexts[0]["position"] - contexts[0]["window_start"]]
    assert f"\x1b[1;30;48;2;245;124;0m{hottest}\x1b[0m" in text  # the strongest heat, bold
    assert "never fired" in shown(features, DEAD)


def test_text_cannot_steer_the_terminal() -> None:
    line = highlight(["a\x1b[31m", "\r", "b\nc\x9b"], [0.0, 1.0, 0.0], 1.0, 1)
    assert line.plain == "a·[31m·b↵c·"


@pytest.mark.slow
def test_blocks_are_the_same_bytes_in_any_order_by_any_process(tmp_path: Path) -> None:
    case = made_case()
    encode_blocks(case, tmp_path / "one", 4)
    several = [
        SERVER.Process(target=encode_blocks, args=(case, tmp_path / "several", 4, numbers))
        for numbers in ([9, 1, 4, 7], [3, 1, 0, 8, 9], [2, 6, 5, 4])  # some are made twice
    ]
    for process in several:
        process.start()
    for process in several:
        process.join(120)
        assert process.exitcode == 0
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
