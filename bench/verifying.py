"""`harvest verify` against reading the same files from the disk, neither of them cached."""

from __future__ import annotations

from pathlib import Path

from bench.loading import cold, read_through
from bench.measurement import Measurement, alternate, seconds
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects

REPEATS = 5


def measure(folder: Path) -> list[Measurement]:
    """verify_cold, on the store in `folder`."""
    root = folder / "store"
    files = sorted(path for path in root.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e9
    objects = LocalObjects(root)

    def ours() -> float:
        report = None

        def check() -> None:
            nonlocal report
            report = verify(objects, lambda done, total: None)

        taken = seconds(check)
        if report is None or report.damage:
            raise AssertionError("the store is damaged")
        return size / taken

    def limit() -> float:
        return size / seconds(lambda: read_through(files))

    rate, bare = alternate(cold(files, ours), cold(files, limit), REPEATS)
    return [Measurement("verify_cold", rate, bare, "GB/s", 0.9, 0.6, higher_is_better=True)]
