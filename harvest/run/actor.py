"""The Ray actor that harvests shards. This module imports no other module of ours.

So a node with other versions of the libraries can report them before it uses any of them.
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
    """A `ShardWorker` as a Ray actor, after a check that its node has the same software.

    It imports our modules only in `start`, after it has compared versions.
    """

    @staticmethod
    def versions(libraries: list[str]) -> dict[str, str | None]:
        """Return versions of libraries on this machine, without build names; None if absent."""
        installed: dict[str, str | None] = {}
        for name in libraries:
            try:
                installed[name] = version(name).partition("+")[0]
            except PackageNotFoundError:
                installed[name] = None
        return installed

    def start(self, expected: dict[str, str | None], worker: dict[str, Any]) -> dict[str, Any]:
        """Return host, process id and versions; make the worker if the versions are as expected."""
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
