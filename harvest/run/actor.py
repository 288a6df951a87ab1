"""The Ray actor that does shards. Importing this module imports nothing else of ours.

A node with other versions of our libraries can so say which, before anything of them is used.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_harvest.harvest.run.worker import Done
    from sae_harvest.store.layout import Plan
    from sae_harvest.store.objects import Objects
    from sae_harvest.store.writer import Shard


class ShardActor:
    """A `ShardWorker` as a Ray actor, once it is known that it has the same software.

    It imports our modules only in `start`, after it has compared versions.
    """

    @staticmethod
    def versions(libraries: list[str]) -> dict[str, str | None]:
        """Versions of libraries on this machine, None if absent; without names of builds."""
        installed: dict[str, str | None] = {}
        for name in libraries:
            try:
                installed[name] = version(name).partition("+")[0]
            except PackageNotFoundError:
                installed[name] = None
        return installed

    def start(self, expected: dict[str, str | None], worker: dict[str, Any]) -> dict[str, Any]:
        """Host, process id and versions; makes the worker if the versions are the expected ones."""
        installed = self.versions(list(expected))
        if installed == expected:
            from sae_harvest.harvest.model.models import ResolvedModel
            from sae_harvest.harvest.run.worker import ShardWorker

            model = ResolvedModel(**worker["model"])
            self._worker = ShardWorker(**(worker | {"model": model}))
        return {"host": platform.node(), "pid": os.getpid(), "versions": installed}

    def widths(self) -> dict[str, int]:
        return self._worker.widths()

    def harvest(self, objects: Objects, plan: Plan, shard: Shard) -> Done:
        return self._worker.harvest(objects, plan, shard)

    def rows_done(self) -> int:
        return self._worker.rows_done()

    def stop(self) -> None:
        self._worker.stop()
