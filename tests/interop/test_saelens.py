"""SAEs to and from SAELens."""

from __future__ import annotations

import pytest

from sae_harvest.train.sae.formats.reading import Origin
from tests.interop.exchange import check_ours, check_theirs, exchange, random_sae

pytestmark = pytest.mark.slow  # imports that package

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gated")
NORMALIZATIONS = ("none", "scale", "layer_norm", "unit_norm")
OURS = {f"{a}-{n}": random_sae(a, n) for a in ACTIVATIONS for n in NORMALIZATIONS}
OURS |= {
    f"{a}-transcoder-{n}": random_sae(a, n, d_out=24)
    for a in ("batchtopk", "jumprelu", "relu")
    for n in ("none", "scale")
}
THEIRS = {
    "standard": "relu",
    "standard-uncentred": "relu",
    "topk": "topk",
    "topk-rescaled": "topk",
    "topk-norm": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "gated-uncentred": "gated",
    "training-topk": "topk",
    "training-topk-end": "topk",
    "training-batchtopk": "batchtopk",
    "training-batchtopk-end": "jumprelu",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return exchange("saelens", OURS, tmp_path_factory.mktemp("saelens"))


@pytest.mark.parametrize("case", OURS)
def test_it_computes_with_our_folder_what_we_compute(work, case):
    check_ours(work, case, OURS[case])


@pytest.mark.parametrize("case", THEIRS)
def test_we_compute_with_its_folder_what_it_computes(work, case):
    assert check_theirs("saelens", work, case).config.activation == THEIRS[case]


@pytest.mark.parametrize(
    ("case", "activation"), [("transcoder", "relu"), ("jumprelu-transcoder", "jumprelu")]
)
def test_we_compute_with_its_transcoders_what_they_compute(work, case, activation):
    sae = check_theirs("saelens", work, case, Origin("resid_mid.7", "mlp_out.7"))
    assert (sae.config.activation, sae.config.d_out) == (activation, 24)


def test_site_and_model_are_read_from_its_metadata(work):
    config = check_theirs("saelens", work, "jumprelu", Origin()).config
    assert (config.site, config.model) == ("mlp_out.7", "gpt2")
