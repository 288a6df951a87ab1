"""The study of the sparse frontier: its points, its table and its plots."""

from __future__ import annotations

import re

import pytest

from bench.studies.frontier.members import (
    KS,
    L1,
    SEEDS,
    Point,
    baseline_points,
    members,
    points,
)
from bench.studies.frontier.table import COLUMNS, L0, cells, drawing, markdown
from sae_harvest.pipelines.evaluate.figures import Figure, figures_table


def test_there_are_six_functions_at_five_sparsities_with_three_seeds_on_one_stream():
    every = members(100_000)
    assert len(every) == 6 * len(KS) * len(SEEDS)
    assert {config.order_seed for config in every.values()} == {0}
    assert {config.tokens for config in every.values()} == {100_000}
    assert {(config.activation, config.seed) for config in every.values()} == {
        (name, seed)
        for name in ("topk", "batchtopk", "jumprelu", "relu_kl", "relu_l1", "gated")
        for seed in SEEDS
    }
    assert [config.l1 for name, config in every.items() if name.startswith("gated")] == [
        value for value in L1["gated"] for _ in SEEDS
    ]
    assert {name for point, _ in points() for name in point.names} == set(every)
    assert {point.names for point, _ in baseline_points()}.isdisjoint(every)


def test_a_cell_has_the_mean_and_both_uncertainties():
    point = Point("topk", "k8", ("a", "b"))
    figures = [
        Figure(c.metric, name, c.part, value, value - 0.1, value + 0.3, 9, "rows")
        for c in COLUMNS
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    found = cells(figures_table(figures), [point])[point, L0]
    assert (found.value, found.half_width, found.half_range) == pytest.approx((1.5, 0.2, 0.5))
    assert found.text(1) == "1.5 ±0.2 (0.5)"
    table = markdown(figures_table(figures), [point]).splitlines()
    assert table[2].startswith("| topk, k 8 | 1.5 ±0.2 (0.5) | 1.500 ±0.200 (0.500) |")
    assert len({line.count("|") for line in table}) == 1


def test_every_family_is_drawn_in_every_plot():
    some = [Point(family, "k8", (family,)) for family in ("topk", "PCA")]
    some += [Point(family, "k9", (family + "9",)) for family in ("topk", "PCA")]
    figures = [
        Figure(c.metric, name, c.part, float(n + 1), None, None, 9, "rows")
        for c in COLUMNS
        for n, point in enumerate(some)
        for name in point.names
    ]
    found = drawing(figures_table(figures), some)
    n_plots = found.count("<svg x=")
    assert n_plots == len(COLUMNS) - 2
    assert len(re.findall(r"<polyline[^>]*><title>topk</title>", found)) == n_plots
    assert len(re.findall(r"<polyline[^>]*><title>PCA</title>", found)) == n_plots
