"""The model that a store was harvested from, found again."""

from __future__ import annotations

from harvest.models import ResolvedModel, model_fingerprint, resolve_model
from store.errors import InputError
from store.reader import ActivationStore


def model_of(store: ActivationStore) -> ResolvedModel:
    """The store's model.

    Raises:
        InputError: it is not where it was, or its weights are not the ones that were harvested.
    """
    planned = store.plan["model"]
    model = resolve_model(planned["name"], planned["revision"])
    found = model_fingerprint(model)["weights"]
    if found != planned["weights"]:
        raise InputError(
            f"The model {planned['name']} has other weights ({found}) than those that "
            f"{store.place} was harvested from ({planned['weights']}); put the old ones back."
        )
    return model
