"""From any row: its token, context, document, URL, and the very characters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from sae_harvest.common.errors import DamagedError, InputError
from sae_harvest.harvest.inspect.provenance import Provenance, trace_row
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.store.reader import ActivationStore
from tests.commands import invoke, refusal
from tests.conftest import CONTEXT_LENGTH

SHARD_ROWS, N_SHARDS = 1024, 6
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The alphabet of byte-level BPE: printable bytes stand for themselves, the others follow from 256.
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
EMOJI = "🌍"  # in no text the tokenizer was trained on: four tokens of a byte each


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """The fixture corpus with emoji in every document, an empty document, and some duplicates."""
    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = f"{EMOJI} {row['text']} naïve {EMOJI}{EMOJI}\n{number}"
    rows.insert(2, {"id": "empty", "title": "", "url": "", "text": " "})
    rows.insert(5, rows[1] | {"id": "again", "url": "https://example.org/again"})
    path = tmp_path_factory.mktemp("traced") / "stories.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def harvested(model: Path, corpus: Path, place: Path, **given: Any) -> Path:
    spec = CorpusSpec(name=str(corpus), dedup=given.pop("dedup", False))
    fields = {
        "model": str(model),
        "corpus": spec,
        "sites": ("resid_post.1",),
        "tokens": N_SHARDS * SHARD_ROWS,
        "context_length": CONTEXT_LENGTH,
        "shard_rows": SHARD_ROWS,
        "compute_dtype": "float32",
    }
    config = HarvestConfig.model_validate(fields | given)
    run(config, place, Execution(workers=0, device="cpu"))
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus: Path) -> Path:
    return harvested(model_folder, corpus, tmp_path_factory.mktemp("plain") / "store")


def texts_of(corpus: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    return {row["id"]: row for row in rows}


def token_bytes(model: Path, token: int) -> bytes:
    """What a token stands for, from the vocabulary file alone."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    return bytes(BYTES[character] for character in names[token])


def check_token(model: Path, corpus: Path, found: Provenance) -> bool:
    """That the row's characters are its token's; whether they are whole ones."""
    assert found.document is not None
    assert found.piece is not None
    assert found.reason is None
    story = texts_of(corpus)[found.document["id"]]
    assert found.document["url"] == story["url"]
    assert found.document["title"] == story["title"]
    assert found.document["source"] == corpus.name
    if found.kind == "end of text":
        assert found.characters is None
        assert story["text"].endswith(found.around[0])
        return True
    assert found.characters is not None
    start, end = found.characters
    assert found.piece.char_start <= start < end <= found.piece.char_end
    before, own, after = found.around
    assert own == story["text"][start:end]
    assert story["text"][:start].endswith(before)
    assert story["text"][end:].startswith(after)
    spelt = token_bytes(model, found.token)
    try:
        assert spelt.decode() == own == found.token_text
    except UnicodeDecodeError:  # some of the bytes of a character: it has all of that character
        assert spelt in own.encode()
        assert len(own) <= len(spelt) + 1
        return False
    return True


def rows_with(store: ActivationStore, count: int) -> list[int]:
    return np.random.default_rng(0).choice(store.n_rows, count, replace=False).tolist()


def test_a_row_is_traced_to_its_characters_in_the_corpus(
    place: Path, model_folder: Path, corpus: Path
) -> None:
    store = ActivationStore.open(place)
    whole = 0
    for row in rows_with(store, 50):
        found = trace_row(place, row)
        assert (found.context, found.position) == divmod(row, CONTEXT_LENGTH)
        assert found.token == store.tokens(0, store.n_contexts).reshape(-1)[row]
        assert found.norms["resid_post.1"].norm == store.norms("resid_post.1", row, row + 1)[0]
        whole += check_token(model_folder, corpus, found)
    assert 25 < whole < 50


def test_the_tokens_of_a_document_are_traced_to_all_its_text(
    place: Path, model_folder: Path, corpus: Path
) -> None:
    store = ActivationStore.open(place)
    documents, _ = store.row_documents(0)
    number = np.bincount(documents).argmax()
    last_end = 0
    by_index = {}
    for row in np.flatnonzero(documents == number).tolist():
        found = trace_row(place, row)
        assert found.piece is not None
        by_index[found.piece.token] = found
    for found in (by_index[index] for index in sorted(by_index)):
        check_token(model_folder, corpus, found)
        if found.characters:
            assert found.characters[0] <= last_end or found.piece.token - 1 not in by_index
            last_end = max(last_end, found.characters[1])


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("keep_text", [False, True])
def test_kept_texts_and_duplicates_left_out(
    tmp_path: Path, model_folder: Path, corpus: Path, dedup: bool, keep_text: bool
) -> None:
    given = {"dedup": dedup, "keep_text": keep_text, "bos": "context"}
    here = Path(shutil.copy(corpus, tmp_path / corpus.name))
    place = harvested(model_folder, here, tmp_path / "store", **given)
    store = ActivationStore.open(place)
    if keep_text:
        here.unlink()
    for row in rows_with(store, 12):
        found = trace_row(place, row)
        if row % CONTEXT_LENGTH:
            check_token(model_folder, corpus, found)
    bos = trace_row(place, 3 * CONTEXT_LENGTH)
    assert bos.kind == "beginning of text"
    assert (bos.document, bos.piece, bos.characters) == (None, None, None)
    assert bos.around[0] == ""


def test_a_corpus_that_is_gone_or_has_changed_leaves_the_piece(
    tmp_path: Path, model_folder: Path, corpus: Path
) -> None:
    here = Path(shutil.copy(corpus, tmp_path / corpus.name))
    place = harvested(model_folder, here, tmp_path / "store")
    store = ActivationStore.open(place)
    row = next(r for r in rows_with(store, 50) if trace_row(place, r).kind == "text")
    exact = trace_row(place, row)
    here.write_text(here.read_text().replace(" the ", " no "))
    changed = trace_row(place, row)
    here.unlink()
    gone = trace_row(place, row)
    for found, words in ((changed, "is not what it was"), (gone, "There is no corpus")):
        assert found.characters is None
        assert found.piece == exact.piece
        assert found.document == exact.document
        assert found.reason is not None
        assert words in found.reason
        assert found.reason.endswith("Harvest with --keep-text to have the texts in the store.")
        assert found.around[1] == exact.token_text
    assert exact.piece is not None
    said = shown(place, row)
    span = f"{exact.piece.char_start:,}:{exact.piece.char_end:,}"
    assert f"{span} of" in said
    assert "of the whole piece, not of the token" in said
    assert "--keep-text" in said


def test_a_model_that_is_gone_leaves_token_ids(
    tmp_path: Path, model_folder: Path, corpus: Path
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    place = harvested(model, corpus, tmp_path / "store", keep_text=True)
    exact = trace_row(place, 40)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(model)
    other = trace_row(place, 40)
    assert other.token_text is None
    assert other.reason is not None
    assert "has changed since the harvest" in other.reason
    shutil.rmtree(model)
    gone = trace_row(place, 40)
    assert gone.token_text is None
    assert gone.characters is None
    assert gone.document == exact.document
    assert gone.around[1] == str(exact.token)
    assert f"id {exact.token}" in shown(place, 40)


def test_outlier_rows_are_named(place: Path) -> None:
    store = ActivationStore.open(place)
    norms, median = store.norms("resid_post.1", 0, SHARD_ROWS), store.norm_median("resid_post.1", 0)
    for row in (int(norms.argmax()), int(norms.argmin())):
        norm = trace_row(place, row).norms["resid_post.1"]
        assert norm.outlier == (norms[row] > 5 * median)
        assert norm.median == median
        assert ("an outlier row" in shown(place, row)) == norm.outlier


def test_damage_is_an_error_and_not_a_worse_answer(tmp_path: Path, place: Path) -> None:
    damaged = Path(shutil.copytree(place, tmp_path / "store"))
    table = damaged / "documents" / "000000.parquet"
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError, match=r"documents/000000\.parquet is altered"):
        trace_row(damaged, 0)


def test_a_row_that_is_not_there_is_refused(place: Path) -> None:
    last = N_SHARDS * SHARD_ROWS - 1
    assert trace_row(place, last).row == last
    with pytest.raises(InputError, match=rf"has the rows 0 to {last}, got --row {last + 1}"):
        trace_row(place, last + 1)
    with pytest.raises(InputError, match="got --row -1"):
        trace_row(place, -1)
    refusal(invoke("show", "--store", place, "--row", last + 1))


def shown(place: Path, row: int) -> str:
    result = invoke("show", "--store", place, "--row", row)
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.split())


def test_a_row_is_shown_with_its_place_in_the_text(place: Path, corpus: Path) -> None:
    store = ActivationStore.open(place)
    for row in rows_with(store, 5):
        found = trace_row(place, row)
        said = shown(place, row)
        assert found.document is not None
        assert texts_of(corpus)[found.document["id"]]["url"] in said
        assert f"position {row % CONTEXT_LENGTH}" in said
        if found.characters:
            assert f"{found.characters[0]:,}:{found.characters[1]:,} of" in said
            assert "⟦" in said


def test_a_store_says_what_it_was_made_from_and_with(
    tmp_path: Path, place: Path, model_folder: Path, corpus: Path
) -> None:
    import torch

    grown = Path(shutil.copytree(place, tmp_path / "store"))
    early = ActivationStore.open(grown).digest
    harvested(model_folder, corpus, grown, tokens=(N_SHARDS + 1) * SHARD_ROWS)
    store = ActivationStore.open(grown)
    result = invoke("show", "--store", grown)
    assert result.exit_code == 0, result.stderr
    said = "".join(result.stdout.split())
    plan = store.plan
    for fact in (
        plan["model"]["weights"],
        plan["tokenizer"]["xxh3"],
        plan["corpus"]["fingerprint"],
        store.digest,
        early,
        f"earlier,{N_SHARDS * SHARD_ROWS:,}rows",
        f"torch{torch.__version__.partition('+')[0]}",
    ):
        assert str(fact) in said
    assert pq.read_table(grown / "documents" / "000000.parquet").num_rows


def test_int8_stores_say_what_quantization_costs(
    tmp_path: Path, model_folder: Path, corpus: Path
) -> None:
    place = harvested(model_folder, corpus, tmp_path / "store", dtype="int8")
    result = invoke("show", "--store", place)
    assert result.exit_code == 0, result.stderr
    assert "worst FVU of a dimension" in " ".join(result.stdout.split())
