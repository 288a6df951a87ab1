"""SAEs to and from dictionary_learning."""

from __future__ import annotations

import pytest

from tests.interop.exchange import check_ours, check_theirs, exchange, random_sae

pytestmark = pytest.mark.slow  # imports that package

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gated")
OURS = {f"{a}-{n}": random_sae(a, n) for a in ACTIVATIONS for n in ("none", "scale")}
THEIRS = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return exchange("dictionary_learning", OURS, tmp_path_factory.mktemp("dictionary_learning"))


@pytest.mark.parametrize("case", OURS)
def test_it_computes_with_our_folder_what_we_compute(work, case):
    check_ours(work, case, OURS[case])


@pytest.mark.parametrize("case", THEIRS)
def test_we_compute_with_its_folder_what_it_computes(work, case):
    assert check_theirs("dictionary_learning", work, case).config.activation == THEIRS[case]
