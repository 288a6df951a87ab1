"""The examples of each latent, against plain loops over a dense matrix, and how they are drawn."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.counting import kernels
from sae_harvest.pipelines.features.counting.candidates import (
    SPARE,
    TokenRows,
    by_neighbour,
    by_token,
)
from sae_harvest.pipelines.features.counting.profile import decile_edges
from sae_harvest.pipelines.features.tables.contexts import STRATA
from tests.feature_cases import (
    ALWAYS,
    CONFIG,
    LENGTH,
    N_LATENTS,
    NEVER,
    Case,
    Pass,
    made_case,
    sparse_case,
    tokens_of,
    whole_pass,
    write_rows,
)

Contexts = dict[tuple[int, str], list[dict[str, Any]]]
FIRING = STRATA[:-2]


@pytest.fixture(scope="module")
def case() -> Case:
    return made_case()


@pytest.fixture(scope="module")
def found(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Pass:
    return whole_pass(case, tmp_path_factory.mktemp("pass"))


@pytest.fixture(scope="module")
def strata(found: Pass) -> Contexts:
    return by_stratum(found)


def by_stratum(made: Pass) -> Contexts:
    """The contexts of each (latent, stratum), as they come in the table."""
    lists: Contexts = defaultdict(list)
    for row in made.tables["contexts"].to_pylist():
        lists[row["latent"], row["stratum"]].append(row)
    return lists


def rows_of(contexts: list[dict[str, Any]]) -> list[int]:
    return [row["row"] for row in contexts]


def chi_squared(count: np.ndarray) -> float:
    """Against all being alike."""
    return float(((count - count.mean()) ** 2 / count.mean()).sum())


def assert_alike(count: np.ndarray) -> None:
    """χ² of at least this many counts is within 5 of its standard deviations from the mean."""
    freedom = count.size - 1
    assert chi_squared(count) < freedom + 5 * (2 * freedom) ** 0.5


def silent(case: Case, dense: np.ndarray, row: int, latent: int, window: int) -> bool:
    """Whether the row may be shown as one in whose window the latent is silent."""
    begin = window_start(case, row, window)
    start = row - row % case.length + begin
    return bool(case.read[row]) and not dense[start : start + window, latent].any()


def window_start(case: Case, row: int, window: int) -> int:
    """70 % of the window lies before the row, as far as the context allows."""
    return min(max(row % case.length - int(0.7 * window), 0), case.length - window)


def test_contexts_are_sorted_by_latent_stratum_and_rank(found: Pass, strata: Contexts) -> None:
    table = found.tables["contexts"].to_pylist()
    order = [(row["latent"], STRATA.index(row["stratum"]), row["rank"]) for row in table]
    assert order == sorted(order)
    for contexts in strata.values():
        assert [row["rank"] for row in contexts] == list(range(len(contexts)))
        assert len(set(rows_of(contexts))) == len(contexts)  # distinct


@pytest.mark.parametrize("places", [1, 5, 100])
def test_top_is_exact_with_one_per_document_and_ties_to_the_lower_row(
    case: Case, tmp_path: Path, places: int
) -> None:
    config = CONFIG.model_copy(update={"n_top": places})
    strata = by_stratum(whole_pass(case, tmp_path, config, n_contexts=3, pieces=2))
    dense = case.dense
    for i in range(N_LATENTS):
        best: dict[int, int] = {}
        for row in np.flatnonzero(dense[:, i]).tolist():
            document = int(case.documents[row])
            if document not in best or dense[row, i] > dense[best[document], i]:
                best[document] = row
        expected = sorted(best.values(), key=lambda row: (-dense[row, i], row))[:places]
        assert rows_of(strata[i, "top"]) == expected


def test_deciles_lie_between_the_nearest_edges_of_the_histogram(
    case: Case, found: Pass, strata: Contexts
) -> None:
    counts: dict[int, dict[int, int]] = defaultdict(dict)
    for row in found.tables["histograms"].to_pylist():
        counts[row["latent"]][row["bin"]] = row["count"]
    drawn_from: Counter[int] = Counter()
    for i in range(N_LATENTS):
        below = [0]  # firings below the lower edge of each bin, and of the last one's upper
        for number in range(384):
            below.append(below[-1] + counts[i].get(number, 0))
        edges = []
        for tenth in range(1, 10):
            wanted = tenth * below[-1] / 10
            nearest = min(range(385), key=lambda number: (abs(below[number] - wanted), number))
            edges.append(2.0 ** (nearest / 16 - 12))
        a = case.dense[:, i]
        for decile in range(1, 11):
            low = edges[decile - 2] if decile > 1 else 0
            high = edges[decile - 1] if decile < 10 else np.inf
            members = set(np.flatnonzero((a > 0) & (a >= low) & (a < high)).tolist())
            shown = rows_of(strata[i, f"decile_{decile}"])
            assert set(shown) <= members
            assert len(shown) == min(CONFIG.n_decile, len(members))
            drawn_from[decile] += len(shown) > 0
    assert min(drawn_from.values()) >= 5  # latents with a decile of each number


def test_an_activation_at_an_edge_is_in_the_decile_that_begins_there(tmp_path: Path) -> None:
    value = np.repeat(np.array([1.95, 2.0], np.float32), 5)  # bins that meet at 2
    config = CONFIG.model_copy(update={"n_decile": 10})
    strata = by_stratum(whole_pass(sparse_case(1, np.arange(10), value), tmp_path, config))
    # 5 of 10 are below 2, which is nearest to the edges of 30 % to 70 %
    assert sorted(rows_of(strata[0, "decile_3"])) == [0, 1, 2, 3, 4]
    assert sorted(rows_of(strata[0, "decile_8"])) == [5, 6, 7, 8, 9]


def test_deciles_are_tenths_where_activations_are_many() -> None:
    a = np.exp(np.random.default_rng(0).standard_normal(100_000))
    bins = np.floor(16 * (np.log2(a) + 12)).astype(int)
    (edges,) = decile_edges(np.bincount(bins, minlength=kernels.BINS)[None])
    shares = np.diff(np.searchsorted(np.sort(a), [0, *edges, np.inf])) / len(a)
    np.testing.assert_allclose(shares, 0.1, atol=0.02)  # a bin holds 1.7 % at most


def test_random_holds_firings_and_follows_the_seed(
    case: Case, strata: Contexts, tmp_path: Path
) -> None:
    for i in range(N_LATENTS):
        fired = set(np.flatnonzero(case.dense[:, i]).tolist())
        shown = rows_of(strata[i, "random"])
        assert set(shown) <= fired
        assert len(shown) == min(CONFIG.n_random, len(fired))
    other = whole_pass(case, tmp_path / "5", CONFIG.model_copy(update={"seed": 5}))
    for stratum in ("random", "decile_5", "inactive"):
        here, there = (
            [rows_of(lists[i, stratum]) for i in range(N_LATENTS)]
            for lists in (strata, by_stratum(other))
        )
        assert here != there
    again = whole_pass(case, tmp_path / "again", CONFIG.model_copy(update={"seed": 5}))
    assert again.tables["contexts"].equals(other.tables["contexts"])


@pytest.mark.parametrize("seed", [2**32, 2**62 - 1, 2**63 - 1])
def test_every_seed_that_is_taken_draws(case: Case, tmp_path: Path, seed: int) -> None:
    try:
        config = FeatureConfig.model_validate(CONFIG.model_dump() | {"seed": seed})
    except ValueError:
        assert seed > 2**62  # refused, in words
        return
    assert len(whole_pass(case, tmp_path, config).tables["contexts"]) > 0


def test_inactive_rows_are_read_and_have_a_silent_window(case: Case, strata: Contexts) -> None:
    dense, shown = case.dense, 0
    for i in range(N_LATENTS):
        contexts = strata[i, "inactive"]
        assert len(contexts) <= CONFIG.n_inactive
        assert all(silent(case, dense, row["row"], i, 7) for row in contexts)
        assert all(row["activation"] == 0 == sum(row["activations"]) for row in contexts)
        assert all(row["reason"] is None for row in contexts)
        shown += len(contexts)
    assert len(strata[NEVER, "inactive"]) == CONFIG.n_inactive
    assert shown > 0.8 * N_LATENTS * CONFIG.n_inactive
    assert len(strata[ALWAYS, "inactive"]) < CONFIG.n_inactive  # it fires nearly everywhere


def test_hard_negatives_look_alike_and_take_turns(
    case: Case, found: Pass, strata: Contexts
) -> None:
    """Every one against loops; the lists of rows to try are those of `candidates`."""
    dense = case.dense
    near = defaultdict(set)
    for pair in found.tables["neighbours"].to_pylist():
        if any(
            rank is not None and rank < 2 for rank in (pair["cosine_rank"], pair["cofire_rank"])
        ):
            near[pair["latent"]].add(pair["other"])
    reasons: Counter[str] = Counter()
    for i in range(N_LATENTS):
        count = Counter(case.tokens[np.flatnonzero(dense[:, i])].tolist())
        often = sorted(count, key=lambda t: (-count[t], t))[:3]
        contexts = strata[i, "hard_negative"]
        for row in contexts:
            assert silent(case, dense, row["row"], i, 7)
            assert row["activation"] == 0 == sum(row["activations"])
            if row["reason"] == "token":
                assert case.tokens[row["row"]] in often
            else:
                assert row["reason"] == "neighbour"
                assert any(dense[row["row"], j] > 0 for j in near[i])
        tokens = np.array([[*often, -1, -1, -1][:3]])
        tried = {
            "token": by_token(tokens, found.token_rows)[0].tolist(),
            "neighbour": by_neighbour(found.others[i : i + 1], found.drawn)[0].tolist(),
        }
        fit: dict[str, list[int]] = {}
        for reason, rows in tried.items():  # a row is shown once, for the first reason
            before = fit.get("token", [])
            fit[reason] = [
                row
                for row in dict.fromkeys(rows)
                if row >= 0 and row not in before and silent(case, dense, row, i, 7)
            ]
        expected = [
            (reason, fit[reason][turn])
            for turn in range(max(map(len, fit.values())))
            for reason in ("token", "neighbour")
            if turn < len(fit[reason])
        ]
        assert [(row["reason"], row["row"]) for row in contexts] == expected[: CONFIG.n_hard]
        reasons.update(row["reason"] for row in contexts)
    assert min(reasons["token"], reasons["neighbour"]) > 15


@pytest.mark.parametrize("window", [1, 7, 10, 16, 64])
def test_windows_stay_in_their_context_and_hold_only_rows_that_were_read(
    case: Case, tmp_path: Path, window: int
) -> None:
    config = CONFIG.model_copy(update={"window_tokens": window})
    made = whole_pass(case, tmp_path, config, n_contexts=7)
    width, clamped, dense = min(window, LENGTH), set(), case.dense
    for row in made.tables["contexts"].to_pylist():
        wanted = row["position"] - int(0.7 * width)
        begin = row["window_start"]
        clamped.add(int(np.sign(begin - wanted)))
        assert begin == min(max(wanted, 0), LENGTH - width)
        assert begin <= row["position"] < begin + width
        assert row["row"] == row["context"] * LENGTH + row["position"]
        here = slice(row["context"] * LENGTH + begin, row["context"] * LENGTH + begin + width)
        assert row["activations"] == dense[here, row["latent"]].astype(np.float32).tolist()
        assert row["activation"] == np.float32(dense[row["row"], row["latent"]])
        assert (row["activation"] > 0) == (row["stratum"] in FIRING)
        assert (row["reason"] is None) == (row["stratum"] != "hard_negative")
        assert row["token_ids"] == case.tokens[here].tolist()
        assert tokens_of(row) == [f" t{t}" for t in case.tokens[here]]
        assert row["text"] == "".join(tokens_of(row))
        assert row["document"] == case.documents[row["row"]]
        assert row["split"] == ("score" if case.scores[row["row"]] else "explain")
    if 1 < width < LENGTH:
        assert clamped == {-1, 0, 1}  # there were windows of every kind


@pytest.mark.parametrize(
    ("none", "left"),
    [
        ({"n_random": 0}, set(STRATA) - {"random"}),
        ({"n_decile": 0}, {"top", "random", "inactive", "hard_negative"}),
        ({"n_inactive": 0, "n_hard": 0}, set(FIRING)),
    ],
)
def test_a_stratum_that_is_not_wanted_is_left_out(
    case: Case, tmp_path: Path, none: dict[str, int], left: set[str]
) -> None:
    made = whole_pass(case, tmp_path, CONFIG.model_copy(update=none)).tables["contexts"]
    assert set(made["stratum"].to_pylist()) == left


DRAWN_ROWS, MANY = 40, 5000


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_random_draws_all_firings_alike(tmp_path: Path, seed: int) -> None:
    value = np.full(DRAWN_ROWS, 0.5, np.float32)
    value[0] = 100  # how strongly a row fires must not matter
    config = FeatureConfig(n_top=1, n_decile=0, n_random=4, n_inactive=0, n_hard=0, seed=seed)
    drawn = drawn_rows(tmp_path, value, config, ["random"])
    assert drawn.shape == (MANY, 4)
    # χ² with 39 degrees of freedom exceeds 85 once in 30,000; without replacement it is smaller
    for some in (drawn, *drawn.T):  # all together, and those drawn first, second and so on
        assert chi_squared(np.bincount(some.reshape(-1), minlength=DRAWN_ROWS)) < 85
    pairs = np.zeros((DRAWN_ROWS, DRAWN_ROWS))  # and draws are independent: all pairs are alike
    for a in range(4):
        for b in range(4):
            np.add.at(pairs, (drawn[:, a], drawn[:, b]), a != b)
    assert_alike(pairs[np.triu_indices(DRAWN_ROWS, 1)])


@pytest.mark.slow
def test_deciles_draw_their_members_alike_and_apart_from_random(tmp_path: Path) -> None:
    value = np.repeat(2.0 ** np.arange(10), 4).astype(np.float32)  # four rows to a tenth
    config = FeatureConfig(n_top=1, n_decile=2, n_random=20, n_inactive=0, n_hard=0, seed=3)
    deciles = [f"decile_{decile}" for decile in range(1, 11)]
    drawn = drawn_rows(tmp_path, value, config, deciles).reshape(MANY, 10, 2)
    assert (drawn // 4 == np.arange(10)[:, None]).all()
    for decile in drawn.transpose(1, 0, 2):
        assert_alike(np.bincount(decile.reshape(-1) % 4, minlength=4))
        assert_alike(np.bincount(decile.sum(axis=1) % 4 * 4 + decile.min(axis=1) % 4)[[4, 8, 12]])
    random = drawn_rows(tmp_path / "random", value, config, ["random"])
    both = sum(np.isin(drawn[i], random[i]).sum() for i in range(MANY))
    assert both / drawn.size == pytest.approx(0.5, abs=0.01)  # neither follows the other


def drawn_rows(
    out: Path, value: np.ndarray, config: FeatureConfig, strata: Sequence[str]
) -> np.ndarray:
    """Rows [MANY, any] that each latent shows of the strata; all latents fire alike."""
    made = whole_pass(sparse_case(MANY, np.arange(len(value)), value), out, config, pieces=2)
    table = made.tables["contexts"]
    mine = np.isin(table["stratum"].to_numpy(zero_copy_only=False), strata)
    return table["row"].to_numpy()[mine].reshape(MANY, -1)


def test_inactive_draws_all_silent_rows_alike(tmp_path: Path) -> None:
    config = FeatureConfig(n_inactive=2, n_hard=0, n_decile=0, window_tokens=3)
    latents = sparse_case(MANY, np.arange(40), np.ones(40, np.float32))
    latents.values[:] = 0
    latents.values[:8] = 1  # of five contexts all fire in the first
    latents.read[30:] = False
    table = whole_pass(latents, tmp_path, config).tables["contexts"]
    mine = table["stratum"].to_numpy(zero_copy_only=False) == "inactive"
    count = np.bincount(table["row"].to_numpy()[mine], minlength=40)
    assert set(np.flatnonzero(count)) == set(range(8, 30))
    assert count.sum() > 0.95 * 2 * MANY  # tries are SPARE times as many as are wanted
    assert SPARE > 1
    assert_alike(count[8:30])


def test_rows_of_a_token_are_drawn_alike_from_those_that_are_read(tmp_path: Path) -> None:
    n_tokens = 3000
    made = sparse_case(1, np.arange(40 * n_tokens), np.zeros(40 * n_tokens, np.float32))
    made.tokens = np.tile(np.arange(n_tokens, dtype=np.int32), 40)  # each stands on 40 rows
    made.read[made.tokens == 7] = False
    made.read[: 10 * n_tokens] = False
    rows = write_rows(made, tmp_path)
    of = TokenRows(rows, seed=1).rows
    assert of.shape == (n_tokens, 8)
    assert (of[7] == -1).all()
    drawn = np.delete(of, 7, axis=0)
    assert (drawn % n_tokens == np.delete(np.arange(n_tokens), 7)[:, None]).all()
    assert all(len(set(line)) == 8 for line in drawn.tolist())
    count = np.bincount(drawn.reshape(-1) // n_tokens, minlength=40)
    assert count[:10].sum() == 0
    assert_alike(count[10:])
    assert (TokenRows(rows, seed=1, chunk=1000).rows == of).all()
    assert (TokenRows(rows, seed=2).rows != of).any()
