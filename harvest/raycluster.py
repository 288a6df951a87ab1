"""What `harvest.raypool` asks of Ray beside `store.cluster`: the actors' class, and who is fit."""

from __future__ import annotations

from typing import Any

from harvest.prepare import LIBRARIES


def actor_class() -> type:
    """The class of the actors.

    Made in a function and standing on nothing of ours, it travels by value: a machine without
    our packages, or with other versions, can say so.
    """

    class ShardWorker:
        """`harvest.worker.ShardWorker`, once it is known that it is the driver's."""

        @staticmethod
        def versions(libraries: list[str]) -> dict[str, str | None]:
            """Of the libraries on this machine; builds for other devices are no other version."""
            from importlib.metadata import PackageNotFoundError, version

            found: dict[str, str | None] = {}
            for name in libraries:
                try:
                    found[name] = version(name).partition("+")[0]
                except PackageNotFoundError:
                    found[name] = None
            return found

        def start(self, expected: dict[str, str], worker: dict[str, Any]) -> dict[str, Any]:
            import os
            import platform

            found = self.versions(list(expected))
            if found == expected:
                from harvest.models import ResolvedModel
                from harvest.worker import ShardWorker as Worker

                model = ResolvedModel(**worker["model"])
                self._worker = Worker(**(worker | {"model": model}))
            return {"host": platform.node(), "pid": os.getpid(), "versions": found}

        def widths(self) -> Any:
            return self._worker.widths()

        def harvest(self, objects: Any, plan: Any, shard: Any) -> Any:
            return self._worker.harvest(objects, plan, shard)

        def rows_done(self) -> int:
            return self._worker.rows_done()

        def stop(self) -> None:
            self._worker.stop()

    return ShardWorker


def versions() -> dict[str, str]:
    """Of the libraries that decide the bytes, on this machine."""
    return actor_class().versions(list(LIBRARIES))  # type: ignore[attr-defined]


def mismatch(expected: dict[str, str], there: dict[str, Any]) -> str | None:
    """A sentence about what a worker's machine lacks to give the driver's bytes, or None."""
    found = there["versions"]
    if found == expected:
        return None
    host = there["host"]
    if found["sae-harvest"] is None:
        return (
            f"The Ray node {host} has no sae-harvest; install version {expected['sae-harvest']} "
            "there, in the Python that its Ray runs in."
        )
    differing = [
        f"{name} {found[name] or 'missing'} instead of {expected[name]}"
        for name in expected
        if found[name] != expected[name]
    ]
    return f"The Ray node {host} has {', '.join(differing)}; install the same on every node."
