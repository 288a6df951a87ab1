"""A store's rows as a PyTorch dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import IterableDataset, get_worker_info

from sae_harvest.common.errors import InputError
from sae_harvest.store.loading.loader import ShuffledLoader
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule

__all__ = ["ActivationDataset"]


class ActivationDataset(IterableDataset[torch.Tensor]):
    """Shuffled batches of a store's rows, each row at most once an epoch.

    Every item is a whole batch, float32 [batch_rows, width]. Give the dataset to a `DataLoader`
    with `batch_size=None` and `num_workers=0`, or iterate over it directly. It reads ahead in its
    own four threads. The next epoch has another order; the last rows of an epoch, fewer than a
    batch, are dropped.

    >>> dataset = ActivationDataset("runs/demo/store", batch_rows=256, seed=1)
    >>> batch = next(iter(dataset))
    >>> batch.dtype, batch.shape[0]
    (torch.float32, 256)

    Args:
        store: an open store, or the path or `s3://bucket/prefix` of one.
        site: site to read, such as "resid_post.12"; None for the store's only site.
        batch_rows: rows per batch.
        seed: seed of the order.
        rule: the rule that selects rows; None for the default of training: 95 % of the documents,
            without outlier rows.
        epochs: number of passes over the rows; None for endless batches.
        device: device of the batches, "cpu" or "cuda".

    Raises:
        InputError: there is no such site, or there are fewer rows than one batch.
        StoreError: the store cannot be opened.
        DamagedError: a row differs from what was stored.
    """

    def __init__(
        self,
        store: ActivationStore | str | Path,
        site: str | None = None,
        *,
        batch_rows: int = 4096,
        seed: int = 0,
        rule: RowRule | None = None,
        epochs: int | None = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        if not isinstance(store, ActivationStore):
            store = ActivationStore.open(store)
        if epochs is not None and epochs < 1:
            raise InputError(f"The dataset has {epochs} epochs; ask for 1 or more, or None.")
        self.store = store
        self.site = store.site(site)
        self.epochs = epochs
        self._loader = ShuffledLoader(store, self.site, batch_rows, seed, rule, device=device)

    def __len__(self) -> int:
        """Return the number of batches in all epochs.

        Raises:
            TypeError: the dataset has no end.
        """
        if self.epochs is None:
            raise TypeError("The dataset has no end; it has no length.")
        return self.epochs * self._loader.batches_per_epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the batches, beginning with the first epoch."""
        if get_worker_info() is not None:
            raise InputError(
                "An ActivationDataset reads ahead in threads of its own; give the DataLoader "
                "num_workers=0."
            )
        loader = self._loader
        loader.load_state(loader.state() | {"epoch": 0, "step": 0})
        try:
            left = None if self.epochs is None else len(self)
            while left is None or left > 0:
                yield loader.next_batch().x
                left = None if left is None else left - 1
        finally:
            loader.close()
