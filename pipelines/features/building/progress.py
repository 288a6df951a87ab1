"""A feature build with its progress shown in the terminal or the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_harvest.common.console import SAME_COMMAND, Progress, when_interrupted
from sae_harvest.common.memory import keep_memory
from sae_harvest.pipelines.features.building.build import Built, build
from sae_harvest.pipelines.features.building.config import FeatureConfig


def build_with_progress(
    store: str | Path, sae: Path | str, out: Path, config: FeatureConfig, **execution: Any
) -> Built:
    """Call `build`; the process keeps freed memory for reuse."""
    keep_memory()
    with when_interrupted(SAME_COMMAND), Progress() as progress:

        def show(what: str, done: int, total: int) -> None:
            progress(f"{what} {'blocks' if what == 'encoding' else 'latents'}", done, total)

        return build(store, sae, out, config, on_progress=show, **execution)
