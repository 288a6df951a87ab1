"""The model, store and SAE behind tables, found again where they are now.

Tables name the places of their store and SAE twice: as they were, and from the tables' own folder.
Either may have moved; a digest decides whether what is found is what the tables were made of.
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
    """Places that were given for what is not where the tables say; several for several tables."""

    saes: Sequence[Path] = ()
    stores: Sequence[str] = ()
    models: Sequence[str] = ()


NOTHING_MOVED = Locations()


def model_of(store: ActivationStore, given: Sequence[str] = ()) -> ResolvedModel:
    """The store's model.

    Args:
        given: where it may be instead of where it was.

    Raises:
        InputError: it is not there, or its weights are not the ones that were harvested.
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
        f"The model {name} has other weights ({weights}) than those that "
        f"{store.place} was harvested from ({planned['weights']}); put the old ones back."
    )


def sae_of(
    features: Path, run: dict[str, Any], given: Sequence[Path] = (), device: str = "cpu"
) -> SAE:
    """The SAE that tables were made with.

    Args:
        run: run.json of the tables. given: where it may be instead of where it was.

    Raises:
        InputError: the tables are of no SAE. RunError: none of the places holds it.
    """
    if what := WITHOUT_SAE.get(run["sae"]):
        raise InputError(
            f"{features} holds tables of {what}; live text and steering are for an SAE's latents, "
            "and only SAEs are compared."
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
            f"{place} holds another SAE than the one that {features} was made with; put that one "
            "back, say where it is with --sae, or build the tables again."
        )
    assert refusal is not None  # there is a place
    raise refusal


def store_of(features: Path, run: dict[str, Any], given: Sequence[str] = ()) -> ActivationStore:
    """The store that tables were made from, as it was then if it has grown since.

    Args:
        run: run.json of the tables. given: where it may be instead of where it was.

    Raises:
        RunError: none of the places holds it.
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
    """Paths of a store and an SAE from the folder of the tables; of buckets there is none."""
    found = {"store": store, "sae": sae}
    return {
        name: os.path.relpath(Path(place).resolve(), features.resolve())
        for name, place in found.items()
        if "://" not in place and place not in WITHOUT_SAE
    }


def _places(features: Path, run: dict[str, Any], name: str) -> list[str]:
    """Possible places of a part: relative to the tables, then its original place."""
    relative = run["relative"].get(name)
    near = [] if relative is None else [os.path.normpath(features.resolve() / relative)]
    return list(dict.fromkeys([*near, run[name]]))
