"""SAEs to and from OpenAI's sparse_autoencoder."""

from __future__ import annotations

import pytest

from tests.interop.exchange import check_ours, check_theirs, exchange, random_sae

pytestmark = pytest.mark.slow  # imports that package

OURS = {
    "topk": random_sae("topk", "layer_norm"),
    "relu": random_sae("relu"),
    "relu-scale": random_sae("relu", "scale"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return exchange("openai", OURS, tmp_path_factory.mktemp("openai"))


@pytest.mark.parametrize("case", OURS)
def test_it_computes_with_our_file_what_we_compute(work, case):
    check_ours(work, case, OURS[case])


@pytest.mark.parametrize("case", ["topk", "relu"])
def test_we_compute_with_its_file_what_it_computes(work, case):
    assert check_theirs("openai", work, case).config.activation == case
