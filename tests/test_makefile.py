"""The Makefile, run by make."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

MAKEFILE = Path(__file__).parent.parent / "Makefile"


def test_clean_removes_environments_and_caches_and_nothing_of_the_users(tmp_path: Path) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    made = [
        *(".venv/bin/python", ".venv-peers/delphi/.installed", "sae_harvest.egg-info/PKG-INFO"),
        *(".mypy_cache/3.11/store.json", ".ruff_cache/x", ".pytest_cache/x", ".hypothesis/x"),
    ]
    own = [
        *("runs/mine/store/zarr.json", "runs/demo/sae/sae.safetensors", "runs/demo/sweep/x"),
        *("runs/demo/features/notes.sqlite", "build/figure.png", "other.egg-info/PKG-INFO"),
        *("README.md", "harvest/run.py", "texts/a.txt"),
    ]
    for name in made + own:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("something")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"Makefile", *own}
