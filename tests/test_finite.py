"""Rows that are not finite are named, however few they are; every finite number passes."""

from __future__ import annotations

import numpy as np
import pytest

from sae_harvest.common.errors import DamagedError
from sae_harvest.common.finite import all_finite, require_finite


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_number_is_finite_and_every_other_is_not(dtype: str) -> None:
    info = np.finfo(dtype)
    numbers = [0.0, -0.0, info.max, info.min, info.tiny, info.smallest_subnormal, -info.tiny]
    assert all_finite(np.array(numbers, dtype))
    assert all_finite(np.empty((0, 4), dtype))
    bits = f"u{info.dtype.itemsize}"
    negative_nan = np.array(np.nan, dtype).view(bits) | np.array(-0.0, dtype).view(bits)
    for other in (np.inf, -np.inf, np.nan, negative_nan.view(dtype)):
        for position in range(len(numbers)):
            x = np.array(numbers, dtype)
            x[position] = other
            assert not all_finite(x)


def test_the_first_bad_row_that_is_wanted_is_named() -> None:
    x = np.zeros((5, 3), np.float32)
    x[[1, 3], 2] = np.nan, np.inf
    with pytest.raises(DamagedError, match=r"^s holds values of a that are not finite, in row 11;"):
        require_finite(x, "s", "a", 10)
    with pytest.raises(DamagedError, match="in row 13;"):
        require_finite(x, "s", "a", 10, np.array([True, False, True, True, True]))
    require_finite(x, "s", "a", 10, np.array([True, False, True, False, True]))
