"""Measure every budget, print the table, write bench/results/local.json.

python -m bench                      everything
python -m bench harvesting storing   some of it; the other figures stay as they were
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import (
    feature_pass,
    harvesting,
    loading,
    memory,
    neurons,
    plan,
    probing,
    programs,
    quantizing,
    sae_step,
    storing,
    verifying,
)
from bench.measurement import Measurement

RESULTS = Path(__file__).parent / "results" / "local.json"
# The first leaves the store that some of the others read.
MODULES = (
    harvesting,
    storing,
    loading,
    verifying,
    feature_pass,
    programs,
    probing,
    neurons,
    quantizing,
    memory,
    plan,
    sae_step,
)
NEED_STORE = (storing, verifying, quantizing)


def main(names: list[str]) -> None:
    known = {_name(module) for module in MODULES}
    if unknown := set(names) - known:
        sys.exit(f"Error: no bench {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    chosen = [module for module in MODULES if not names or _name(module) in names]
    measured: list[Measurement] = []
    console = Console(width=100)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as name:
        if harvesting not in chosen and any(module in NEED_STORE for module in chosen):
            harvesting.make_store(Path(name))
        for module in chosen:
            console.print(f"measuring: {(module.__doc__ or '').splitlines()[0]}", style="dim")
            found = module.measure(Path(name))
            _keep(found)
            measured += found
    console.print(_table(measured))


def _keep(measured: list[Measurement]) -> None:
    """Write what was measured into the results at once; the others stay."""
    now = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} cores",
        "torch": torch.__version__,
    }
    content: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content |= {m.name: now | m.to_json() for m in measured}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _table(measured: list[Measurement]) -> Table:
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
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
