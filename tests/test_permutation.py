"""Random orders are stable argsorts of raw draws, the same with every release of NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from sae_harvest.store.loading.permutation import permutation


def philox(*key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(key))


def test_orders_are_golden() -> None:
    # A continued run reads on in the order of its beginning: these numbers must never change.
    assert permutation(philox(0, 0), 12).tolist() == [0, 8, 9, 3, 7, 5, 1, 11, 2, 10, 6, 4]
    large = permutation(philox(7, 3, 1), 1 << 18)
    assert large[:6].tolist() == [14619, 1055, 201530, 90831, 31208, 92480]
    assert large[-3:].tolist() == [105429, 98894, 50311]
    of_contexts = np.random.PCG64(np.random.SeedSequence([0, 0]))
    assert permutation(of_contexts, 8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 1 << 15])
def test_an_order_is_a_stable_argsort_of_raw_draws(size: int) -> None:
    for seed in range(3):
        order = permutation(philox(seed), size)
        assert order.dtype == np.int64
        assert np.array_equal(order, np.argsort(philox(seed).random_raw(size), kind="stable"))


class Drawn(np.random.PCG64):
    """Draws that are given."""

    def random_raw(self, size: int) -> np.ndarray:  # type: ignore[override]
        return np.array(self.given, np.uint64)


@pytest.mark.parametrize(
    "draws",
    [
        [7, 7, 7, 3, 3],  # equal
        [6, 5, 4, 3, 2],  # equal but for the bits that places take
        [2**64 - 1, 2**64 - 2, 0, 1, 2**63],
    ],
)
def test_ties_are_broken_by_place(draws: list[int]) -> None:
    generator = Drawn()
    generator.given = draws
    expected = sorted(range(len(draws)), key=lambda place: (draws[place], place))
    assert permutation(generator, len(draws)).tolist() == expected
