"""Fits recover known laws: exactly without noise, within their intervals with it."""

from __future__ import annotations

import numpy as np
import pytest

from sae_harvest.train.scaling.laws import JointLaw, PowerLaw
from sae_harvest.train.scaling.least_squares import fit

SIZES = 2.0 ** np.arange(8, 15)  # 256 to 16,384
E, A, B = 0.09, 3.0, 0.4
# of Gao et al. 2024, section 3.1.3
JOINT = {
    "alpha": -0.50,
    "beta_k": 0.26,
    "beta_n": -0.017,
    "gamma": -0.042,
    "zeta": -1.32,
    "eta": -0.085,
}


def joint_loss(points: np.ndarray) -> np.ndarray:
    n, k = np.log(points).T
    falling = np.exp(
        JOINT["alpha"] + JOINT["beta_k"] * k + JOINT["beta_n"] * n + JOINT["gamma"] * n * k
    )
    return falling + np.exp(JOINT["zeta"] + JOINT["eta"] * k)


def test_power_law_is_recovered_exactly_without_noise() -> None:
    found = fit(PowerLaw(SIZES), E + A * SIZES**-B, draws=20)
    values = found.to_json()["parameters"]
    assert values["e"]["value"] == pytest.approx(E, rel=1e-9)
    assert values["a"]["value"] == pytest.approx(A, rel=1e-9)
    assert values["b"]["value"] == pytest.approx(B, rel=1e-9)
    assert found.r2 == pytest.approx(1.0, abs=1e-12)


def test_four_points_worked_by_hand() -> None:
    # 1/4 + 2 / n: 1/4 + 2, 1, 1/2, 1/4
    found = fit(PowerLaw(np.array([1.0, 2.0, 4.0, 8.0])), np.array([2.25, 1.25, 0.75, 0.5]))
    values = {name: value["value"] for name, value in found.to_json()["parameters"].items()}
    assert values == pytest.approx({"e": 0.25, "a": 2.0, "b": 1.0}, rel=1e-8)
    assert found.predict([16.0]) == pytest.approx([0.375], rel=1e-8)


def test_without_an_irreducible_loss_none_is_found() -> None:
    found = fit(PowerLaw(SIZES), A * SIZES**-B, draws=20)
    values = found.to_json()["parameters"]
    assert values["e"]["value"] < 1e-4
    assert values["b"]["value"] == pytest.approx(B, rel=1e-3)


def test_joint_law_is_recovered_exactly_without_noise() -> None:
    points = np.array([(n, k) for n in SIZES for k in (8.0, 16.0, 32.0, 64.0)])
    found = fit(JointLaw(points), joint_loss(points), draws=20)
    values = {name: value["value"] for name, value in found.to_json()["parameters"].items()}
    assert values == pytest.approx(JOINT, rel=1e-6)
    assert found.r2 == pytest.approx(1.0, abs=1e-12)
    elsewhere = np.array([(1e6, 24.0)])
    assert found.predict(elsewhere) == pytest.approx(joint_loss(elsewhere), rel=1e-6)


REPEATS = 120


@pytest.fixture(scope="module")
def outside() -> dict[str, int]:
    """How many of the intervals at 95 % miss the truth: laws fitted to as many draws of noise."""
    sizes = 2.0 ** np.arange(6, 18)
    rng = np.random.default_rng(0)
    found = {"e": 0, "b": 0}
    for number in range(REPEATS):
        noisy = (E + A * sizes**-B) * np.exp(0.01 * rng.standard_normal(len(sizes)))
        parameters = fit(PowerLaw(sizes), noisy, draws=120, seed=number).to_json()["parameters"]
        for name, truth in (("e", E), ("b", B)):
            ends = parameters[name]
            found[name] += not ends["low"] <= truth <= ends["high"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e", "b"])
def test_intervals_cover_the_truth_at_about_their_level(name: str, outside: dict[str, int]) -> None:
    # 0.95 expected; four standard deviations of the count below it, or all
    assert 1 - outside[name] / REPEATS > 0.95 - 4 * (0.95 * 0.05 / REPEATS) ** 0.5


@pytest.mark.slow
def test_intervals_are_not_wider_than_they_need_to_be(outside: dict[str, int]) -> None:
    """At 95 %, noise falls outside now and then."""
    assert outside["b"] >= 1


def test_one_wild_point_hardly_moves_a_law() -> None:
    sizes = 2.0 ** np.arange(6, 18)
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(len(sizes)))
    loss = (E + A * sizes**-B) * noise
    wild = loss.copy()
    wild[5] *= 1.3
    exponent = fit(PowerLaw(sizes), wild, draws=20).to_json()["parameters"]["b"]["value"]
    assert abs(exponent - B) < 0.02


def test_band_holds_the_law_and_widens_outside_the_points() -> None:
    noise = np.exp(0.005 * np.random.default_rng(0).standard_normal(len(SIZES)))
    found = fit(PowerLaw(SIZES), (E + A * SIZES**-B) * noise)
    for size in SIZES:
        (low,), (high,) = found.band([size])
        assert low <= found.predict([size])[0] <= high

    def width(size: float) -> float:
        (low,), (high,) = found.band([size])
        return float(np.log(high / low))

    assert width(2.0**18) > 2 * width(2.0**11)


def test_fits_are_the_same_bits_for_the_same_seed() -> None:
    loss = (E + A * SIZES**-B) * (1 + 0.01 * np.cos(np.arange(len(SIZES))))
    first, second = (fit(PowerLaw(SIZES), loss, draws=50, seed=3).to_json() for _ in range(2))
    assert first == second
    assert first != fit(PowerLaw(SIZES), loss, draws=50, seed=4).to_json()
