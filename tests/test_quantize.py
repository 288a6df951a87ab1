"""int8 codes lose little of the ordinary rows, whatever the others are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sae_harvest.store.statistics.quantize import calibrate, decode, encode, rows_apart
from sae_harvest.store.statistics.stats import moments_of_groups, squared_error

Array = npt.NDArray[Any]


def through(x: Array, is_apart: Array) -> Array:
    """What an int8 store gives back for x: rows apart exactly, the others by their codes."""
    scale, offset = calibrate(x, is_apart)
    stored = decode(encode(x, is_apart, scale, offset), scale, offset)
    stored[is_apart] = x[is_apart]
    return stored


def fvu(x: Array, is_apart: Array) -> Array:
    """Share of the variance of the rows not apart that is lost, per channel."""
    ordinary, _ = moments_of_groups(x, is_apart)
    return np.array(squared_error(x, through(x, is_apart))) / ordinary.m2


def none_of(x: Array) -> Array:
    return np.zeros(len(x), np.bool_)


def activations(rows: int, width: int, seed: int = 0) -> tuple[Array, Array]:
    """Like a residual stream: channels of many sizes, one in forty heavy-tailed, sinks at 128s."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, width)) * np.exp(random.standard_normal(width))
    x += random.standard_normal(width) * 3
    x[:, ::40] *= 1 + random.exponential(1, (rows, len(x[0, ::40])))
    sinks = np.zeros(rows, np.bool_)
    sinks[::128] = True
    x[sinks, 7] = 20_000
    x[sinks, 8] = -9_000
    return x.astype(np.float16), sinks


def test_a_hand_worked_channel() -> None:
    # -127..127 with as many codes: scale 1 and offset 0, and halves round to even codes.
    x = np.array([[-127, 100], [127, 354], [0, 227], [2.5, 227], [-3.5, 229.5]], np.float32)
    scale, offset = calibrate(x, none_of(x))
    assert scale.tolist() == [1, 1]
    assert offset.tolist() == [0, 227]
    codes = encode(x, none_of(x), scale, offset)
    assert codes.T.tolist() == [[-127, 127, 0, 2, -4], [-127, 127, 0, 0, 2]]
    assert decode(codes, scale, offset).T.tolist() == [
        [-127, 127, 0, 2, -4],
        [100, 354, 227, 227, 229],
    ]


def test_numbers_out_of_range_take_the_last_code() -> None:
    x = np.array([[-1e4], [500.0], [np.finfo(np.float16).max]], np.float16)
    codes = encode(x, none_of(x), np.ones(1, np.float32), np.zeros(1, np.float32))
    assert codes.ravel().tolist() == [-127, 127, 127]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_number_takes_the_nearest_code(dtype: type) -> None:
    x, sinks = activations(5000, 30)
    x = x.astype(dtype)
    scale, offset = calibrate(x, sinks)
    codes = encode(x, sinks, scale, offset)
    exact = (x.astype(np.float64) - offset) / scale.astype(np.float64)
    exact = np.clip(exact, -127, 127)
    assert (np.abs(codes - exact)[~sinks] <= 0.5 + 1e-4).all()
    assert not codes[sinks].any()


@pytest.mark.parametrize("tails", [np.inf, 5, 3])
def test_no_symmetric_clipping_loses_less(tails: float) -> None:
    # Tried one by one: codes for mean ± some deviations, of Student's t and of a Gaussian.
    random = np.random.default_rng(1)
    x = random.standard_normal((20_000, 6)) * np.logspace(-3, 3, 6) + 5
    if np.isfinite(tails):
        x /= np.sqrt(random.chisquare(tails, x.shape) / tails)
    x = x.astype(np.float32)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    least = np.full(6, np.inf)
    for deviations in np.linspace(2.5, np.abs((x - mean) / deviation).max(), 60):
        scale = (deviations * deviation / 127).astype(np.float32)
        tried = decode(encode(x, none_of(x), scale, mean), scale, mean)
        least = np.minimum(least, squared_error(x, tried))
    lost = np.array(squared_error(x, through(x, none_of(x))))
    assert (lost < 1.02 * least).all()
    if tails == np.inf:
        assert (fvu(x, none_of(x)) < 1.05e-4).all()


def test_massive_activations_do_not_ruin_ordinary_rows() -> None:
    x, sinks = activations(16_384, 120)
    lost = fvu(x, sinks)
    assert np.median(lost) < 3e-4
    assert lost.max() < 5e-3
    scale, offset = calibrate(x, sinks)
    louder = x.copy()
    louder[sinks] = 60_000
    assert np.array_equal(calibrate(louder, sinks), [scale, offset])
    assert fvu(x, none_of(x))[7] > 1e-3 * lost[7]  # whereas here they hide it:
    assert (
        squared_error(x[~sinks], through(x, none_of(x))[~sinks])[7]
        > 100 * (squared_error(x[~sinks], through(x, sinks)[~sinks])[7])
    )


def test_a_row_far_out_in_one_channel_is_apart() -> None:
    x, sinks = activations(16_384, 120)
    x[[300, 5000], 60] += 400 * x[:, 60].std()
    apart = rows_apart(x, sinks)
    assert apart[sinks].all()
    assert np.flatnonzero(apart & ~sinks)[[0, -1]].tolist() == [300, 5000]
    assert fvu(x, sinks)[60] > 2e-3
    assert squared_error(x, through(x, apart))[60] < squared_error(x, through(x, sinks))[60] / 100


def test_no_more_than_a_thousandth_is_apart_for_a_single_channel() -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((4000, 10)).astype(np.float32)
    far = random.permutation(4000)[:12]
    x[far, 4] = 1000 + np.arange(12)
    assert np.flatnonzero(rows_apart(x, none_of(x))).tolist() == sorted(far[-4:].tolist())
    assert not rows_apart(x[:, :4].copy(), none_of(x)).any()


def test_constant_channels_are_exact() -> None:
    constants = np.array([0, 1, -65504, 2**-24, 0.1, -3], np.float16)
    x = np.tile(constants, (200, 1))
    apart = none_of(x)
    apart[17] = True
    x[17] = 9
    assert rows_apart(x, apart).tolist() == apart.tolist()
    assert np.array_equal(through(x, apart), x.astype(np.float32))


def test_tiny_and_nearly_constant_channels() -> None:
    random = np.random.default_rng(4)
    x = np.stack(
        [
            random.integers(-20, 20, 3000) * 2.0**-24,  # subnormal float16
            1000 + random.integers(0, 3, 3000) * 0.5,  # neighbours of float16
            random.random(3000) < 0.01,  # mostly one value
        ],
        axis=1,
    ).astype(np.float16)
    assert (fvu(x, none_of(x)) < 1e-4).all()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows(rows: int) -> None:
    x = np.array([[1.5, -2], [3, 4], [9, 16]], np.float16)[:rows]
    np.testing.assert_allclose(through(x, none_of(x)), x, atol=14 / 254)
    every = ~none_of(x)
    assert np.array_equal(through(x, every), x)
    assert not calibrate(x, every).any()


def test_the_same_rows_give_the_same_bytes() -> None:
    x, sinks = activations(3000, 50)
    frozen = np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)
    results = [
        (calibrate(rows, sinks).tobytes(), rows_apart(rows, sinks).tobytes())
        for rows in (x, x.copy(), frozen, np.asfortranarray(x), x.astype(np.float32))
    ]
    assert len(set(results)) == 1
    scale, offset = calibrate(x, sinks)
    assert np.array_equal(encode(x, sinks, scale, offset), encode(frozen, sinks, scale, offset))


def test_decoding_any_part_gives_the_same_numbers() -> None:
    x, sinks = activations(1000, 50)
    scale, offset = calibrate(x, sinks)
    codes = encode(x, sinks, scale, offset)
    whole = decode(codes, scale, offset)
    assert whole.dtype == np.float32
    assert np.array_equal(whole, codes.astype(np.float32) * scale + offset)
    into = np.full((300, 50), np.nan, np.float32)
    assert decode(codes[123:423], scale, offset, into) is into
    assert np.array_equal(into, whole[123:423])
