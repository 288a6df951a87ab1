"""The comparison of two dictionaries: cases made by hand, and a slow one on dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sae_harvest.pipelines.evaluate.matching import joint as joint_module
from sae_harvest.pipelines.evaluate.matching.classes import classed, fates
from sae_harvest.pipelines.evaluate.matching.disagreement import KINDS, disagreements
from tests.match_cases import LENGTH, HandSpans, compared, fires, firings_of, listed, slow

N = 800  # rows


def made_up(seed: int = 0, n: int = 24, m: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Activations with every class in them: topics of rows, copied, joined, cut and with holes."""
    rng = np.random.default_rng(seed)
    topics = rng.random((N, 12)) < rng.uniform(0.01, 0.12, 12)
    topics[:, 0] = rng.random(N) < 0.7  # dense

    def dictionary(size: int) -> np.ndarray:
        columns = []
        for _ in range(size):
            one, other = rng.integers(0, 12, 2)
            kind = rng.integers(0, 5)
            column = topics[:, one].copy()
            if kind == 1:
                column |= topics[:, other]
            elif kind == 2:
                column &= rng.random(N) < 0.5
            elif kind == 3:
                column &= ~topics[:, other]
            elif kind == 4:
                column = rng.random(N) < rng.uniform(0, 0.05)
            columns.append(column ^ (rng.random(N) < 0.005))
        return np.stack(columns, axis=1)

    values = [rng.integers(1, 9, (N, size)) * dictionary(size) for size in (n, m)]
    return values[0], values[1]


def test_a_permuted_dictionary_is_the_same():
    a, _ = made_up()
    order = np.random.default_rng(1).permutation(a.shape[1])
    joint, *_, pairs = compared(a, a[:, order])
    found = listed(pairs)
    enough = np.flatnonzero((a > 0).sum(0) >= 10)
    assert len(enough) > 15
    place = {int(latent): b for b, latent in enumerate(order)}
    for latent in enough.tolist():
        assert (latent, place[latent], "same", None) in found
    assert not {name for *_, name, _ in found} & {"split", "merged", "died", "born"}
    counts = fates(joint, pairs)
    assert counts.a["same"] == counts.b["same"] == len(enough)
    exact = [p for p in range(len(pairs)) if place[int(pairs.a[p])] == pairs.b[p]]
    assert (pairs.both[exact] == joint.n_a[pairs.a[exact]]).all()


def test_a_split_a_merge_a_removed_and_a_new_latent():
    broad, others = range(0, 60), range(200, 260)
    a = fires(N, broad, range(400, 430), range(430, 460), range(600, 640), range(60, 66))
    b = fires(N, range(0, 25), range(25, 50), range(400, 460), others)
    *_, pairs = compared(a, b)
    assert listed(pairs) == {
        (0, 0, "split", "B"),
        (0, 1, "split", "B"),
        (1, 2, "merged", "A"),
        (2, 2, "merged", "A"),
        (3, -1, "died", None),
        (-1, 3, "born", None),
    }
    joint, *_, turned = compared(b, a)
    assert listed(turned) == {
        (0, 0, "merged", "A"),
        (1, 0, "merged", "A"),
        (2, 1, "split", "B"),
        (2, 2, "split", "B"),
        (-1, 3, "born", None),
        (3, -1, "died", None),
    }
    assert fates(joint, turned).b == {
        "same": 0, "split": 2, "merged": 1, "absorbed": 0, "born": 1, "rare": 1, "dead": 0,
    }  # fmt: skip


def test_an_absorbed_latent_fires_where_its_parent_should_and_does_not():
    """The parent of A fires on 100 rows. In B it is silent on 20 of them, where a child fires."""
    child = range(80, 100)
    a = fires(N, range(0, 100), child)
    b = fires(N, range(0, 80), child)
    _, of_a, _, pairs = compared(a, b)
    assert listed(pairs) == {
        (0, 0, "same", None),
        (1, 1, "same", None),
        (0, 1, "absorbed", "B"),
    }
    here = pairs.kind == 3
    assert pairs.parent[here].tolist() == [0]
    assert pairs.parent_silent[here].tolist() == [20]
    assert of_a.gain.tolist()[:2] == [80, 20]
    *_, turned = compared(b, a)
    assert (1, 0, "absorbed", "A") in listed(turned)
    # where the parent fires as well, nothing is absorbed
    *_, pairs = compared(a, fires(N, range(0, 91), child))
    assert (0, 1, "absorbed", "B") not in listed(pairs)
    # exactly half is enough
    *_, pairs = compared(a, fires(N, range(0, 90), child))
    assert (0, 1, "absorbed", "B") in listed(pairs)


def test_a_dense_latent_explains_nothing_by_chance():
    rng = np.random.default_rng(3)
    a = fires(N, rng.choice(N, 60, replace=False))
    dense = fires(N, rng.choice(N, 500, replace=False))
    joint, *_, pairs = compared(a, dense)
    assert joint.best_b_both[0] > 30  # more than half of its rows
    assert listed(pairs) == {(0, -1, "died", None), (-1, 0, "born", None)}


@pytest.mark.parametrize("seed", range(4))
def test_the_classes_are_those_of_a_slow_comparison(seed):
    a, b = made_up(seed)
    *_, pairs = compared(a, b)
    assert listed(pairs) == slow(a, b)
    *_, turned = compared(b, a)
    assert listed(turned) == slow(b, a)


def test_the_made_up_cases_have_every_class():
    found = set()
    for seed in range(4):
        found |= {name for *_, name, _ in slow(*made_up(seed))}
    assert found == {"same", "split", "merged", "absorbed", "died", "born"}


def test_counts_are_those_of_dense_matrices():
    a, b = made_up()
    joint, of_a, of_b, _ = compared(a, b)
    x, y = (m > 0 for m in (a, b))
    both = x.T.astype(int) @ y
    assert joint.n_rows == N
    assert joint.n_a.tolist() == x.sum(0).tolist()
    assert joint.n_b.tolist() == y.sum(0).tolist()
    assert (both[joint.a, joint.b] == joint.both).all()
    jaccard = both / np.maximum(x.sum(0)[:, None] + y.sum(0) - both, 1)
    assert joint.best_b.tolist() == np.where(both.any(1), jaccard.argmax(1), -1).tolist()
    assert joint.best_a.tolist() == np.where(both.any(0), jaccard.argmax(0), -1).tolist()
    for sets, own, other in ((of_a, x, y), (of_b, y, x)):
        for latent in range(own.shape[1]):
            here = slice(sets.starts[latent], sets.starts[latent + 1])
            members, mine = sets.member[here], own[:, latent]
            if not len(members):
                continue
            union = other[:, members].any(axis=1)
            assert sets.covered[latent] == (union & mine).sum()
            assert sets.union[latent] == union.sum()
            seen = np.zeros(N, bool)
            for member, gain in zip(members, sets.gain[here], strict=True):
                assert gain == (mine & other[:, member] & ~seen).sum()
                seen |= other[:, member]


@pytest.mark.parametrize("each", [8, 40, 104, 800])
def test_spans_and_tiles_change_nothing(each, monkeypatch):
    a, b = made_up()
    _, *sets, pairs = compared(a, b)
    monkeypatch.setattr(joint_module, "TILE", 5 * b.shape[1])
    monkeypatch.setattr(joint_module, "LINES", 3)
    _, *other_sets, other = compared(a, b, each)
    for one, two in zip([*sets, pairs], [*other_sets, other], strict=True):
        for name in vars(one):
            assert np.array_equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("each", [16, 800])
def test_disagreements_are_the_strongest_rows_in_different_contexts(each):
    a, b = made_up(3)
    *_, pairs = compared(a, b)
    spans: Any = HandSpans(a.astype(float), b.astype(float), each)
    found = disagreements(spans, pairs)
    got = {}
    for pair, kind, row in zip(found.pair, found.kind, found.row, strict=True):
        got.setdefault((int(pair), int(kind)), []).append(int(row))
    expected = {}
    for place in range(len(pairs)):
        one, two, name = int(pairs.a[place]), int(pairs.b[place]), int(pairs.kind[place])
        x = a[:, one] if one >= 0 else np.zeros(N)
        y = b[:, two] if two >= 0 else np.zeros(N)
        if name != 5:
            expected[place, 0] = strongest(x * (y == 0))
        if name != 4:
            expected[place, 1] = strongest(y * (x == 0))
        if name == 3:
            dense, child = (a, one) if pairs.child[place] == 1 else (b, two)
            expected[place, 2] = strongest(dense[:, child] * (dense[:, pairs.parent[place]] == 0))
    assert got == {key: rows for key, rows in expected.items() if rows}
    assert {KINDS[kind] for _, kind in got} == set(KINDS)


def strongest(values: np.ndarray) -> list[int]:
    """The two highest values, in different contexts; of equal ones, the lower row."""
    found: list[int] = []
    for row in np.argsort(-values, kind="stable").tolist():
        if values[row] and row // LENGTH not in {r // LENGTH for r in found}:
            found.append(row)
    return found[:2]


def test_a_smaller_overlap_finds_weaker_matches():
    a, b = fires(N, range(100)), fires(N, range(40))
    *_, pairs = compared(a, b)
    assert {name for *_, name, _ in listed(pairs)} == {"died", "born"}
    *_, pairs = compared(a, b, overlap=0.36)
    assert listed(pairs) == {(0, 0, "same", None)}


def test_a_latent_that_never_fires_is_counted_as_dead():
    a = fires(N, range(100), [])
    joint, of_a, of_b, pairs = compared(a, a)
    assert fates(joint, classed(joint, of_a, of_b)).a["dead"] == 1
    assert listed(pairs) == {(0, 0, "same", None)}
    assert len(firings_of(a).row) == 100
