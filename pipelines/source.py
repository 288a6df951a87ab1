"""The model, store and SAE that tables were made from, searched for at their present places.

Tables name the places of their store and SAE twice: as originally given, and relative to the
tables' own folder. Either may have moved; a digest decides whether the right store or SAE is found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_harvest.common.errors import InputError, NotAStoreError, RunError, UnfinishedError
from sae_harvest.harvest.model.models import ResolvedModel, model_fingerprint, resolve_model
from sae_harvest.pipelines.features.tables.folder import WITHOUT_SAE
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE


@dataclass(frozen=True)
class Locations:
    """New places of SAEs, stores and models that have moved; one for each folder of tables."""

    saes: Sequence[Path] = ()
    """Folders of SAEs."""

    stores: Sequence[str] = ()
    """Folders or bucket addresses of stores."""

    models: Sequence[str] = ()
    """Folders or Hub names of models."""


NOTHING_MOVED = Locations()


def model_of(store: ActivationStore, given: Sequence[str] = ()) -> ResolvedModel:
    """Find the model that a store was harvested from.

    Args:
        given: places to search instead of the name in the store's plan.

    Raises:
        InputError: the model is missing, or its weights differ from the harvested ones.
    """
    planned = store.plan["model"]
    found = {}
    for name in given or [planned["name"]]:
        model = resolve_model(name, None if given else planned.get("revision"))
        weights = model_fingerprint(model)["weights"]
        if weights == planned["weights"]:
            return model
        found[name] = weights
    name, weights = next(iter(found.items()))
    raise InputError(
        f"The model {name} has other weights ({weights}) than the weights that "
        f"{store.place} was harvested from ({planned['weights']}); put the old ones back."
    )


def sae_of(
    features: Path, run: dict[str, Any], given: Sequence[Path] = (), device: str = "cpu"
) -> SAE:
    """Load the SAE that tables were made with.

    Args:
        run: content of the tables' run.json.
        given: places to search instead of those in `run`.

    Raises:
        InputError: the tables were made without an SAE.
        RunError: no place holds the SAE.
    """
    if what := WITHOUT_SAE.get(run["sae"]):
        raise InputError(
            f"{features} holds tables of {what}; live text, steering and comparison need tables "
            "of an SAE."
        )
    refusal = None
    for place in map(Path, given or _places(features, run, "sae")):
        try:
            sae = SAE.load(place, device)
        except InputError:
            refusal = refusal or RunError(
                f"The SAE that {features} was made with is not in {place} any more; put it back, "
                "say where it is with --sae, or build the tables again."
            )
            continue
        if sae.digest == run["sae_digest"]:
            return sae
        refusal = RunError(
            f"{place} holds another SAE than the one that {features} was made with; put the right "
            "SAE back, say where it is with --sae, or build the tables again."
        )
    assert refusal is not None  # there is a place
    raise refusal


def store_of(features: Path, run: dict[str, Any], given: Sequence[str] = ()) -> ActivationStore:
    """Open the store that tables were made from, at the seal that they were made from.

    Args:
        run: content of the tables' run.json.
        given: places to search instead of those in `run`.

    Raises:
        RunError: no place holds the store.
    """
    refusal = None
    for place in given or _places(features, run, "store"):
        try:
            return ActivationStore.open(place, run["store_digest"])
        except (NotAStoreError, UnfinishedError) as error:
            refusal = RunError(
                f"The store that {features} was made from is not in {place} any more "
                f"({str(error).rstrip('.')}); put it back, say where it is with --store, or build "
                "the tables again."
            )
    assert refusal is not None  # there is a place
    raise refusal


def relative_places(features: Path, store: str, sae: str) -> dict[str, str]:
    """Return the paths of store and SAE relative to the tables' folder; buckets are left out."""
    found = {"store": store, "sae": sae}
    return {
        name: os.path.relpath(Path(place).resolve(), features.resolve())
        for name, place in found.items()
        if "://" not in place and place not in WITHOUT_SAE
    }


def _places(features: Path, run: dict[str, Any], name: str) -> list[str]:
    """Return the places to search for a store or SAE: relative to the tables, then the original."""
    relative = run["relative"].get(name)
    near = [] if relative is None else [os.path.normpath(features.resolve() / relative)]
    return list(dict.fromkeys([*near, run[name]]))
