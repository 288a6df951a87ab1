"""SAEs go to another package and come back: the same rows, the same latents, the same sums.

A script of `scripts/` runs in that package's own environment, in one process for all cases:

    WORK/rows.safetensors       x, the rows
    WORK/ours/CASE/sae          what we exported; the script adds out.safetensors
    WORK/theirs/CASE/sae        what the script saved by the package's own means, with its
                                out.safetensors: dense latents and the reconstruction
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_harvest.train.config import SAEConfig
from sae_harvest.train.sae.formats import format_named
from sae_harvest.train.sae.formats.reading import Origin
from sae_harvest.train.sae.sae import SAE

PEERS = Path(__file__).parents[2] / ".venv-peers"
SCRIPTS = Path(__file__).with_name("scripts")
D, N, K = 16, 64, 8
ORIGIN = Origin("resid_post.3", None, "small")
TOLERANCE = 1e-5  # of the largest number of the row


def python_of(peer: str) -> Path:
    """The interpreter that has the package; the test is left out if there is none."""
    if peer == "openai":  # one file that needs torch only
        model = PEERS / "openai" / "sparse_autoencoder" / "model.py"
        if not model.is_file():
            pytest.skip(f"no {model}: clone https://github.com/openai/sparse_autoencoder there")
        return Path(sys.executable)
    python = PEERS / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}: run `make peers`")
    return python


def rows() -> Tensor:
    """[200, D], of lengths from 0.1 to 100 and with a mean."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, D, generator=generator) + torch.linspace(-1, 1, D)
    return x * torch.logspace(-1.5, 1.5, len(x))[:, None]


def random_sae(activation: str, normalization: str = "none", d_out: int | None = None) -> SAE:
    """An SAE with every tensor random and decoder rows of norm 1."""
    generator = torch.Generator().manual_seed(len(activation) + 10 * len(normalization))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scaled = normalization == "scale"
    config = SAEConfig.model_validate(
        {
            "d_in": D,
            "d_out": d_out,
            "n_latents": N,
            "k": K if activation in ("topk", "batchtopk") else None,
            "activation": activation,
            "site": ORIGIN.site,
            "target_site": None if d_out is None else "mlp_out.3",
            "normalization": normalization,
            "input_scale": 3.7 if scaled else 1.0,
            "output_scale": 0.6 if scaled and d_out is not None else 1.0,
            "model": ORIGIN.model,
        }
    )
    fixed = {"threshold": random(N).abs()}
    if activation == "batchtopk":
        fixed["threshold"] = torch.full((N,), 0.7)
    tensors = {
        name: fixed[name] if name in fixed else 0.5 * random(*shape)
        for name, shape in SAE.shapes(config).items()
    }
    tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"])
    return SAE(config, **tensors)


def written(peer: str, folder: Path) -> Path:
    """A topk SAE in the package's format."""
    path = folder / "sae"
    format_named(peer).write(random_sae("topk", "layer_norm" if peer == "openai" else "none"), path)
    return path


def run(sae: SAE, x: Tensor) -> dict[str, Tensor]:
    """Dense latents [batch, N] and the reconstruction [batch, d_out]."""
    indices, values = sae.encode(x)
    latents = torch.zeros(len(x), sae.config.n_latents).scatter_add(1, indices.long(), values)
    return {"latents": latents, "reconstruction": sae.decode(indices, values, x)}


def assert_equal_outputs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Both latents and reconstructions, to 1e-5 of each row's largest number."""
    for name in ("latents", "reconstruction"):
        assert found[name].shape == expected[name].shape
        scale = expected[name].abs().amax(1, keepdim=True).clamp(min=1e-3)
        difference = ((found[name] - expected[name]).abs() / scale).max()
        assert difference < TOLERANCE, (name, float(difference))
    assert (expected["latents"] > 0).any()


def exchange(peer: str, ours: dict[str, SAE], work: Path) -> Path:
    """Exports our SAEs, has the package read them and save some of its own."""
    python = python_of(peer)
    save_file({"x": rows()}, work / "rows.safetensors")
    for case, sae in ours.items():
        (work / "ours" / case).mkdir(parents=True)
        format_named(peer).write(sae, work / "ours" / case / "sae")
    script = SCRIPTS / f"run_{peer}.py"
    command = [str(python), str(script), str(work), str(PEERS / peer)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return work


def check_ours(work: Path, case: str, sae: SAE) -> None:
    """What the package computes with our file is what we compute."""
    found = load_file(work / "ours" / case / "out.safetensors")
    assert_equal_outputs(found, run(sae, rows()))


def check_theirs(peer: str, work: Path, case: str, origin: Origin = ORIGIN) -> SAE:
    """What we compute with the package's file is what it computed; the SAE that we read."""
    folder = work / "theirs" / case
    sae = format_named(peer).read(folder / "sae", origin)
    assert_equal_outputs(run(sae, rows()), load_file(folder / "out.safetensors"))
    return sae
