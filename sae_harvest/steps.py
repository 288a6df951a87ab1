"""The steps from a text to tables as functions: the commands, called from Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sae_harvest.common.errors import InputError
from sae_harvest.store.reader import ActivationStore

if TYPE_CHECKING:
    from sae_harvest.features import Features
    from sae_harvest.train.sae.sae import SAE

__all__ = ["build_features", "harvest_activations", "open_store", "train_sae"]

Place = str | Path


def open_store(place: Place, digest: str | None = None) -> ActivationStore:
    """Open a sealed store.

    >>> store = open_store("runs/demo/store")
    >>> store.read(store.sites[0], 0, 4).shape[0]
    4

    Args:
        place: a folder, or `s3://bucket/prefix`.
        digest: digest of an earlier state of a store that has grown; None opens all of it.

    Raises:
        NotAStoreError: there is no store.
        UnfinishedError: nothing is sealed, or nothing with that digest.
        DamagedError: the plan or the seal is damaged.
    """
    return ActivationStore.open(place, digest)


def harvest_activations(
    out: Place,
    *,
    model: str,
    corpus: str = "news",
    layer: int | None = None,
    sites: tuple[str, ...] | list[str] = (),
    workers: int = 0,
    device: str = "auto",
    address: str | None = None,
    **options: Any,
) -> ActivationStore:
    """Run a model over text and store the activations of some sites.

    The same call continues an interrupted harvest and opens a finished one. With more `tokens` than
    before, it extends the store.

    >>> store = harvest_activations(
    ...     "runs/mine/store", model="my-model", corpus="texts", layer=1, tokens=4096,
    ...     context_length=32,
    ... )
    >>> store.n_rows, store.sites
    (4096, ('resid_post.1',))

    Args:
        out: folder, or `s3://bucket/prefix`, of the store.
        model: id on the Hub, folder, `.gguf` file, or "smollm2-135m".
        corpus: dataset on the Hub, file or folder of text, or "news".
        layer: number N of the site "resid_post.N".
        sites: names of sites, in addition to `layer` or instead of it.
        workers: number of Ray workers; 0 works in this process.
        device: "auto", "cpu" or "cuda".
        address: address of a Ray cluster, HOST:PORT or "auto".
        options: fields of `HarvestConfig` (tokens, context_length, dtype, ...) and of `CorpusSpec`
            (split, revision, text_column, ...).

    Returns:
        The sealed store.

    Raises:
        InputError: a model, text or option cannot be used.
        PlanMismatchError: `out` holds a store of another plan.
        SaeHarvestError: the store cannot be written.
    """
    from sae_harvest.harvest.run.config import HarvestConfig
    from sae_harvest.harvest.run.driver import Execution, run
    from sae_harvest.harvest.text.corpus import CorpusSpec

    named = [] if layer is None else [f"resid_post.{layer}"]
    of_corpus = {name: options.pop(name) for name in [*options] if name in CorpusSpec.model_fields}
    request = _checked(
        HarvestConfig,
        model=model,
        corpus=_checked(CorpusSpec, name=str(corpus), **of_corpus),
        sites=(*named, *sites),
        **options,
    )
    run(request, out, Execution(workers, device, address))
    return ActivationStore.open(out)


def train_sae(
    store: ActivationStore | Place,
    out: Place,
    *,
    site: str | None = None,
    device: str = "auto",
    **options: Any,
) -> SAE:
    """Train a sparse autoencoder, or a transcoder, on the rows of a store.

    The same call continues an interrupted run and loads a finished one. `out` then holds the SAE,
    its metrics and its evaluation on held-out rows (`evaluation.json`).

    >>> sae = train_sae("runs/demo/store", "runs/mine/sae", n_latents=64, k=4, tokens=4096,
    ...                 batch_rows=256)
    >>> sae.config.n_latents
    64

    Args:
        store: an open store, or the path or `s3://bucket/prefix` of one.
        out: folder of the run.
        site: which activations; None for the store's only site.
        device: "auto", "cpu" or "cuda".
        options: fields of `TrainConfig`: n_latents, k, tokens (rows to train on), activation, ...

    Returns:
        The trained SAE, on the CPU.

    Raises:
        InputError: a site or an option cannot be used.
        RunError: the folder holds another run, or training diverged.
        KeyboardInterrupt: a signal stopped the run; the same call continues it.
    """
    from sae_harvest.train.config import TrainConfig
    from sae_harvest.train.run.trainer import train
    from sae_harvest.train.sae.sae import SAE

    place = store.place if isinstance(store, ActivationStore) else store
    result = train(_checked(TrainConfig, **options), place, out, site, device)
    if not result.finished:
        raise KeyboardInterrupt(f"Stopped after step {result.steps}; the same call continues.")
    return SAE.load(out)


def build_features(
    store: ActivationStore | Place,
    sae: Place,
    out: Place,
    *,
    site: str | None = None,
    workers: int = 0,
    device: str = "auto",
    address: str | None = None,
    **options: Any,
) -> Features:
    """Encode a store with an SAE and write the tables of every latent.

    The same call continues an interrupted build and opens a finished one.

    >>> features = build_features("runs/demo/store", "runs/demo/sae", "runs/mine/features", n_top=5)
    >>> len(features) > 0
    True

    Args:
        store: an open store, or the path or `s3://bucket/prefix` of one.
        sae: folder of the SAE, or "identity" for the neurons of a site.
        out: folder of the tables.
        site: site of the neurons, if the store has several; an SAE knows its own.
        workers: number of Ray workers; 0 works in this process.
        device: "auto", "cpu" or "cuda".
        address: address of a Ray cluster, HOST:PORT or "auto".
        options: fields of `FeatureConfig`: n_top, n_random, window_tokens, seed, ...

    Raises:
        RunError: the SAE does not fit the store, or `out` holds other tables.
        SaeHarvestError: the store or the SAE cannot be read, or the tables cannot be written.
    """
    from sae_harvest.features import Features
    from sae_harvest.pipelines.features.building.build import build
    from sae_harvest.pipelines.features.building.config import FeatureConfig

    place = store.place if isinstance(store, ActivationStore) else store
    build(
        place,
        sae,
        Path(out),
        _checked(FeatureConfig, **options),
        site=site,
        workers=workers,
        device=device,
        address=address,
    )
    return Features(out)


def _checked(kind: Any, **fields: Any) -> Any:
    """Return a configuration. Raise `InputError`, naming the field, for a bad value."""
    try:
        return kind(**fields)
    except ValidationError as error:
        problem = max(error.errors(), key=lambda one: one["type"] == "extra_forbidden")
        name = ".".join(map(str, problem["loc"])) or kind.__name__
        if problem["type"] == "extra_forbidden":
            raise InputError(
                f"There is no option {name}; {kind.__name__} has {', '.join(kind.model_fields)}."
            ) from None
        raise InputError(f"{name}: {problem['msg']}.") from None
