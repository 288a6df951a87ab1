"""Programs learnt from firings, against latents whose program is known and slow oracles."""

from __future__ import annotations

import numpy as np
import pytest

from sae_harvest.pipelines.evaluate.intervals import (
    clusters_of,
    interval,
    percentiles,
    resampled,
)
from sae_harvest.pipelines.evaluate.programs import scoring
from sae_harvest.pipelines.evaluate.programs.counting import METRICS, SLOPE
from sae_harvest.pipelines.evaluate.programs.firings import split_firings
from sae_harvest.pipelines.evaluate.programs.forms import (
    ANY,
    line_of,
    patterns_of,
    text_of_pattern,
    texts_of,
)
from sae_harvest.pipelines.evaluate.programs.learning import learn
from sae_harvest.pipelines.evaluate.programs.scores import RESAMPLES, Means
from sae_harvest.pipelines.evaluate.programs.suffixes import START, Suffixes, TokenRows
from sae_harvest.pipelines.evaluate.programs.tries import nodes_of_rows
from sae_harvest.pipelines.features.encoding.firings import Firings
from sae_harvest.pipelines.features.tables.rows import for_scores
from tests.program_cases import (
    CASES,
    LENGTH,
    A,
    B,
    firings_of,
    made_rows,
    noisy,
    predicted,
    program_of,
    slow_scores,
)


def test_a_pattern_has_the_rows_that_a_slow_count_finds() -> None:
    rows = made_rows(n_contexts=12, vocabulary=4)
    suffixes = Suffixes.of(rows)
    seen: dict[tuple[int, ...], set[int]] = {}
    for row in range(len(rows.token)):
        for mask in range(8):
            key = [mask, int(rows.token[row])]
            for back in (1, 2, 3):
                if mask >> (back - 1) & 1:
                    inside = row % LENGTH >= back
                    key.append(int(rows.token[row - back]) if inside else START)
                    assert suffixes.token(suffixes.number[mask, row], back) == key[-1]
            seen.setdefault(tuple(key), set()).add(row)
    numbers = {key: suffixes.number[key[0], min(found)] for key, found in seen.items()}
    assert sorted(numbers.values()) == list(range(len(seen)))
    for key, found in seen.items():
        some = np.array(sorted(found))
        assert (suffixes.number[key[0], some] == numbers[key]).all()
        assert suffixes.train[numbers[key]] == rows.train[some].sum()
        here = slice(*suffixes.test_starts[numbers[key] : numbers[key] + 2])
        clusters, counts = np.unique(rows.cluster[some[rows.test[some]]], return_counts=True)
        assert suffixes.test_cluster[here].tolist() == clusters.tolist()
        assert suffixes.test_count[here].tolist() == counts.tolist()


def test_of_a_large_store_the_first_rows_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_harvest.pipelines.evaluate.programs.suffixes.MOST_ROWS", 75)
    hashes = np.random.default_rng(0).integers(0, 2**63, 64).astype(np.uint64)
    token, read = np.arange(64, dtype=np.int32), np.arange(64) % 5 > 0
    part = token, np.zeros(64, np.int64), hashes, read
    rows = TokenRows.of([part, part, part], LENGTH)
    assert rows.token.tolist() == [*range(64)]  # 75 rows are not whole contexts
    rows = TokenRows.of([tuple(column[:40] for column in part)] * 2, 8, text_begins=1)
    assert rows.token.tolist() == [*range(40), *range(32)]
    assert (rows.train | rows.test).tolist() == [*read[:40], *read[:32]]
    assert (rows.train & rows.test).sum() == 0
    assert rows.test[:40].tolist() == (for_scores(hashes) & read)[:40].tolist()
    assert rows.cluster[40:].tolist() == clusters_of(hashes)[:32].tolist()
    # firings on other rows are left out
    firings = Firings(64, 0, np.array([0, 3]), np.array([0, 7, 8], np.int32), np.ones(3, "f4"))

    class OneBlock:
        def all(self, first: int, last: int) -> list[tuple[slice, Firings]]:
            return [(slice(64, 80), firings)]

    train, test = split_firings(rows, OneBlock(), 0, 1)  # type: ignore[arg-type]
    found = sorted([*train.row.tolist(), *test.row.tolist()])
    assert found == [row for row in (64, 71) if read[row - 40]]


@pytest.mark.parametrize("name", CASES)
def test_a_known_program_is_learnt_exactly(name: str) -> None:
    case, rows = CASES[name], made_rows()
    suffixes, dense = Suffixes.of(rows), case.activation(rows)
    tries = learn(suffixes, 0, firings_of(dense, rows.train))
    assert program_of(suffixes, tries) == case.patterns
    test = firings_of(dense, rows.test)
    scores = scoring.score("ngrams", tries, suffixes, test, suffixes.cluster_rows).scores
    assert scores.values[0].tolist() == pytest.approx([1] * len(METRICS), abs=1e-9)
    assert scores.recall[0].tolist() == [1] * 10
    assert np.isnan(scores.other).all()


def test_a_token_table_holds_the_mean_over_the_rows_of_each_token() -> None:
    rows = made_rows()
    suffixes, dense = Suffixes.of(rows), noisy(rows)[0]
    tries = learn(suffixes, 0, firings_of(dense, rows.train), back=0)
    found = program_of(suffixes, tries)
    for token in np.unique(rows.token):
        here = rows.train & (rows.token == token)
        if dense[here].any():
            assert found[(int(token),)] == pytest.approx(dense[here].mean(), rel=1e-6)
        else:
            assert (int(token),) not in found
    # of all thresholds, the one with the best F1 on training rows
    x, y = predicted(suffixes, tries)[rows.train], dense[rows.train] > 0
    f1 = {v: 2 * (y & (x >= v)).sum() / ((x >= v).sum() + y.sum()) for v in np.unique(x[x > 0])}
    assert f1[tries.threshold[0]] == max(f1.values())


@pytest.mark.parametrize("kind", scoring.KINDS)
def test_scores_are_those_of_a_slow_implementation(kind: str) -> None:
    rows = made_rows()
    suffixes, dense = Suffixes.of(rows), noisy(rows)
    tries = learn(suffixes, 0, firings_of(dense, rows.train), scoring.KINDS[kind])
    test = firings_of(dense, rows.test)
    group = scoring.score(kind, tries, suffixes, test, suffixes.cluster_rows)
    nodes = 0
    for latent in range(len(dense)):
        x, y = predicted(suffixes, tries, latent)[rows.test], dense[latent][rows.test]
        expected, recall = slow_scores(x, y, tries.threshold[latent])
        assert group.scores.values[latent].tolist() == pytest.approx(expected, abs=1e-6)
        assert group.scores.recall[latent].tolist() == pytest.approx(recall, abs=1e-6)
        other = (latent + 1) % len(dense)
        x = predicted(suffixes, tries, other)[rows.test]
        expected, _ = slow_scores(x, y, tries.threshold[other])
        assert group.scores.other[latent].tolist() == pytest.approx(expected, abs=1e-6)
        nodes += len(np.unique(x))
    assert nodes > 7 * len(dense)  # several predictions each
    assert group.scores.positives.tolist() == (dense[:, rows.test] > 0).sum(1).tolist()
    assert group.scores.rows == rows.test.sum()


def test_intervals_are_those_of_the_house_and_the_slope_of_auprc_is_its_derivative() -> None:
    rows = made_rows(n_contexts=60)
    suffixes, dense = Suffixes.of(rows), noisy(rows)[:2]
    tries = learn(suffixes, 0, firings_of(dense, rows.train))
    test = firings_of(dense, rows.test)
    group = scoring.score("ngrams", tries, suffixes, test, suffixes.cluster_rows)
    x, y = predicted(suffixes, tries)[rows.test], dense[0][rows.test]
    cluster, hit = rows.cluster[rows.test], x >= tries.threshold[0]
    sums = np.zeros((256, 3))
    np.add.at(sums, cluster, np.stack([hit, y > 0, hit & (y > 0)], axis=1))
    limits = interval(sums, lambda s: 2 * s[..., 2] / (s[..., 0] + s[..., 1]), RESAMPLES)
    assert limits is not None
    f1 = METRICS.index("f1")
    assert group.scores.low[0, f1] == pytest.approx(limits[0])
    assert group.scores.high[0, f1] == pytest.approx(limits[1])

    found = np.zeros((256, 15))
    auprc = scoring._count(
        tries, 0, suffixes, test.of(0, 1), suffixes.cluster_rows, found, np.empty(10, np.float32)
    )
    assert found[:, SLOPE].sum() == pytest.approx(0, abs=1e-9)
    for c in np.unique(cluster)[:5]:
        less, more = (
            slow_scores(x, y, 1.0, weight=np.where(cluster == c, 1 + step, 1))[0][3]
            for step in (-1e-4, 1e-4)
        )
        assert found[c, SLOPE] == pytest.approx((more - less) / 2e-4, abs=1e-6)
        assert less < auprc < more or more < auprc < less or less == more


def test_percentiles_ignore_resamples_without_a_value() -> None:
    values = np.arange(12.0).reshape(6, 2)
    values[3:, 1] = np.nan
    low, high = percentiles(values)
    for column in range(2):
        some = values[np.isfinite(values[:, column]), column]
        expected = np.quantile(some, [0.025, 0.975])
        assert (low[column], high[column]) == pytest.approx(expected)
    assert np.isnan(percentiles(np.full((4, 1), np.nan))[0]).all()
    assert resampled(np.eye(1, 3), lambda s: s) is None


def test_means_over_latents_and_their_intervals_are_of_all_latents_together() -> None:
    rows = made_rows()
    suffixes, dense = Suffixes.of(rows), noisy(rows)
    tries = learn(suffixes, 0, firings_of(dense, rows.train))
    test = firings_of(dense, rows.test)
    whole = scoring.score("ngrams", tries, suffixes, test, suffixes.cluster_rows)
    one, two = Means(), Means()
    one.add(whole.added)
    for latent in range(len(dense)):
        train = firings_of(dense[latent : latent + 1], rows.train)
        part = learn(suffixes, latent, train)
        some = scoring.score(
            "ngrams", part, suffixes, test.of(latent, latent + 1), suffixes.cluster_rows
        )
        assert np.array_equal(some.scores.values[0], whole.scores.values[latent])
        two.add(some.added)
    for this, that in zip(two.program.figures(), one.program.figures(), strict=True):
        assert this[0] == that[0]
        assert this[1:] == pytest.approx(that[1:])
    name, value, low, high = next(one.constant.figures())
    share = (dense[:, rows.test] > 0).mean()
    assert (name, value) == ("precision", pytest.approx(share))
    assert low < value < high
    assert (one.other.latents, two.other.latents) == (len(dense), 0)


def test_a_program_is_readable() -> None:
    rows = made_rows()
    suffixes = Suffixes.of(rows)
    texts = {A: "Golden", B: ' "Bridge"\n'}
    lines = {}
    for name, case in CASES.items():
        tries = learn(suffixes, 0, firings_of(case.activation(rows), rows.train))
        (lines[name],) = texts_of(tries, patterns_of(suffixes, tries), texts.__getitem__)
    bridge = r'" \"Bridge\"\n"'
    assert lines == {
        "fires on A": '"Golden" → 3',
        "fires on B after A": f'"Golden" {bridge} → 2.5',
        "fires on B two after A": f'"Golden" * {bridge} → 7.5',
        "fires on B unless after A": f'{bridge} → 1.5; "Golden" {bridge} → 0',
        "fires on B at the start": f"^ {bridge} → 4",
    }
    assert text_of_pattern([A, ANY, A], texts.__getitem__) == '"Golden" * "Golden"'
    assert line_of([([A], 1.0)], 1001, texts.__getitem__) == '"Golden" → 1; 1,000 more'


def test_a_latent_without_firings_has_an_empty_program() -> None:
    rows = made_rows(n_contexts=30)
    suffixes, dense = Suffixes.of(rows), np.zeros((2, len(rows.token)))
    dense[1] = CASES["fires on A"].activation(rows) * rows.test  # on no training row
    tries = learn(suffixes, 0, firings_of(dense, rows.train))
    assert len(tries.nodes) == 0
    assert np.isinf(tries.threshold).all()
    test = firings_of(dense, rows.test)
    scores = scoring.score("ngrams", tries, suffixes, test, suffixes.cluster_rows).scores
    assert np.isnan(scores.values[0]).all()
    share = (dense[1][rows.test] > 0).mean()
    assert scores.values[1].tolist() == pytest.approx([0, 0, 0, share, 0, 0])
    assert texts_of(tries, patterns_of(suffixes, tries), str) == ["", ""]
    assert (nodes_of_rows(0, 0, tries.nodes, suffixes.number, test.row) == -1).all()
