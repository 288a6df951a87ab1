"""SAEs to and from EleutherAI's sparsify."""

from __future__ import annotations

import pytest

from sae_harvest.train.sae.formats.reading import Origin
from tests.interop.exchange import D, check_ours, check_theirs, exchange, random_sae

pytestmark = pytest.mark.slow  # imports that package

OURS = {
    "topk": random_sae("topk"),
    "scale": random_sae("topk", "scale"),
    "transcoder": random_sae("topk", d_out=D),
    "transcoder-scale": random_sae("topk", "scale", d_out=D),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return exchange("sparsify", OURS, tmp_path_factory.mktemp("sparsify"))


@pytest.mark.parametrize("case", OURS)
def test_it_computes_with_our_folder_what_we_compute(work, case):
    check_ours(work, case, OURS[case])


@pytest.mark.parametrize("case", ["topk", "expansion"])
def test_we_compute_with_its_folder_what_it_computes(work, case):
    assert check_theirs("sparsify", work, case).config.k == 8


def test_we_compute_with_its_transcoder_what_it_computes(work):
    origin = Origin("resid_mid.3", "mlp_out.3", "gpt2")
    assert check_theirs("sparsify", work, "transcoder", origin).config.d_out == D
