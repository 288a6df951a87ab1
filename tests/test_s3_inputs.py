"""Files of a corpus in a bucket of a real S3 server: listed, streamed, watched for changes."""

from __future__ import annotations

import gzip
import io

import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.store.s3 import INPUT_BLOCK_BYTES, S3Objects, list_inputs, open_input

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = pytest.mark.usefixtures("as_writer")


def test_inputs_are_listed_with_size_and_etag(objects: S3Objects) -> None:
    names = ["a.jsonl", "b c/p%41 #?.txt", "b c/é東.txt", "z.parquet"]
    for number, name in enumerate(names):
        objects.replace(name, [b"x" * number])
    found = list_inputs(objects.place)
    assert [(url, size) for url, size, _ in found] == [
        (f"{objects.place}/{name}", number) for number, name in enumerate(names)
    ]
    assert len({etag for *_, etag in found}) == len(names)
    assert all(etag.isalnum() for *_, etag in found)
    assert list_inputs(f"{objects.place}/") == found
    assert list_inputs(f"{objects.place}/a.jsonl") == found[:1]
    assert [open_input(url).read() for url, *_ in found] == [b"x" * n for n in range(4)]
    with pytest.raises(InputError, match="no object at or below"):
        list_inputs(f"{objects.place}/a.json")


def test_inputs_are_read_as_streams(objects: S3Objects) -> None:
    lines = [f"line {number} é\n".encode() * 1000 for number in range(1000)]
    text = b"".join(lines)
    assert len(text) > 2 * INPUT_BLOCK_BYTES
    objects.replace("text", [text])
    objects.replace("text.gz", [gzip.compress(text, 1)])
    with open_input(f"{objects.place}/text") as stream:
        assert b"".join(stream) == text
        stream.seek(-5, io.SEEK_END)
        assert stream.read() == text[-5:]
        stream.seek(3)
        assert stream.read(4) == text[3:7]
    with gzip.open(open_input(f"{objects.place}/text.gz")) as unpacked:
        assert unpacked.read() == text
    with io.TextIOWrapper(open_input(f"{objects.place}/text"), "utf-8") as characters:
        assert characters.readline() == "line 0 é\n"


def test_an_input_that_changes_or_goes_is_noticed(objects: S3Objects) -> None:
    url = f"{objects.place}/text"
    with pytest.raises(InputError, match="There is no object"):
        open_input(url)
    objects.replace("text", [b"a" * (INPUT_BLOCK_BYTES + 1)])
    ((_, _, etag),) = list_inputs(url)
    open_input(url, etag).close()
    with pytest.raises(InputError, match="has been overwritten since it was listed"):
        open_input(url, "another")
    with open_input(url) as changed, open_input(url) as removed:
        assert changed.read(1) == removed.read(1) == b"a"
        objects.replace("text", [b"b" * (INPUT_BLOCK_BYTES + 1)])
        with pytest.raises(InputError, match="it was overwritten while it was read"):
            changed.read()
        objects.remove("text")
        with pytest.raises(InputError, match="was removed while it was read"):
            removed.read()
