"""What the feature pass counts and keeps, against plain loops over a dense float64 matrix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np
import pytest
import torch

from pipelines.features import tables
from pipelines.features.accumulate import Accumulator
from pipelines.features.config import FeatureConfig
from pipelines.features.neighbours import decoder_neighbours
from store.rules import heldout_documents

N_LATENTS, K, LENGTH, CONTEXTS, VOCABULARY = 13, 4, 16, 40, 9
ROWS = CONTEXTS * LENGTH
ALWAYS, NEVER, ONCE, ALIKE = 0, 12, 11, 10  # latents with a fate


@dataclass
class Case:
    """Encoded rows of a made-up store: `selected` of them, latents and values [selected, K]."""

    selected: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray
    dense: np.ndarray  # float64 [rows, n_latents], 0 where nothing fired or nothing was read


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    selected = np.flatnonzero(rng.random(ROWS) < 0.85)
    indices = np.stack([rng.permutation(np.arange(1, 10))[:K] for _ in selected]).astype(np.int32)
    indices[rng.random(len(selected)) < 0.5, 0] = ALWAYS
    # quarters, so that there are many ties; a third of the places did not fire
    values = (rng.integers(1, 20, indices.shape) / 4).astype(np.float32)
    values[rng.random(indices.shape) < 0.3] = 0
    indices[100, :2], values[100, :2] = (ONCE, ALIKE), (3.25, 2.5)
    indices[200, 1], values[200, 1] = ALIKE, np.nextafter(np.float32(2.5), np.float32(3))
    values[indices == 9] *= 1e5  # beyond the last edge of the histogram
    values[indices == 8] *= 1e-5  # before the first
    # documents of 1 to 60 rows that do not respect contexts; -1 for the first row of some contexts
    documents = np.repeat(np.arange(ROWS), rng.integers(1, 60, ROWS))[:ROWS].astype(np.int64)
    documents[::LENGTH][rng.random(CONTEXTS) < 0.5] = -1
    dense = np.zeros((ROWS, N_LATENTS))
    for r, row in enumerate(selected):
        for j in range(K):
            dense[row, indices[r, j]] += values[r, j]
    tokens = rng.integers(0, VOCABULARY, ROWS).astype(np.int32)
    return Case(selected, indices, values, tokens, documents, dense)


NEIGHBOURS = np.array([[(i + step) % N_LATENTS for step in (1, 2, 5)] for i in range(N_LATENTS)])


def accumulated(case, config=None, edges=(0, CONTEXTS)):
    """The accumulator after the blocks between consecutive edges, in contexts."""
    config = config or FeatureConfig(n_top=5, n_random=4, window_tokens=7)
    counts = Accumulator(N_LATENTS, LENGTH, NEIGHBOURS.copy(), config)
    for first, last in pairwise(edges):
        block = slice(first * LENGTH, last * LENGTH)
        inside = (case.selected >= block.start) & (case.selected < block.stop)
        counts.add(
            block.start,
            case.selected[inside] - block.start,
            case.indices[inside],
            case.values[inside],
            case.tokens[block],
            case.documents[block],
        )
    return counts


class Texts:
    """Token texts without a tokenizer."""

    def one(self, token):
        return f"t{token}"


def latents_of(counts):
    rng = np.random.default_rng(1)
    weights = {
        "W_enc": rng.standard_normal((N_LATENTS, 6)).astype(np.float32),
        "W_dec": rng.standard_normal((N_LATENTS, 6)).astype(np.float32),
        "b_enc": rng.standard_normal(N_LATENTS).astype(np.float32),
    }
    config = FeatureConfig(n_tokens=3)
    return tables.latents_table(counts, CONTEXTS, weights, None, Texts(), config), weights


def test_counts_and_moments_are_those_of_the_dense_matrix(case):
    counts = accumulated(case)
    table, weights = latents_of(counts)
    rows = table.to_pylist()
    assert counts.n_rows == len(case.selected)
    for i, row in enumerate(rows):
        a = case.dense[:, i][case.dense[:, i] > 0]
        contexts = {r // LENGTH for r in range(ROWS) if case.dense[r, i] > 0}
        assert row["latent"] == i
        assert row["n_fire"] == len(a)
        assert row["dead"] == (len(a) == 0)
        assert row["density"] == len(a) / len(case.selected)
        assert row["n_contexts"] == len(contexts)
        assert row["context_density"] == len(contexts) / CONTEXTS
        assert row["max"] == (a.max() if len(a) else 0)
        assert row["mean"] == pytest.approx(a.mean() if len(a) else 0, rel=1e-12)
        assert row["std"] == pytest.approx(a.std() if len(a) else 0, rel=1e-9, abs=1e-6)
        assert row["mean_square"] == pytest.approx((a**2).sum() / len(case.selected), rel=1e-12)
        if i in (NEVER, ONCE, ALIKE):  # two values a last bit apart have no shape to measure
            assert row["skew"] is None
            assert row["kurtosis"] is None
        else:
            z = (a - a.mean()) / a.std()
            assert row["skew"] == pytest.approx((z**3).mean(), abs=1e-9)
            assert row["kurtosis"] == pytest.approx((z**4).mean(), rel=1e-9)
        encoder, decoder = (weights[name][i].astype(float) for name in ("W_enc", "W_dec"))
        cosine = encoder @ decoder / np.sqrt((encoder @ encoder) * (decoder @ decoder))
        assert row["encoder_decoder_cosine"] == pytest.approx(cosine, abs=1e-6)
        assert row["decoder_norm"] == pytest.approx(np.sqrt(decoder @ decoder), rel=1e-6)
        assert row["encoder_bias"] == weights["b_enc"][i]


def test_moments_of_a_known_latent():
    counts = Accumulator(1, 4, np.zeros((1, 0), np.int64), FeatureConfig())
    values = np.array([[1], [1], [1], [5]], np.float32)
    zeros = np.zeros((4, 1), np.int32)
    counts.add(0, np.arange(4), zeros, values, zeros[:, 0], np.zeros(4, np.int64))
    weights = {name: np.ones((1, 2), np.float32) for name in ("W_enc", "W_dec")}
    weights["b_enc"] = np.zeros(1, np.float32)
    (row,) = tables.latents_table(counts, 1, weights, None, Texts(), FeatureConfig()).to_pylist()
    assert row["mean"] == 2
    assert row["std"] == pytest.approx(3**0.5)  # deviations -1 -1 -1 3
    assert row["skew"] == pytest.approx(24 / 4 / 3**1.5)
    assert row["kurtosis"] == pytest.approx(84 / 4 / 9)
    assert row["mean_square"] == 7
    assert row["top_tokens"] == ["t0"]
    assert row["token_entropy_bits"] == 0


def test_histogram_holds_every_firing_within_its_edges(case):
    table = tables.histograms_table(accumulated(case)).to_pylist()
    for i in range(N_LATENTS):
        bins = [row for row in table if row["latent"] == i]
        a = case.dense[:, i][case.dense[:, i] > 0]
        assert sum(row["count"] for row in bins) == len(a)
        for row in bins:
            low = 0 if row["bin"] == 0 else row["low"]
            high = np.inf if row["bin"] == 95 else row["high"]
            assert row["count"] == ((a >= low) & (a < high)).sum() > 0
            assert row["high"] == pytest.approx(row["low"] * 2**0.25)
    assert {row["bin"] for row in table if row["latent"] == 8} == {0}
    assert {row["bin"] for row in table if row["latent"] == 9} == {95}


def test_quantiles_are_right_to_one_bin():
    rng = np.random.default_rng(3)
    a = np.exp(rng.standard_normal((6, 500))).astype(np.float32)
    a[5] = 0
    histogram = np.zeros((6, 96), np.int64)
    edges = tables.bin_edge(np.arange(97))
    for i in range(5):
        histogram[i] = np.histogram(a[i], edges)[0]
    for q in (0.01, 0.5, 0.9, 0.99, 1.0):
        found = tables.histogram_quantiles(histogram, q, a.max(axis=1))
        exact = np.quantile(a[:5], q, axis=1, method="inverted_cdf")
        np.testing.assert_allclose(np.log2(found[:5]), np.log2(exact), atol=0.2501)
        assert (found[:5] <= a[:5].max(axis=1)).all()
        assert found[5] == 0


def test_cofiring_and_jaccard_count_rows_on_which_both_fire(case):
    counts = accumulated(case)
    cosines = np.arange(NEIGHBOURS.size, dtype=np.float32).reshape(NEIGHBOURS.shape) / 100
    table = tables.neighbours_table(counts, cosines).to_pylist()
    assert len(table) == NEIGHBOURS.size
    for number, row in enumerate(table):
        i, rank = divmod(number, 3)
        fires, other = case.dense[:, i] > 0, case.dense[:, row["other"]] > 0
        both, either = (fires & other).sum(), (fires | other).sum()
        assert (row["latent"], row["rank"]) == (i, rank)
        assert row["other"] == NEIGHBOURS[i, rank]
        assert row["cofire"] == both
        assert row["jaccard"] == pytest.approx(both / either if either else 0)
        assert row["decoder_cosine"] == cosines[i, rank]


def test_token_counts_and_means(case):
    counts = accumulated(case, edges=(0, 3, 17, CONTEXTS))
    table = tables.tokens_table(counts, Texts()).to_pylist()
    rows = latents_of(counts)[0].to_pylist()
    for i in range(N_LATENTS):
        fired = [r for r in range(ROWS) if case.dense[r, i] > 0]
        count = Counter(int(case.tokens[r]) for r in fired)
        found = [row for row in table if row["latent"] == i]
        order = sorted(count, key=lambda t: (-count[t], t))
        assert [row["token"] for row in found] == order
        for row in found:
            values = [case.dense[r, i] for r in fired if case.tokens[r] == row["token"]]
            assert row["text"] == f"t{row['token']}"
            assert row["count"] == len(values)
            assert row["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        shares = np.array([count[t] for t in order]) / max(len(fired), 1)
        assert rows[i]["top_tokens"] == [f"t{t}" for t in order[:3]]
        assert rows[i]["top_token_shares"] == pytest.approx(shares[:3].tolist())
        assert rows[i]["token_entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())


def entries(short_list, latent):
    """(row, priority, document, window start, window) of a latent's places, best first."""
    found = []
    for place in range(short_list.kept[latent]):
        found.append(
            (
                int(short_list.peak_row[latent, place]),
                float(short_list.priority[latent, place]),
                int(short_list.peak_document[latent, place]),
                int(short_list.window_start[latent, place]),
                short_list.windows[latent, short_list.slot[latent, place]].tolist(),
            )
        )
    return found


def best_per_document(case, latent, places):
    """Rows of the top list by brute force: one per document, ties to the lower row."""
    best = {}
    for row in range(ROWS):
        a, document = case.dense[row, latent], int(case.documents[row])
        if a > 0 and (document not in best or a > case.dense[best[document], latent]):
            best[document] = row
    return sorted(best.values(), key=lambda row: (-case.dense[row, latent], row))[:places]


@pytest.mark.parametrize("places", [1, 5, 100])
def test_top_list_is_the_exact_top_one_per_document_ties_to_the_lower_row(case, places):
    config = FeatureConfig(n_top=places, n_random=0, window_tokens=7)
    counts = accumulated(case, config)
    for i in range(N_LATENTS):
        found = entries(counts.top, i)
        rows = [row for row, *_ in found]
        assert rows == best_per_document(case, i, places)
        assert [p for _, p, *_ in found] == [case.dense[row, i] for row in rows]
        assert [d for _, _, d, *_ in found] == case.documents[rows].tolist()


@pytest.mark.parametrize("window", [1, 7, 10, 16, 64])
def test_windows_stay_in_their_context_and_hold_only_rows_that_were_read(case, window):
    config = FeatureConfig(n_top=5, n_random=4, window_tokens=window)
    counts = accumulated(case, config, (0, 7, CONTEXTS))
    width = min(window, LENGTH)
    clamped = set()
    for short_list in (counts.top, counts.random):
        for i in range(N_LATENTS):
            for row, _, _, begin, shown in entries(short_list, i):
                context, position = divmod(row, LENGTH)
                wanted = position - int(0.7 * width)
                clamped.add(np.sign(begin - wanted))
                assert begin == min(max(wanted, 0), LENGTH - width)
                assert begin <= position < begin + width
                start = context * LENGTH + begin
                assert shown == case.dense[start : start + width, i].tolist()
                assert shown[position - begin] > 0
    if 1 < width < LENGTH:
        assert clamped == {-1, 0, 1}  # there were windows of every kind


def test_random_stratum_holds_distinct_firings_and_follows_the_seed(case):
    def rows(seed):
        counts = accumulated(case, FeatureConfig(n_random=6, window_tokens=7, seed=seed))
        return [[row for row, *_ in entries(counts.random, i)] for i in range(N_LATENTS)]

    for i, found in enumerate(rows(5)):
        fired = np.flatnonzero(case.dense[:, i])
        assert len(set(found)) == len(found) == min(6, len(fired))
        assert set(found) <= set(fired.tolist())
    assert rows(5) == rows(5)
    assert rows(5) != rows(6)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_random_stratum_draws_all_firings_alike(seed):
    n_latents, n_rows, places = 5000, 40, 4
    config = FeatureConfig(n_top=1, n_random=places, window_tokens=1, seed=seed)
    counts = Accumulator(n_latents, 8, np.zeros((n_latents, 0), np.int64), config)
    indices = np.tile(np.arange(n_latents, dtype=np.int32), (n_rows, 1))
    values = np.full(indices.shape, 0.5, np.float32)
    values[0] = 100  # how strongly a row fires must not matter
    tokens, documents = np.zeros(n_rows, np.int32), np.zeros(n_rows, np.int64)
    counts.add(0, np.arange(n_rows), indices, values, tokens, documents)
    drawn = counts.random.peak_row
    # χ² with 39 degrees of freedom exceeds 85 once in 30,000; without replacement it is smaller
    for some in (drawn, *drawn.T):  # all together, and those drawn first, second and so on
        count = np.bincount(some.reshape(-1), minlength=n_rows)
        assert ((count - count.mean()) ** 2 / count.mean()).sum() < 85
    pairs = np.zeros((n_rows, n_rows))  # and draws are independent: all pairs are alike
    for a in range(places):
        for b in range(places):
            np.add.at(pairs, (drawn[:, a], drawn[:, b]), a != b)
    pairs = pairs[np.triu_indices(n_rows, 1)]
    freedom = len(pairs) - 1  # 779; standard deviation of χ² is 39
    assert ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum() < freedom + 5 * (2 * freedom) ** 0.5


def state(counts):
    """Everything the accumulator knows, comparable."""
    return {
        "n_rows": counts.n_rows,
        **{
            name: getattr(counts, name).tolist()
            for name in ("n_fire", "n_contexts", "power_sums", "largest", "histogram", "together")
        },
        "top": [entries(counts.top, i) for i in range(N_LATENTS)],
        "random": [entries(counts.random, i) for i in range(N_LATENTS)],
    }


EDGES = [range(CONTEXTS + 1), (0, 1, 30, CONTEXTS), (0, 20, 20, 21, CONTEXTS)]


@pytest.mark.parametrize("edges", EDGES, ids=["each context", "uneven", "an empty block"])
def test_results_do_not_depend_on_how_rows_come_in_blocks(case, edges):
    whole, parts = accumulated(case), accumulated(case, edges=tuple(edges))
    assert state(parts) == state(whole)
    one, other = whole.token_counts(), parts.token_counts()
    assert other.drop_columns("total").equals(one.drop_columns("total"))
    np.testing.assert_allclose(other["total"], one["total"], rtol=1e-14)


def test_results_do_not_depend_on_the_number_of_threads(case):
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = accumulated(case)
        numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        two = accumulated(case)
    finally:
        numba.set_num_threads(before)
    assert state(two) == state(one)
    assert two.token_counts().equals(one.token_counts())


def test_compaction_of_token_counts_changes_nothing(case, monkeypatch):
    edges = tuple(range(CONTEXTS + 1))
    rarely = accumulated(case, edges=edges).token_counts()
    monkeypatch.setattr("pipelines.features.accumulate.COMPACT_ROWS", 10)
    often = accumulated(case, edges=edges).token_counts()
    assert often.equals(rarely)


@pytest.mark.parametrize("n_latents", [1, 2, 5, 1500])
def test_decoder_neighbours_are_the_nearest_by_cosine(n_latents):
    W_dec = torch.randn(n_latents, 12, generator=torch.Generator().manual_seed(0)) * 3
    latents, cosines = decoder_neighbours(W_dec, 4)
    n = min(4, n_latents - 1)
    assert latents.shape == cosines.shape == (n_latents, n)
    unit = W_dec.double().numpy()
    unit /= np.sqrt((unit**2).sum(axis=1, keepdims=True))
    for i in range(0, n_latents, max(1, n_latents // 50)):
        similarity = unit @ unit[i]
        order = [j for j in np.argsort(-similarity) if j != i][:n]
        assert latents[i].tolist() == order
        np.testing.assert_allclose(cosines[i], similarity[order], atol=1e-6)


def test_splits_are_halves_and_independent_of_what_training_held_out():
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    scored = tables.document_split(hashes) == "score"
    assert set(tables.document_split(hashes).tolist()) == {"explain", "score"}
    assert scored.mean() == pytest.approx(0.5, abs=0.005)
    for fraction in (0.05, 0.5):
        held_out = heldout_documents(hashes, fraction)
        assert scored[held_out].mean() == pytest.approx(0.5, abs=0.02)
        assert held_out[scored].mean() == pytest.approx(fraction, abs=0.01)
    again = tables.document_split(hashes[::-1])[::-1]
    assert (again == tables.document_split(hashes)).all()  # of the text alone
