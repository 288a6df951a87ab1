"""Features for circuit-tracer's frontend: a file per layer, read by byte ranges.

OUT/layer_12.bin      for each latent: length (uint32, little-endian), gzipped JSON
OUT/index.json.gz     {"12": {"filename": "layer_12.bin", "offsets": [...]}}, n_latents + 1
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.exports.files import gzipped, json_bytes
from sae_harvest.pipelines.exports.tables import Context, Latent, Tables, fiftieths, heights
from sae_harvest.pipelines.features.tables.folder import DECILES

INDEX = "index.json.gz"


def write(
    all_tables: Sequence[Tables],
    latents: Sequence[Sequence[range]],
    out: Path,
    name: str | None,
    on_latent: Callable[[], None],
) -> None:
    """Write a layer for each of the tables, and the index."""
    index: dict[str, Any] = {}
    for tables, some in zip(all_tables, latents, strict=True):
        layer = tables.site.layer
        if str(layer) in index:
            raise InputError(
                f"Two of the tables are for layer {layer}, but circuit-tracer has one per layer; "
                "export one of them."
            )
        file_name = f"layer_{layer}.bin"
        sizes = np.zeros(tables.n_latents, np.int64)
        with (out / file_name).open("wb") as file:
            for latent in tables.described(some, fiftieths):
                packed = gzipped(json_bytes(feature(latent, name or str(tables.site))))
                sizes[latent.number] = file.write(struct.pack("<I", len(packed)) + packed)
                on_latent()
        offsets = [0, *np.cumsum(sizes).tolist()]
        index[str(layer)] = {"filename": file_name, "offsets": offsets}
    (out / INDEX).write_bytes(gzipped(json_bytes(index)))


def feature(latent: Latent, transcoder: str) -> dict[str, Any]:
    """Make the record of a feature: circuit-tracer's `frontend.feature_models.Model`."""
    facts = latent.facts
    return {
        "transcoder_id": transcoder,
        "index": latent.number,
        "examples_quantiles": _examples(latent),
        "top_logits": facts["top_logit_tokens"] or [],
        "bottom_logits": facts["bottom_logit_tokens"] or [],
        "act_min": 0.0,
        "act_max": latent.highest,
        "quantile_values": [] if facts["dead"] else latent.percentiles,
        "histogram": heights(latent),
        "activation_frequency": facts["density"],
    }


def _examples(latent: Latent) -> list[dict[str, Any]]:
    """Return examples by stratum, the strongest first."""
    strata = {"top": "Top"}
    strata |= {f"decile_{tenth}": f"Decile {tenth}" for tenth in range(DECILES, 0, -1)}
    strata |= {"random": "Random"}
    seen: set[int] = set()
    found = []
    for stratum, title in strata.items():
        examples = []
        for context in latent.contexts.get(stratum, []):
            examples.append(_example(context, context.row in seen))
            seen.add(context.row)
        if examples:
            found.append({"quantile_name": title, "examples": examples})
    return found


def _example(context: Context, repeated: bool) -> dict[str, Any]:
    return {
        "tokens_acts_list": context.activations,
        "train_token_ind": context.place,
        "is_repeated_datapoint": repeated,
        "tokens": context.tokens,
    }
