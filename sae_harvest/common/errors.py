"""The errors that sae-harvest raises; each message is one sentence for the user.

    SaeHarvestError            every error a user can cause or meet; its message is one sentence
    ├── StoreError             problem with an activation store
    │   ├── NotAStoreError     the directory holds no store
    │   ├── PlanMismatchError  the store was made from another plan
    │   ├── UnfinishedError    the harvest has shards left to do
    │   └── DamagedError       an object is missing, truncated or altered; names the object
    ├── InputError             a model, corpus, site or option that cannot be used
    └── RunError               a training or feature run that cannot start or continue

The command line prints `Error: <message>` and exits with 1; wrong options exit with 2.
"""

from sae_harvest.common.masking import masked


class SaeHarvestError(Exception):
    """Base of every error meant for the user: says what was wrong, where, and what to do.

    >>> import sae_harvest as sh
    >>> try:
    ...     sh.open_store("nothing-here")
    ... except sh.SaeHarvestError as error:
    ...     print(type(error).__name__)
    NotAStoreError

    Passwords in addresses are masked when the error is converted to text.
    """

    def __str__(self) -> str:
        return masked(super().__str__())


class StoreError(SaeHarvestError):
    """An activation store cannot be used as asked."""


class NotAStoreError(StoreError):
    """The path holds no activation store."""


class PlanMismatchError(StoreError):
    """The store at this path was made from another plan."""


class UnfinishedError(StoreError):
    """Not every shard of the store has been committed."""


class DamagedError(StoreError):
    """An object of the store is missing, truncated or altered."""


class InputError(SaeHarvestError):
    """A model, corpus, site or option cannot be used."""


class RunError(SaeHarvestError):
    """A training or feature run cannot start or continue."""
