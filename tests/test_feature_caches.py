"""delphi's caches of latents, read and counted."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.exports import delphi
from sae_harvest.pipelines.features.building.tasks import Job, encode_block
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.pipelines.features.encoding import sources
from sae_harvest.pipelines.features.encoding.delphi_cache import DelphiCache
from sae_harvest.pipelines.features.encoding.firings import Firings
from sae_harvest.pipelines.features.tables.rows import write_rows
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.viewer import compare, tables
from sae_harvest.store.reader import ActivationStore
from tests.export_cases import Triples, exported, half, triples_of
from tests.feature_cases import BUILD_CONFIG, SAE_LATENTS, read_table, sentence
from tests.forked import SERVER


@pytest.fixture(scope="module")
def features(folders: tuple[Path, Path, Path]) -> Path:
    return folders[2]


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> ActivationStore:
    return ActivationStore.open(tiny_store)


@pytest.fixture(scope="module")
def firings(features: Path) -> Triples:
    return triples_of(features)


def flat(blocks: list[Firings], length: int) -> Triples:
    found = {}
    for block in blocks:
        for latent, (low, high) in enumerate(zip(block.starts[:-1], block.starts[1:], strict=True)):
            rows = block.row[low:high]
            assert (np.diff(rows) > 0).all()
            for row, value in zip(rows.tolist(), block.value[low:high].tolist(), strict=True):
                found[block.first_row + row, latent] = value
    return found


def blocks_of(cache: DelphiCache, n_contexts: int) -> list[Firings]:
    firsts = range(0, len(cache.tokens), n_contexts)
    return [cache.firings(first, min(first + n_contexts, len(cache.tokens))) for first in firsts]


@pytest.mark.parametrize("n_contexts", [1, 7, 256, 1000])
def test_a_cache_is_read_in_blocks_of_contexts(
    features: Path,
    store: ActivationStore,
    firings: Triples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_contexts: int,
) -> None:
    monkeypatch.setattr(delphi, "SPLIT_FIRINGS", len(firings) // 3)
    cache = DelphiCache(exported(features, "delphi", tmp_path / "out") / "latents" / "h.1")
    assert (cache.n_latents, cache.n_rows, cache.context_length) == (48, store.n_rows, 32)
    assert cache.model_name == store.plan["model"]["name"]
    np.testing.assert_array_equal(cache.tokens, store.tokens(0, store.n_contexts))
    blocks = blocks_of(cache, n_contexts)
    firsts = [block.first_row for block in blocks]
    assert firsts == list(range(0, store.n_rows, n_contexts * 32))
    assert flat(blocks, 32) == half(firings)


def written(folder: Path, **tensors: Any) -> Path:
    """A cache of 4 contexts of 3 tokens, two files, and negative activations."""
    folder.mkdir()
    tokens = np.arange(12).reshape(4, 3)
    parts = {
        "0_1": {
            "locations": np.array([[0, 0, 1], [0, 2, 0], [3, 1, 1]], np.uint16),
            "activations": np.array([0.5, -2, 1], np.float16),
            "tokens": tokens,
        },
        "2_4": {
            "locations": np.array([[1, 0, 0], [1, 0, 2], [2, 2, 1]], np.uint32),
            "activations": np.array([3, 4, 5], np.float16),
            "tokens": tokens,
        },
    }
    parts["2_4"] |= tensors
    for stem, content in parts.items():
        kept = {name: tensor for name, tensor in content.items() if tensor is not None}
        save_file(kept, folder / f"{stem}.safetensors")
    return folder


def test_negative_activations_are_no_firings(tmp_path: Path) -> None:
    cache = DelphiCache(written(tmp_path / "cache"))
    assert (cache.n_latents, cache.n_rows, cache.model_name) == (5, 12, None)
    expected = {(0, 1): 0.5, (10, 1): 1, (3, 2): 3, (3, 4): 4, (8, 3): 5}
    assert flat(blocks_of(cache, 2), 3) == expected


def counted(folder: Path, out: Path, *options: object) -> Result:
    given = ("build", "--store", folder, "--sae", "delphi", "--out", out, *options)
    return CliRunner().invoke(main, [str(a) for a in given])


@pytest.fixture(scope="module")
def cache_folder(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(features, "delphi", tmp_path_factory.mktemp("out")) / "latents" / "h.1"


def test_tables_of_a_cache_are_those_of_its_store(
    features: Path,
    store: ActivationStore,
    firings: Triples,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "BLOCK_FIRINGS", 10_000)
    monkeypatch.setattr(sources, "CONTEXTS", 100)
    out = tmp_path / "tables"
    result = counted(cache_folder, out, "--site", "resid_post.1", "--window", 9)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "48 latents over 8,192 rows (all documents, outlier rows included)" in result.stdout
    assert len(list((out / "firings").iterdir())) > 3
    here, there = read_table(out, "latents"), read_table(features, "latents")
    for mine, facts in zip(here, there, strict=True):
        for name in ("latent", "n_fire", "n_contexts", "dead", "n_tokens", "top_token_counts"):
            assert mine[name] == facts[name], name
        assert mine["max"] == np.float16(facts["max"])
        assert mine["mean"] == pytest.approx(facts["mean"], rel=1e-3)
        assert mine["density"] == facts["n_fire"] / store.n_rows  # all rows count as read
        for name in ("decoder_norm", "encoder_bias", "top_logit_tokens", "top_logits"):
            assert mine[name] is None
    along = {(r["latent"], r["other"]): r["cofire"] for r in read_table(features, "neighbours")}
    near = read_table(out, "neighbours")
    assert len(near) > 40
    for row in near:
        assert row["decoder_cosine"] is row["cosine_rank"] is None
        assert along.get((row["latent"], row["other"]), row["cofire"]) == row["cofire"]
    dense = np.zeros((store.n_rows, SAE_LATENTS))
    for (row, latent), value in half(firings).items():
        dense[row, latent] = value
    tokens = store.tokens(0, store.n_contexts).reshape(-1)
    contexts = read_table(out, "contexts")
    assert {c["stratum"] for c in contexts} >= {"top", "random", "inactive", "hard_negative"}
    for c in contexts:
        assert c["document"] == c["context"]
        begin = c["context"] * 32 + c["window_start"]
        window = slice(begin, begin + 9)
        assert c["activations"] == dense[window, c["latent"]].tolist()
        assert c["token_ids"] == tokens[window].tolist()
    for latent in range(SAE_LATENTS):
        best = dense[:, latent].reshape(-1, 32).max(axis=1)
        top = [c for c in contexts if (c["latent"], c["stratum"]) == (latent, "top")]
        assert [c["activation"] for c in top] == sorted(best[best > 0], reverse=True)[:20]
    documents = read_table(out, "documents")
    assert [d["document"] for d in documents] == list(range(store.n_contexts))
    split = {c["context"]: c["split"] for c in contexts}
    assert all(split[c["context"]] == c["split"] for c in contexts)
    assert 0.3 < np.mean([s == "score" for s in split.values()]) < 0.7
    shown = CliRunner().invoke(main, ["show", "1", "--features", str(out)])
    assert "Jaccard" in shown.stdout  # though nothing is known of its decoder
    assert "cosine" not in shown.stdout
    said = str(np.unique([d["source"] for d in documents])[0])
    assert said == "h.1"
    for refused, why in ((LiveModel.open, "live text, steering"), (compared, "comparison")):
        with pytest.raises(InputError, match=f"tables of a cache of delphi; .*{why}.* need"):
            refused(out)


def compared(features: Path) -> None:
    compare.Comparison(tables.Tables(features), tables.Tables(features))


def encode_first(job: Job) -> None:
    encode_block(Event(), job, 0)


def test_another_process_reads_a_cache_alike(cache_folder: Path, tmp_path: Path) -> None:
    assert counted(cache_folder, tmp_path / "here", "--site", "resid_post.1").exit_code == 0
    given = sources.SourceSpec(str(cache_folder), "delphi", "resid_post.1", None, "cpu")
    digest = DelphiCache(cache_folder).digest()
    made = Job(given, digest, digest, str(tmp_path / "there"), BUILD_CONFIG)
    source = sources.open_source(given)
    (tmp_path / "there").mkdir()
    assert write_rows(source.rows(), source.n_rows, tmp_path / "there") == source.n_rows
    process = SERVER.Process(target=encode_first, args=(made,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    firings = "firings/000000.parquet"
    assert (tmp_path / "there" / firings).read_bytes() == (tmp_path / "here" / firings).read_bytes()


def test_what_a_cache_does_not_say_is_asked_for(
    cache_folder: Path, model_folder: Path, tiny_store: Path, tmp_path: Path
) -> None:
    out, folder = tmp_path / "out", Path(shutil.copytree(cache_folder, tmp_path / "h.1"))

    def told(*options: object) -> str:
        result = counted(folder, out, *options)
        assert result.exit_code == 1, (result.output, result.exception)
        assert not out.exists()
        return sentence(result.stderr)

    assert "does not name its site; give it, such as --site" in told()
    assert "is not a site" in told("--site", "h.1")
    (folder / "config.json").unlink()
    assert "does not name its model; give --model" in told("--site", "resid_post.1")
    assert "There is no directory" in told("--site", "resid_post.1", "--model", "./nowhere")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        tensors["tokens"][3, 2] = 400
        save_file(tensors, path)
    given = ("--site", "resid_post.1", "--model", model_folder)
    assert "holds token 400, and the tokenizer of" in told(*given)
    given = ("build", "--store", tiny_store, "--sae", tmp_path, "--out", out, "--model", "gpt2")
    result = CliRunner().invoke(main, [str(a) for a in given])
    assert "--model is for caches of delphi" in sentence(result.stderr)


def test_a_cache_that_has_changed_is_not_counted_on(cache_folder: Path, tmp_path: Path) -> None:
    folder, out = Path(shutil.copytree(cache_folder, tmp_path / "h.1")), tmp_path / "out"
    given = ("--site", "resid_post.1")
    assert counted(folder, out, *given).exit_code == 0
    assert "are there already" in counted(folder, out, *given).stdout
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["activations"][5] += 1
    save_file(tensors, path)
    assert "differing: store_digest" in sentence(counted(folder, out, *given).stderr)


def test_a_cache_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no cache of delphi"):
        DelphiCache(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no cache of delphi"):
        DelphiCache(tmp_path / "empty")
    folder = written(tmp_path / "gap")
    (folder / "2_4.safetensors").rename(folder / "3_5.safetensors")
    with pytest.raises(InputError, match="lacks the file of latent 2"):
        DelphiCache(folder)
    folder = written(tmp_path / "damaged")
    path = folder / "2_4.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"2_4\.safetensors is damaged"):
        DelphiCache(folder)
    folder = written(tmp_path / "config")
    for text in (
        "{",
        "[]",
        "[" * 100_000,
        "9" * 5000,
        '{"model_name": 3}',
        '{"model_name": "\\u0000"}',
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json is damaged"):
            DelphiCache(folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"locations": np.zeros((3, 2), np.uint16)},
        {"locations": np.zeros((3, 3), np.float32)},
        {"locations": np.zeros(3, np.uint16)},
        {"activations": np.zeros(2, np.float16)},
        {"activations": np.zeros((3, 1), np.float16)},
        {"activations": np.zeros(3, np.int32)},
    ],
)
def test_a_cache_of_another_shape_is_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"2_4\.safetensors is damaged"):
        DelphiCache(written(tmp_path / "cache", **tensors))


def test_tokens_and_latents_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for number, tokens in enumerate((np.zeros(4, int), np.full((4, 3), -1), np.zeros((4, 3)))):
        folder = written(tmp_path / f"tokens-{number}", tokens=tokens)
        (folder / "0_1.safetensors").unlink()
        with pytest.raises(InputError, match="tokens are"):
            DelphiCache(folder)
    folder = written(tmp_path / "named")
    (folder / "2_4.safetensors").rename(folder / "2_4999999999.safetensors")
    with pytest.raises(InputError, match="latent numbers that are not possible"):
        DelphiCache(folder)
    locations = np.array([[1, 0, 0], [1, 0, 3], [2, 2, 1]], np.uint16)  # of latents 2 to 4
    cache = DelphiCache(written(tmp_path / "beyond", locations=locations))
    with pytest.raises(InputError, match="has firings past its tokens"):
        cache.firings(0, 4)
    values = np.array([3, np.inf, 5], np.float16)
    cache = DelphiCache(written(tmp_path / "infinite", activations=values))
    with pytest.raises(InputError, match="not finite"):
        cache.firings(0, 4)


def test_a_cache_without_tokens_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "cache", tokens=None)
    assert DelphiCache(folder).n_rows == 12  # the other file has them
    (folder / "0_1.safetensors").unlink()
    with pytest.raises(InputError, match="holds no tokens"):
        DelphiCache(folder)


def test_an_unsorted_cache_is_refused(tmp_path: Path) -> None:
    locations = np.array([[2, 2, 1], [1, 0, 2], [1, 0, 0]], np.uint16)
    cache = DelphiCache(written(tmp_path / "cache", locations=locations))
    with pytest.raises(InputError, match="is not sorted by context"):
        cache.firings(0, 2)
    locations = np.array([[1, 0, 0], [1, 3, 2], [2, 2, 1]], np.uint16)
    cache = DelphiCache(written(tmp_path / "long", locations=locations))
    with pytest.raises(InputError, match="has firings past its tokens"):
        cache.firings(0, 4)
