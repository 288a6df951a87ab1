"""What the feature pass counts, against plain loops over a dense float64 matrix."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.counting.profile import bin_edge
from sae_harvest.pipelines.features.encoding import firings as firings_module
from sae_harvest.pipelines.features.encoding.encode import stacked
from sae_harvest.pipelines.features.tables import writers as tables
from sae_harvest.pipelines.features.tables.rows import for_scores
from sae_harvest.store.rules import heldout_documents
from tests.feature_cases import (
    ALIKE,
    CONFIG,
    CONTEXTS,
    HUGE,
    LENGTH,
    N_LATENTS,
    NEVER,
    ONCE,
    TINY,
    Case,
    Pass,
    encode_blocks,
    made_case,
    sparse_case,
    weights_of,
    whole_pass,
)

BINS = 384


@pytest.fixture(scope="module")
def case() -> Case:
    return made_case()


@pytest.fixture(scope="module")
def found(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Pass:
    return whole_pass(case, tmp_path_factory.mktemp("pass"))


def bin_of(value: float) -> int:
    """16 bins an octave from 2**-12 to 2**12; the ends are open."""
    return min(max(int(np.floor(16 * (np.log2(value) + 12))), 0), BINS - 1)


def test_firings_are_those_of_the_dense_matrix(case: Case, tmp_path: Path) -> None:
    dense = case.dense
    blocks = encode_blocks(case, tmp_path, 7)
    assert len(blocks) == 6  # the last one is shorter
    assert blocks.missing() == []
    seen = np.zeros_like(dense)
    for block in range(6):
        table = pq.read_table(tmp_path / "firings" / f"{block:06d}.parquet")
        assert [str(t) for t in table.schema.types] == ["int32", "int64", "float"]
        assert table.schema.metadata[b"sae_harvest_tables"] == b"3"
        latent, row, value = (table[c].to_numpy() for c in ("latent", "row", "value"))
        assert (np.diff(latent.astype(np.int64) * case.n_rows + row) > 0).all()  # sorted, once
        assert set((row // LENGTH).tolist()) <= set(range(7 * block, 7 * block + 7))
        seen[row, latent] = value
    assert (seen == dense).all()


@pytest.mark.parametrize(
    ("at_once", "most_rows", "groups"), [(1, 10**6, 6), (500, 10**6, 2), (10**6, 230, 3)]
)
@pytest.mark.parametrize(("first", "last"), [(0, 13), (3, 5), (11, 13), (12, 13)])
def test_firings_of_some_latents_come_several_blocks_at_a_time(
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    most_rows: int,
    groups: int,
    first: int,
    last: int,
) -> None:
    monkeypatch.setattr(firings_module, "AT_ONCE", at_once)
    monkeypatch.setattr(firings_module, "MAX_ROWS", most_rows)
    dense, blocks = case.dense, encode_blocks(case, tmp_path, 7)
    found = list(blocks.all(first, last))
    assert [inside.start for inside, _ in found[1:]] == [inside.stop for inside, _ in found[:-1]]
    assert (found[0][0].start, found[-1][0].stop) == (0, case.n_rows)
    for inside, firings in found:
        assert (firings.first_row, firings.first_latent) == (inside.start, first)
        several = inside.stop - inside.start > blocks.block_rows
        assert not several or len(firings.row) <= at_once
        assert not several or inside.stop - inside.start <= most_rows
        for i in range(first, last):
            mine = slice(*firings.starts[i - first : i - first + 2])
            here = dense[inside, i]
            assert firings.row[mine].tolist() == np.flatnonzero(here).tolist()
            assert firings.value[mine].tolist() == here[here > 0].tolist()
    if last - first == N_LATENTS:
        assert len(found) == groups


def test_tables_do_not_depend_on_how_many_blocks_are_taken_at_a_time(
    case: Case, tmp_path: Path, found: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at_once in (1, 300):
        monkeypatch.setattr(firings_module, "AT_ONCE", at_once)
        again = whole_pass(case, tmp_path / str(at_once), pieces=2)
        assert all(again.tables[name].equals(table) for name, table in found.tables.items())


def test_batches_of_other_widths_are_encoded_alike(case: Case, tmp_path: Path) -> None:
    wide, narrow = (np.ones((2, 3), np.float32), np.ones((1, 1), np.float32))
    indices, values = stacked([(narrow.astype(np.int32), narrow), (wide.astype(np.int32), wide)])
    assert values.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert indices.shape == (3, 3)
    for batch_rows in (1, 7, 10_000):
        encode_blocks(case, tmp_path / str(batch_rows), 4, batch_rows=batch_rows)
    for name in ("000000.parquet", "000009.parquet"):
        files = [(tmp_path / str(n) / "firings" / name).read_bytes() for n in (1, 7, 10_000)]
        assert files[0] == files[1] == files[2]


def test_counts_and_moments_are_those_of_the_dense_matrix(case: Case, found: Pass) -> None:
    dense, n_read, weights = case.dense, case.read.sum(), weights_of(N_LATENTS)
    rows = found.tables["latents"].to_pylist()
    assert [row["latent"] for row in rows] == list(range(N_LATENTS))
    for i, row in enumerate(rows):
        a = dense[:, i][dense[:, i] > 0]
        contexts = {r // LENGTH for r in range(case.n_rows) if dense[r, i] > 0}
        assert row["n_fire"] == len(a)
        assert row["dead"] == (len(a) == 0) == (i == NEVER)
        assert row["density"] == len(a) / n_read
        assert row["n_contexts"] == len(contexts)
        assert row["context_density"] == len(contexts) / CONTEXTS
        assert row["max"] == (a.max() if len(a) else 0)
        assert row["mean"] == pytest.approx(a.mean() if len(a) else 0, rel=1e-12)
        assert row["std"] == pytest.approx(a.std() if len(a) else 0, rel=1e-9, abs=1e-6)
        assert row["mean_square"] == pytest.approx((a**2).sum() / n_read, rel=1e-12)
        if i in (NEVER, ONCE, ALIKE):  # two values a last bit apart have no shape to measure
            assert row["skew"] is row["kurtosis"] is row["bimodality"] is None
        else:
            z = (a - a.mean()) / a.std()
            skew, kurtosis = (z**3).mean(), (z**4).mean()
            assert row["skew"] == pytest.approx(skew, abs=1e-9)
            assert row["kurtosis"] == pytest.approx(kurtosis, rel=1e-9)
            assert row["bimodality"] == pytest.approx((skew**2 + 1) / kurtosis, rel=1e-9)
        encoder, decoder = (weights[name][i].astype(float) for name in ("W_enc", "W_dec"))
        cosine = encoder @ decoder / np.sqrt((encoder @ encoder) * (decoder @ decoder))
        assert row["encoder_decoder_cosine"] == pytest.approx(cosine, abs=1e-6)
        assert row["encoder_norm"] == pytest.approx(np.sqrt(encoder @ encoder), rel=1e-6)
        assert row["decoder_norm"] == pytest.approx(np.sqrt(decoder @ decoder), rel=1e-6)
        assert row["encoder_bias"] == weights["b_enc"][i]
        assert row["top_logits"] is row["bottom_logit_tokens"] is None  # there was no lens


@pytest.mark.parametrize(
    ("values", "skew", "kurtosis", "bimodality"),
    [
        ([1, 1, 1, 5], 24 / 4 / 3**1.5, 84 / 4 / 9, 1),  # mean 2, deviations -1 -1 -1 3
        ([2, 2, 4, 4], 0, 1, 1),  # two values
        (np.arange(1, 2001) / 500, 0, 9 / 5, 5 / 9),  # uniform, but for 1 in n²
    ],
)
def test_moments_of_a_known_latent(
    tmp_path: Path, values: list[float], skew: float, kurtosis: float, bimodality: float
) -> None:
    a = np.asarray(values, np.float32)
    known = sparse_case(1, np.arange(len(a)), a)
    known.read[len(a) :] = False
    (row,) = whole_pass(known, tmp_path).tables["latents"].to_pylist()
    assert row["mean"] == pytest.approx(a.mean(dtype=float))
    assert row["std"] == pytest.approx(a.std(dtype=float))
    assert row["skew"] == pytest.approx(skew, abs=1e-9)
    assert row["kurtosis"] == pytest.approx(kurtosis, rel=1e-5)
    assert row["bimodality"] == pytest.approx(bimodality, rel=1e-5)
    assert row["mean_square"] == pytest.approx((a.astype(float) ** 2).mean())
    assert row["top_tokens"] == [" t0"]
    assert row["token_entropy_bits"] == 0


def test_histogram_holds_every_firing_within_its_edges(case: Case, found: Pass) -> None:
    dense = case.dense
    table = found.tables["histograms"].to_pylist()
    assert [(r["latent"], r["bin"]) for r in table] == sorted(
        {(i, bin_of(a)) for i in range(N_LATENTS) for a in dense[:, i] if a > 0}
    )
    for row in table:
        a = dense[:, row["latent"]][dense[:, row["latent"]] > 0]
        low = 0 if row["bin"] == 0 else row["low"]
        high = np.inf if row["bin"] == BINS - 1 else row["high"]
        assert row["count"] == ((a >= low) & (a < high)).sum() > 0
        assert row["low"] == pytest.approx(2.0 ** (row["bin"] / 16 - 12))
        assert row["high"] == pytest.approx(row["low"] * 2 ** (1 / 16))
    assert {row["bin"] for row in table if row["latent"] == TINY} == {0}
    assert {row["bin"] for row in table if row["latent"] == HUGE} == {BINS - 1}


def test_quantiles_are_right_to_one_bin(case: Case, found: Pass) -> None:
    for i, row in enumerate(found.tables["latents"].to_pylist()):
        a = case.dense[:, i][case.dense[:, i] > 0]
        for q in (10, 25, 50, 75, 90, 99):
            if len(a) == 0:
                assert row[f"q{q}"] == 0
                continue
            exact = np.quantile(a, q / 100, method="inverted_cdf")
            assert bin_of(row[f"q{q}"]) == bin_of(exact)
            assert row[f"q{q}"] <= a.max()
    a = np.exp(np.random.default_rng(3).standard_normal((5, 500))).astype(np.float32)
    histogram = np.stack([np.histogram(x, bin_edge(np.arange(BINS + 1)))[0] for x in a])
    shares = (0.01, 0.5, 0.9, 0.99, 1.0)
    every = tables.quantiles(histogram, shares, a.max(axis=1))
    for share, found_q in zip(shares, every, strict=True):
        exact = np.quantile(a, share, axis=1, method="inverted_cdf")
        np.testing.assert_allclose(np.log2(found_q), np.log2(exact), atol=1 / 16)


@pytest.mark.parametrize("length", [5, 16, 40])
def test_position_profile_is_the_share_of_firings_by_part(tmp_path: Path, length: int) -> None:
    made = made_case(length, 300 // length + 30)
    parts = min(16, length)
    latents = whole_pass(made, tmp_path, pieces=2).tables["latents"].to_pylist()
    for i, row in enumerate(latents):
        count = [0] * parts
        for r in np.flatnonzero(made.dense[:, i]):
            count[(r % length) * parts // length] += 1
        expected = np.array(count) / max(sum(count), 1)
        np.testing.assert_allclose(row["position_profile"], expected, rtol=1e-6)


def test_tokens_of_a_latent(case: Case, found: Pass) -> None:
    few = 0
    for i, row in enumerate(found.tables["latents"].to_pylist()):
        fired = np.flatnonzero(case.dense[:, i])
        count = Counter(case.tokens[fired].tolist())
        mean = {t: case.dense[fired[case.tokens[fired] == t], i].mean() for t in count}
        order = sorted(count, key=lambda t: (-count[t], t))
        assert row["n_tokens"] == len(count)
        shares = np.array([count[t] for t in order]) / max(len(fired), 1)
        assert row["token_entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())
        assert row["top_tokens"] == [f" t{t}" for t in order[:10]]
        assert row["top_token_counts"] == [count[t] for t in order[:10]]
        enough = [t for t in order if count[t] >= min(3, max(count.values()))]
        strongest = sorted(enough, key=lambda t: (-mean[t], t))[:10]
        assert row["strongest_tokens"] == [f" t{t}" for t in strongest]
        means = [np.float32(mean[t]) for t in strongest]
        np.testing.assert_allclose(row["strongest_token_means"], means, rtol=1e-6)
        few += 0 < len(enough) < len(order)
    assert few > 3  # latents with tokens that were left out for being rare


@pytest.mark.parametrize(("n_tokens", "at_once"), [(1, 10**6), (6, 10**6), (100, 25), (100, 1)])
def test_tokens_table(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tokens: int, at_once: int
) -> None:
    monkeypatch.setattr(tables, "SORTED_ROWS", at_once)
    config = CONFIG.model_copy(update={"n_tokens": n_tokens})
    table = whole_pass(case, tmp_path, config, pieces=3).tables["tokens"].to_pylist()
    expected = []
    for i in range(N_LATENTS):
        fired = np.flatnonzero(case.dense[:, i])
        count = Counter(case.tokens[fired].tolist())
        for t in sorted(count, key=lambda t: (-count[t], t))[:n_tokens]:
            mean = case.dense[fired[case.tokens[fired] == t], i].mean()
            expected.append((t, -count[t], i, mean, count[t] / len(fired)))
    assert [(r["token"], -r["count"], r["latent"]) for r in table] == [
        e[:3] for e in sorted(expected)
    ]
    for row, (token, _, _, mean, share) in zip(table, sorted(expected), strict=True):
        assert row["text"] == f" t{token}"
        assert row["mean"] == pytest.approx(mean, rel=1e-6)
        assert row["share"] == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("n_contexts", [1, 3, CONTEXTS])
@pytest.mark.parametrize("pieces", [1, 4])
def test_tables_do_not_depend_on_blocks_or_on_how_latents_are_shared_out(
    case: Case, found: Pass, tmp_path: Path, n_contexts: int, pieces: int
) -> None:
    other = whole_pass(case, tmp_path, n_contexts=n_contexts, pieces=pieces).tables
    for name, table in found.tables.items():
        assert other[name].equals(table), name


HASHED = """
import sys
from pathlib import Path
import numba
from tests.feature_cases import made_case, whole_pass
from tests.test_features import digest_of
out = Path(sys.argv[1])
out.mkdir()
print(numba.get_num_threads(), digest_of(whole_pass(made_case(), out).tables))
"""


def digest_of(tables: dict[str, pa.Table]) -> str:
    """Of all values of the tables."""
    seen = xxhash.xxh3_128()
    for name, table in sorted(tables.items()):
        seen.update(f"{name}{table.to_pylist()}".encode())
    return seen.hexdigest()


def test_tables_do_not_depend_on_the_number_of_threads(found: Pass, tmp_path: Path) -> None:
    threads = "2" if numba.get_num_threads() == 1 else "1"
    limits = {"NUMBA_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", HASHED, str(tmp_path / threads)],
        env=os.environ | limits,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [threads, digest_of(found.tables)]


def test_rows_on_which_nothing_fires_are_counted_as_read(case: Case, tmp_path: Path) -> None:
    silent = replace(case, values=np.zeros_like(case.values))
    made = whole_pass(silent, tmp_path, n_contexts=10, pieces=2).tables
    assert [row["dead"] for row in made["latents"].to_pylist()] == [True] * N_LATENTS
    assert len(made["tokens"]) == len(made["histograms"]) == 0
    assert set(made["contexts"]["stratum"].to_pylist()) == {"inactive"}
    assert set(made["neighbours"]["cofire"].to_pylist()) == {0}
    none_read = replace(case, read=np.zeros_like(case.read))
    made = whole_pass(none_read, tmp_path / "unread").tables
    assert set(made["latents"]["density"].to_pylist()) == {0.0}
    assert len(made["contexts"]) == 0


def test_splits_are_halves_and_independent_of_what_training_held_out() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    scored = for_scores(hashes)
    assert scored.mean() == pytest.approx(0.5, abs=0.005)
    for fraction in (0.05, 0.5):
        held_out = heldout_documents(hashes, fraction)
        assert scored[held_out].mean() == pytest.approx(0.5, abs=0.02)
        assert held_out[scored].mean() == pytest.approx(fraction, abs=0.01)
    assert (for_scores(hashes[::-1])[::-1] == scored).all()  # of the text alone


def test_a_config_that_makes_no_sense_is_refused() -> None:
    for wrong in ({"n_top": 0}, {"n_decile": 101}, {"window_tokens": 0}, {"seed": 2**63}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FeatureConfig.model_validate(wrong)
