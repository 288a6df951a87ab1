"""Headers of safetensors files: the bytes that the format says, which its own library reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save

from sae_harvest.common.safetensors_stream import dtype_name, make_header


def test_a_header_is_its_length_its_json_and_spaces() -> None:
    header = make_header({"a": ("U16", [2, 3]), "b": ("F32", [5])}, {"of": "x"})
    text = (
        b'{"__metadata__": {"of": "x"}, '
        b'"a": {"dtype": "U16", "shape": [2, 3], "data_offsets": [0, 12]}, '
        b'"b": {"dtype": "F32", "shape": [5], "data_offsets": [12, 32]}}'
    )
    assert len(text) == 157
    assert header.data == b"\xa0" + bytes(7) + text + b" " * 3  # 160, a multiple of 8
    assert header.offsets == {"a": 168, "b": 180}
    assert header.size == 200


def test_a_header_of_a_fixed_length_is_filled_up(tmp_path: Path) -> None:
    header = make_header({"a": ("I32", [0])}, json_bytes=512)
    assert header.data[:8] == b"\x00\x02" + bytes(6)
    assert header.data[8:] == b'{"a": {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}}' + (
        b" " * 451
    )
    assert (header.offsets, header.size) == ({"a": 520}, 520)
    with pytest.raises(AssertionError):
        make_header({"a": ("I32", [0])}, json_bytes=8)


def test_a_compact_header_is_the_librarys_own() -> None:
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 4)}  # int64 first
    header = make_header({"b": ("I64", [3]), "a": ("F32", [2, 4])}, compact=True)
    data = [tensor.numpy().tobytes() for tensor in tensors.values()]
    assert header.data + b"".join(data) == save(tensors)


def test_data_written_in_pieces_is_read_by_the_library(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 100, shape).astype(name)
        for name, shape in {"float16": (7, 3), "int64": (4,), "uint32": (2, 2, 2)}.items()
    }
    header = make_header(
        {name: (dtype_name(x.dtype), x.shape) for name, x in arrays.items()}, {"of": "é"}
    )
    with path.open("wb") as file:
        file.truncate(header.size)
        for name in reversed(arrays):  # each in its place, the last one first, row by row
            file.seek(header.offsets[name])
            for row in arrays[name]:
                file.write(row.tobytes())
        file.seek(0)
        file.write(header.data)
    found = load_file(path)
    assert found.keys() == arrays.keys()
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype
        assert np.array_equal(found[name], x)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"of": "é"}
