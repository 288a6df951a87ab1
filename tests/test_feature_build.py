"""Tables of a real store: what they hold, who may read them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from harvest.models import load_tokenizer, resolve_model
from pipelines.features import build as build_module
from pipelines.features.build import build
from pipelines.features.cli import main
from pipelines.features.config import FeatureConfig
from pipelines.features.folder import TABLES
from pipelines.features.show import render_latent
from pipelines.features.tables import document_split
from store.errors import RunError
from store.reader import ActivationStore
from store.rules import RowRule
from tests.dictionaries import SITE, random_sae

CONFIG = FeatureConfig(n_top=4, n_random=3, window_tokens=9, n_neighbours=3, n_tokens=5, n_logits=6)
RULE = RowRule(max_norm_medians=1.2, heldout_fraction=0.3)  # leaves out about a tenth of the rows
N_LATENTS, DEAD = 48, 7


@pytest.fixture(scope="module")
def folders(tiny_store, tmp_path_factory):
    """(store, sae, features): tables of a random dictionary with one latent that never fires."""
    root = tmp_path_factory.mktemp("features")
    sae = random_sae(ActivationStore.open(tiny_store), N_LATENTS, 6, RULE)
    sae.b_enc[DEAD] = -1e6
    sae.save(root / "sae")
    build(tiny_store, root / "sae", root / "features", CONFIG)
    return tiny_store, root / "sae", root / "features"


@pytest.fixture(scope="module")
def truth(folders):
    """store, rows that were read, dense activations [rows, n_latents]; 0 where nothing was read."""
    store = ActivationStore.open(folders[0])
    sae = build_module.SAE.load(folders[1])
    read = store.selected(SITE, RULE.model_copy(update={"split": "all"}))
    assert 0.5 < read.mean() < 0.99
    x = torch.from_numpy(store.read(SITE, 0, store.n_rows)[read]).float()
    indices, values = sae.encode(x)
    dense = np.zeros((store.n_rows, N_LATENTS), np.float32)
    dense[np.flatnonzero(read)[:, None], indices.numpy()] = values.numpy()
    return store, read, dense


def read_table(folder: Path, name: str) -> list[dict]:
    """A table as any reader of Parquet sees it."""
    result = duckdb.connect().execute(f"FROM '{folder}/{name}.parquet'")
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refusal(*arguments) -> str:
    """The one sentence a command ends with."""
    result = run(*arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert line.endswith(".")
    return line.removeprefix("Error: ")


def build_refusal(store, sae, out, *options) -> str:
    return refusal("build", "--store", store, "--sae", sae, "--out", out, *options)


def test_every_table_is_there_and_sorted_by_latent(folders):
    features = folders[2]
    assert {p.name for p in features.iterdir()} == {f"{t}.parquet" for t in TABLES} | {"run.json"}
    for name in ("latents", "contexts", "histograms", "neighbours", "tokens"):
        latents = [row["latent"] for row in read_table(features, name)]
        assert latents == sorted(latents)
    assert [row["latent"] for row in read_table(features, "latents")] == list(range(N_LATENTS))


def test_counts_are_those_of_encoding_every_row_the_rule_reads(folders, truth):
    store, read, dense = truth
    by_context = dense.reshape(store.n_contexts, -1, N_LATENTS)
    for row in read_table(folders[2], "latents"):
        a = dense[:, row["latent"]].astype(float)
        assert row["n_fire"] == (a > 0).sum()
        assert row["n_contexts"] == (by_context[:, :, row["latent"]] > 0).any(axis=1).sum()
        assert row["density"] == pytest.approx((a > 0).sum() / read.sum())
        assert row["max"] == a.max()
        assert row["mean_square"] == pytest.approx((a**2).sum() / read.sum())
        assert row["dead"] == (row["latent"] == DEAD)
    run = json.loads((folders[2] / "run.json").read_text())
    assert run["n_rows"] == read.sum()
    assert run["store_digest"] == store.digest
    assert run["sae_digest"] == build_module.SAE.load(folders[1]).digest


def test_contexts_say_what_the_store_and_the_sae_say(folders, truth):
    store, _, dense = truth
    tokenizer = load_tokenizer(resolve_model(store.plan["model"]["name"]))
    tokens = store.tokens(0, store.n_contexts)
    parts = [store.row_documents(shard) for shard in range(store.n_shards)]
    documents, hashes = (np.concatenate(p) for p in zip(*parts, strict=True))
    splits = document_split(hashes)
    contexts = read_table(folders[2], "contexts")
    for row in contexts:
        begin, window = row["window_start"], CONFIG.window_tokens
        start = row["context"] * store.context_length + begin
        here = slice(start, start + window)
        assert row["row"] == row["context"] * store.context_length + row["position"]
        assert 0 <= begin <= row["position"] < begin + window
        assert begin + window <= store.context_length
        assert row["document"] == documents[row["row"]]
        assert row["split"] == splits[row["row"]]
        assert row["token_ids"] == tokens[row["context"], begin : begin + window].tolist()
        assert row["activations"] == dense[here, row["latent"]].tolist()
        assert row["activation"] == dense[row["row"], row["latent"]] > 0
        assert "".join(row["token_texts"]) == tokenizer.decode(row["token_ids"])
    of_document = {row["document"]: row["split"] for row in contexts}
    assert all(row["split"] == of_document[row["document"]] for row in contexts)
    assert set(of_document.values()) == {"explain", "score"}


def test_strata_are_complete_and_ranked(folders, truth):
    store, _, dense = truth
    contexts = read_table(folders[2], "contexts")
    documents = np.concatenate([store.row_documents(s)[0] for s in range(store.n_shards)])
    for latent in range(N_LATENTS):
        mine = [row for row in contexts if row["latent"] == latent]
        strata = [row["stratum"] for row in mine]
        assert strata == sorted(strata, key=["top", "random"].index)
        for stratum in ("top", "random"):
            ranks = [row["rank"] for row in mine if row["stratum"] == stratum]
            assert ranks == list(range(len(ranks)))
        best = {}
        for row in np.argsort(-dense[:, latent], kind="stable").tolist():
            if dense[row, latent] > 0:
                best.setdefault(documents[row], row)
        top = [row["row"] for row in mine if row["stratum"] == "top"]
        assert top == list(best.values())[: CONFIG.n_top]
        drawn = {row["row"] for row in mine if row["stratum"] == "random"}
        assert len(drawn) == min(CONFIG.n_random, (dense[:, latent] > 0).sum())


def test_documents_are_listed_once_with_their_titles(folders, truth):
    store = truth[0]
    rows = read_table(folders[2], "documents")
    numbers = [row["document"] for row in rows]
    assert numbers == sorted(set(numbers))
    seen = np.concatenate([store.row_documents(shard)[0] for shard in range(store.n_shards)])
    assert set(numbers) == set(seen[seen >= 0].tolist())
    assert all(row["title"] == row["id"].replace("story-", "Story ") for row in rows)


def test_building_again_does_nothing_and_another_build_is_refused_by_name(folders, tmp_path):
    store, sae, features = folders
    before = {path: path.stat().st_mtime_ns for path in features.iterdir()}
    again = build(store, sae, features, CONFIG)
    assert again.seconds is None
    assert again.run["n_latents"] == N_LATENTS
    moved = tmp_path / "moved"
    shutil.copytree(sae, moved)
    assert build(store, moved, features, CONFIG).seconds is None
    assert "differing: config)" in build_refusal(store, sae, features, "--seed", 1)
    other = random_sae(ActivationStore.open(store), N_LATENTS, 6, RULE, seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(RunError, match=r"another build \(differing: sae_digest\)"):
        build(store, tmp_path / "other", features, CONFIG)
    assert {path: path.stat().st_mtime_ns for path in features.iterdir()} == before


def test_a_build_is_the_same_bytes_every_time(folders, tmp_path):
    store, sae, features = folders
    build(store, sae, tmp_path / "again", CONFIG)
    for name in TABLES:
        file = f"{name}.parquet"
        assert (tmp_path / "again" / file).read_bytes() == (features / file).read_bytes()


def test_an_sae_that_does_not_fit_is_refused(folders, tmp_path):
    store = ActivationStore.open(folders[0])
    foreign = random_sae(store, 24, 4, RULE, model="other", model_weights="xxh3:0")
    foreign.save(tmp_path / "foreign")
    sentence = build_refusal(store.place, tmp_path / "foreign", tmp_path / "out")
    assert "was trained on other with other weights" in sentence
    random_sae(store, 24, 4, RULE, d_in=31).save(tmp_path / "narrow")
    message = build_refusal(store.place, tmp_path / "narrow", tmp_path / "out")
    assert "31" in message
    assert "32" in message
    random_sae(store, 24, 4, RULE, site="resid_post.0").save(tmp_path / "elsewhere")
    message = build_refusal(store.place, tmp_path / "elsewhere", tmp_path / "out")
    assert "resid_post.0" in message
    assert SITE in message
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_what_was_asked_for_are_refused(folders, tmp_path):
    store, sae, features = folders
    out = tmp_path / "out"
    assert "store" in build_refusal(tmp_path, sae, out)
    assert "no trained SAE" in build_refusal(store, tmp_path, out)
    assert "no trained SAE" in build_refusal(store, features, out)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    assert "something else" in build_refusal(store, sae, tmp_path / "foreign")
    file = tmp_path / "foreign" / "thesis.txt"
    assert "something else" in build_refusal(store, sae, file)
    assert "Cannot write" in build_refusal(store, sae, file / "features")
    (sae / "run.json").write_text('{"n_latents": 48}\n')  # training writes one, too
    assert "something else" in build_refusal(store, sae, sae)
    assert "no feature tables" in refusal("show", 0, "--features", sae)
    assert file.read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign"]
    assert "no feature tables" in refusal("query", "SELECT 1", "--features", out)
    assert "no feature tables" in refusal("query", "SELECT 1", "--features", file)


def test_damaged_tables_are_refused_by_name(folders, tmp_path):
    store, sae, features = folders
    broken = tmp_path / "features"
    shutil.copytree(features, broken)
    (broken / "tokens.parquet").unlink()
    options = ("--top", 4, "--random", 3, "--window", 9)
    assert "tokens.parquet is missing" in refusal("show", 1, "--features", broken)
    assert "tokens.parquet is missing" in refusal("query", "FROM latents", "--features", broken)
    with pytest.raises(RunError, match=r"tokens\.parquet is missing"):
        build(store, sae, broken, CONFIG)
    (broken / "tokens.parquet").write_bytes(b"PAR1 and then nothing")
    assert "tokens.parquet is damaged" in refusal("show", 1, "--features", broken)
    for text in ("{", "", "\udcff"):
        (broken / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "run.json is damaged" in refusal("show", 1, "--features", broken)
        assert "run.json is damaged" in build_refusal(store, sae, broken, *options)
    for text in ("[]", "null", "3"):
        (broken / "run.json").write_text(text)
        assert "no feature tables" in refusal("show", 1, "--features", broken)
        assert "something else" in build_refusal(store, sae, broken, *options)


def progress(*_):
    """Nobody looks."""


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest takes for itself."""


@pytest.mark.parametrize("where", ["encoding", "writing"])
def test_an_interrupted_build_leaves_nothing(folders, tmp_path, monkeypatch, where):
    store, sae, features = folders
    calls = []

    def stop_at_third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted

    out = tmp_path / "features"
    write = build_module.tables.write_table
    with monkeypatch.context() as patched:
        if where == "writing":
            patched.setattr(
                build_module.tables, "write_table", lambda *a: (write(*a), stop_at_third())
            )
        with pytest.raises(Interrupted):
            build(store, sae, out, CONFIG, stop_at_third if where == "encoding" else progress)
    assert list(tmp_path.iterdir()) == []
    # nor does one that was killed, whose temporary folder stays until the next
    shutil.copytree(features, tmp_path / ".features.tmp")
    assert "no feature tables" in refusal("show", 0, "--features", out)
    out.mkdir()  # an empty folder is fine
    assert build(store, sae, out, CONFIG).seconds is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features"]


def test_progress_ends_with_the_last_row(folders, tmp_path):
    seen = []
    build(*folders[:2], tmp_path / "out", CONFIG, lambda *done: seen.append(done))
    n_rows = ActivationStore.open(folders[0]).n_rows
    assert seen == sorted(seen)
    assert seen[-1] == (n_rows, n_rows)


def test_the_build_command_says_what_it_did(folders, tmp_path):
    out = tmp_path / "deep" / "out"
    arguments = ("build", "--store", folders[0], "--sae", folders[1], "--out", out, "--random", 0)
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert "48 latents" in first.stdout
    assert {row["stratum"] for row in read_table(out, "contexts")} == {"top"}
    assert "there already" in run(*arguments).stdout
    assert "random contexts" not in run("show", 1, "--features", out).stdout


def test_query_prints_rows_and_says_when_there_are_more(folders):
    features = folders[2]
    sql = "SELECT latent, n_fire, dead, top_tokens FROM latents ORDER BY latent"
    result = run("query", sql, "--features", features, "--limit", 8)
    assert result.exit_code == 0
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    expected = read_table(features, "latents")[:8]
    assert lines[0] == ["latent", "n_fire", "dead", "top_tokens"]
    assert [line[1] for line in lines[1:]] == [str(row["n_fire"]) for row in expected]
    assert lines[4][3] == ", ".join(expected[3]["top_tokens"])
    assert "--limit 8" in result.stderr
    joined = "SELECT count(*) AS n FROM contexts JOIN documents USING (document)"
    result = run("query", joined, "--features", features)
    assert result.stdout.split() == ["n", str(len(read_table(features, "contexts")))]


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
def test_bad_sql_is_one_sentence(folders, sql, said):
    assert said in refusal("query", sql, "--features", folders[2])


@pytest.mark.parametrize("latent", [N_LATENTS, 2**31, 2**63, 10**60])
def test_an_unknown_latent_is_one_sentence(folders, latent):
    assert f"0 to {N_LATENTS - 1}" in refusal("show", latent, "--features", folders[2])


def shown(features, latent, **options):
    console = Console(width=400, force_terminal=True, color_system="truecolor", **options)
    with console.capture() as capture:
        console.print(render_latent(features, latent, 10))
    return capture.get()


def test_show_prints_contexts_with_their_activations_as_heat(folders):
    features = folders[2]
    contexts = [row for row in read_table(features, "contexts") if row["latent"] == 3]
    text = shown(features, 3, no_color=False)
    plain = run("show", 3, "--features", features).stdout.replace("\n", "")
    for row in contexts[: CONFIG.n_top]:
        joined = "".join(row["token_texts"]).replace("\n", "↵")
        assert joined.split()[0] in plain
        assert f"{row['activation']:.2f}" in plain
        peak = row["token_texts"][row["position"] - row["window_start"]]
        assert f"m{peak}\x1b[0m" in text
    hottest = contexts[0]["token_texts"][contexts[0]["position"] - contexts[0]["window_start"]]
    assert f"\x1b[1;30;48;2;245;124;0m{hottest}\x1b[0m" in text  # the strongest heat, bold
    assert "never fired" in shown(features, DEAD)


def test_text_cannot_steer_the_terminal():
    from pipelines.features.show import highlight

    line = highlight(["a\x1b[31m", "\r", "b\nc\x9b"], [0.0, 1.0, 0.0], 1.0, 1)
    assert line.plain == "a·[31m·b↵c·"
