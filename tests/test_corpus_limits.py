"""Text made to break its reader: each ends in documents or in one sentence, in bounded memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text import parquetfiles, textfiles
from sae_harvest.harvest.text.corpus import CorpusSpec, open_corpus
from tests.corpora import message, packed, read

LIMIT = 1 << 20
LARGE = b"x" * (LIMIT + 1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MAX_DOCUMENT_BYTES", LIMIT)
    monkeypatch.setattr(parquetfiles, "MAX_DOCUMENT_BYTES", LIMIT)
    monkeypatch.setattr(parquetfiles, "_BATCH_BYTES", LIMIT)


CASES = {
    "a.txt": LARGE,
    "a.jsonl": b'{"text": "a"}\n{"text": "' + LARGE + b'"}\n',
    "blank.jsonl": b'{"text": "a"}\n' + (b" " * 1023 + b"\n") * 1025,
    "a.json": b'[{"text": "a"}, {"text": "' + LARGE + b'"}]',
    "spaces.json": b"[" + b" " * (3 * LIMIT) + b"]",
    "field.csv": b"text\na\n" + LARGE + b"\n",
    "quoted.csv": b'text\na\n"' + b"xxx\n" * (LIMIT // 4) + b'"\n',
    "fields.csv": b"text\na\n" + b'"xxx\n",' * (LIMIT // 6),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", CASES)
def test_a_document_of_absurd_size_is_refused_in_one_sentence(
    tmp_path: Path, name: str, packing: str
) -> None:
    path = tmp_path / (name + packing)
    path.write_bytes(packed(CASES[name], packing) if packing else CASES[name])
    text = message(path)
    assert text.startswith(str(path))
    assert "more than 1 MiB" in text or "more than 1,048,576 characters" in text


@pytest.mark.usefixtures("small")
def test_a_cell_of_absurd_size_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for kind in (pa.string(), pa.large_string(), pa.binary()):
        parquet.write_table(pa.table({"text": pa.array([b"a", LARGE]).cast(kind)}), path)
        assert f"{path}, row 2, has more than 1 MiB in one document" in message(path)


def test_a_text_that_a_parquet_file_holds_once_is_not_copied_for_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), ["x" * (1 << 20)])
    parquet.write_table(pa.table({"text": repeated}), path, store_schema=False)
    assert path.stat().st_size < 1 << 20
    documents = open_corpus(CorpusSpec(name=str(path))).documents()
    before = pa.total_allocated_bytes()
    for _ in range(100):
        assert len(next(documents).text) == 1 << 20
        assert pa.total_allocated_bytes() - before < 64 << 20


def test_an_endless_line_is_refused_without_being_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    member = gzip.compress(b'{"text": "' + b"x" * (100 << 20), 1)
    path.write_bytes(member * 3)
    assert "line 1, has more than 256 MiB in one document" in message(path)


DEEP = "[" * 900 + "]" * 900
HOSTILE = {
    '{"text": "x", "id": ' + DEEP + "}": "",
    '{"text": "x", "id": ' + "[" * 100_000 + "}": "nested too deeply",
    '{"text": "x", "n": ' + "9" * 5_000 + "}": "Exceeds the limit",
    r'{"\ud800": "x", "a\nb": 1}': r"which has \ud800, a\nb; name the one",
    json.dumps({f"column {n}" + "y" * 100: 1 for n in range(1_000)}): "and 980 more",
    r'{"text": "\ud800", "url": "\udfff", "title": "\ud800\udc00", "id": "\udc00"}': "",
    '{"text": NaN}': "holds float, expected text",
    '{"text": ["x"]}': "holds list, expected text",
}


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_lines_are_handled_or_refused_in_one_sentence(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    if why := HOSTILE[line]:
        text = message(path)
        assert why in text
        assert len(text) < 3_000
        text.encode()
        return
    (document,) = read(path)
    for value in document:
        (value or "").encode()


values: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
rows = st.lists(
    st.fixed_dictionaries({}, optional={"text": values, "id": values, "title": values}), max_size=4
)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of some format, cut or altered at one place or not."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".parquet"]))
    found = draw(rows)
    if suffix == ".parquet":
        words = [str(row.get("text")).encode("utf-8", "replace") for row in found]
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.table({"text": pa.array(words, pa.binary())}), sink)
        data = sink.getvalue().to_pybytes()
    elif suffix == ".json":
        data = json.dumps(found).encode()
    else:
        data = "\n".join(map(json.dumps, found)).encode()
        if suffix == ".csv":
            data = b"text,id\n" + data
    # inside the data pages only: Arrow's C++ is not ours to test
    end = min(len(data), 20) if suffix == ".parquet" else len(data)
    at = draw(st.integers(0, end))
    other = draw(st.sampled_from([b"", b"\x00", b"\xff", b'"', b"[", b"{", b"\r", b"\\u"]))
    return suffix, draw(st.sampled_from([data, data[:at], data[:at] + other + data[at + 1 :]]))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(files(), st.sampled_from(["", ".gz", ".zst"]))
def test_any_file_ends_in_documents_or_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes], packing: str
) -> None:
    suffix, data = file
    packing = "" if suffix == ".parquet" else packing
    path = tmp_path_factory.getbasetemp() / f"any{suffix}{packing}"
    path.write_bytes(packed(data, packing) if packing else data)
    found, refused = words(path)
    assert not refused or len(found) == 1
    for text in found:
        text.encode()


def words(path: Path) -> tuple[list[str], bool]:
    """The texts of a file's documents, or the lines that say what is wrong with it."""
    try:
        documents = list(open_corpus(CorpusSpec(name=str(path))).documents())
    except InputError as error:
        return str(error).splitlines(), True
    return [value for document in documents for value in document if value is not None], False
