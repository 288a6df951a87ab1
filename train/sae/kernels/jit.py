"""The numba settings of all compiled loops; compiled code is saved in our cache folder."""

from __future__ import annotations

from sae_harvest.common.cache import use_numba_cache

use_numba_cache()
from numba import njit, prange  # noqa: E402 - the cache folder must be set before

__all__ = ["FAST", "njit", "prange"]

# the compiler may reorder sums, but fixes the order; NaN and infinities keep their meaning
FAST = {
    "cache": True,
    "nogil": True,
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
}
