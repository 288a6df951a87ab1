"""The folder of a feature build: its tables by name, and run.json, which says what they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from store.errors import RunError

FORMAT = "1"
TABLES = ("latents", "contexts", "histograms", "neighbours", "tokens", "documents")
RUN_FILE = "run.json"


def read_run(features: Path) -> dict[str, Any] | None:
    """run.json of finished tables, None if there are none; `RunError` if it is damaged.

    Trained SAEs have a run.json too, which says nothing about tables.
    """
    path = features / RUN_FILE
    try:
        run = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged ({error}); build the tables again into another folder."
        ) from None
    return run if isinstance(run, dict) and "tables" in run else None


def check_tables(features: Path) -> None:
    """Raise `RunError`, naming it, if a table is missing."""
    for name in TABLES:
        path = features / f"{name}.parquet"
        if not path.is_file():
            raise RunError(f"{path} is missing; remove {features} and build the tables again.")
