"""Measure every budget, print the table, write bench/results/local.json."""

from __future__ import annotations

import json
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import feature_pass, harvesting, loading, sae_step, storing
from bench.measurement import Measurement

RESULTS = Path(__file__).parent / "results" / "local.json"


def main() -> None:
    measured: list[Measurement] = []
    console = Console(width=100)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as name:
        for module in (harvesting, storing, loading, sae_step, feature_pass):
            console.print(f"measuring: {(module.__doc__ or '').splitlines()[0]}", style="dim")
            measured += module.measure(Path(name))
    table = Table(box=None)
    for column in ("budget", "ours", "limit", "unit", "ratio", "goal", "floor", ""):
        table.add_column(column, no_wrap=True)
    for m in measured:
        table.add_row(
            m.name,
            f"{m.value:,.4g}" if m.value < 100 else f"{m.value:,.0f}",
            f"{m.limit:,.4g}" if m.limit < 100 else f"{m.limit:,.0f}",
            m.unit,
            f"{m.ratio:.3f}",
            f"{'≥' if m.higher_is_better else '≤'} {m.goal:.4g}",
            f"{'≥' if m.higher_is_better else '≤'} {m.floor:.4g}",
            "ok" if m.meets_floor else "below",
        )
    console.print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    content = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} cores",
        "torch": torch.__version__,
        "budgets": {m.name: m.to_json() for m in measured},
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
