"""delphi's cache of latents over given activations, run by its own interpreter.

    PEER/bin/python bench/peers/delphi_cache.py ROWS.npy N_LATENTS K FOLDER

ROWS.npy holds float32 [rows, d]. The model is a table of them, so that its forward pass takes next
to nothing; the SAE is random, and encodes as delphi's own wrapper of sparsify does: to a dense
tensor [batch, context, n_latents]. Prints the tokens per second of caching and saving, settings as
by default (batches of 32 contexts of 256 tokens, 5 splits).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from delphi.config import CacheConfig
from delphi.latents.cache import LatentCache
from torch import Tensor, nn


class Table(nn.Module):
    """Token i stands for row i."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.site = nn.Embedding.from_pretrained(rows)
        self.device = torch.device("cpu")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.site(tokens)


def main(path: str, n_latents: str, k: str, folder: str) -> None:
    rows = torch.from_numpy(np.load(path))
    generator = torch.Generator().manual_seed(0)
    W = nn.functional.normalize(torch.randn(int(n_latents), rows.shape[1], generator=generator))
    mean = rows.mean(0)

    def encode(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        values, indices = nn.functional.relu((flat - mean) @ W.T).topk(int(k), sorted=False)
        dense = torch.zeros(len(flat), len(W))
        return dense.scatter_(-1, indices, values).reshape(*x.shape[:-1], -1)

    settings = CacheConfig()
    cache = LatentCache(Table(rows), {"site": encode}, settings.batch_size)
    used = len(rows) // settings.cache_ctx_len * settings.cache_ctx_len
    tokens = torch.arange(used).reshape(-1, settings.cache_ctx_len)
    start = time.perf_counter()
    cache.run(used, tokens)
    cache.save_splits(settings.n_splits, Path(folder))
    print(used / (time.perf_counter() - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
