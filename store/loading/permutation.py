"""Random orders that every release of NumPy gives alike.

NumPy promises to keep the raw draws of its bit generators and of `SeedSequence`. It does not
promise to keep `Generator.permutation`: a run that was continued after an upgrade would repeat
rows and skip others.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def permutation(generator: np.random.BitGenerator, size: int) -> npt.NDArray[np.int64]:
    """The numbers 0 .. size - 1 in random order, int64 [size]: a stable argsort of raw draws."""
    draws = generator.random_raw(size)
    # The place of a draw goes into its lowest bits, and plain numbers are sorted: six times as
    # fast as a stable argsort, and the same order unless the other bits of two draws are equal.
    bits = max(size - 1, 0).bit_length()
    places = np.uint64((1 << bits) - 1)
    keys = draws & ~places
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort()
    if (keys[1:] ^ keys[:-1] <= places).any():
        return np.argsort(draws, kind="stable")
    keys &= places
    return keys.view(np.int64)
