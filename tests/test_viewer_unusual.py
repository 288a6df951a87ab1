"""How unusual an activation is, against counting firings."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.live import LiveText
from sae_harvest.pipelines.viewer.models import Models
from sae_harvest.pipelines.viewer.tables import Tables
from sae_harvest.pipelines.viewer.unusual import Unusual
from tests.made_tables import write_tables

N = 48


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return Tables(write_tables(tmp_path_factory.mktemp("unusual") / "features", N))


def statistics(tables, latent):
    return tables.ask("SELECT * FROM latents WHERE latent = ?", latent)[0]


def test_it_is_how_rarely_a_row_has_such_an_activation_times_the_number_of_latents(tables):
    unusual = Unusual(tables, list(range(N)))
    for latent in (0, 7, 46):
        row = statistics(tables, latent)
        for at, share in ((row["q50"], 0.5), (row["q90"], 0.1), (row["q99"], 0.01)):
            rows_of_one = 1 / (row["density"] * share * (N - 1))
            wanted = math.log10(rows_of_one)
            assert unusual(latent, at) == pytest.approx(wanted, abs=1e-3)
        most = -math.log10(row["density"] * (N - 1) / row["n_fire"])
        assert unusual(latent, row["max"]) == pytest.approx(most, abs=1e-3)
        assert unusual(latent, row["max"] * 9) == unusual(latent, row["max"])  # more is not known


def test_stronger_is_never_more_usual(tables):
    unusual = Unusual(tables, [3])
    values = np.linspace(0, statistics(tables, 3)["max"] * 1.2, 200)
    assert np.all(np.diff([unusual(3, v) for v in values]) >= 0)


def test_a_latent_that_never_fired_is_as_unusual_as_the_rows_read_can_tell(tables):
    unusual = Unusual(tables, [N - 1])
    assert tables.n_rows == 200_000
    assert unusual(N - 1, 0.1) == pytest.approx(math.log10(200_000 / (N - 1)))


def test_statistics_that_cannot_be_are_said(tmp_path):
    features = write_tables(tmp_path / "features", 8)
    path = features / "latents.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("q90")
    pq.write_table(table.set_column(at, "q90", table["q25"]), path)
    with pytest.raises(RunError, match=r"latents\.parquet is damaged \(latent 3 has an impossible"):
        Unusual(Tables(features), [3])


def test_about_one_row_in_ten_is_so_unusual_that_one_in_ten_is(tables):
    """Rows drawn from the latents' own statistics: the claim that colours a text."""
    rng, latents = np.random.default_rng(0), range(N - 1)
    unusual = Unusual(tables, list(latents))
    curves = {latent: unusual._curves[latent] for latent in latents}
    most = []
    for _ in range(4000):
        here = [0.0]
        for latent in latents:
            density, strengths, shares = curves[latent]
            if rng.random() < density:
                drawn = np.interp(-math.log10(rng.random()), -np.array(shares), strengths)
                here.append(unusual(latent, float(drawn)))
        most.append(max(here))
    for level in (0.7, 1.0, 1.5):
        assert (np.array(most) > level).mean() == pytest.approx(10**-level, rel=0.35)


def test_a_text_is_told_with_its_most_unusual_latents_first(tables):
    indices = np.array([[0, 1, 2, N - 1]], np.int32)
    rare = min(range(3), key=lambda n: statistics(tables, n)["density"])
    values = np.array([[statistics(tables, n)["q50"] for n in range(3)] + [0.0]], np.float32)

    class Live:
        def activations(self, text):
            return LiveText([1], [text], indices, values)

    told = Models(tables, Live).activations("word")
    ((text, latents),) = [(t["text"], t["latents"]) for t in told["tokens"]]
    assert text == "word"
    assert {n for n, _, _ in latents} == {0, 1, 2}
    assert latents == sorted(latents, key=lambda f: (-f[2], -f[1], f[0]))
    assert latents[0][0] == rare
    assert set(told["labels"]) == {"0", "1", "2"}
