"""Repeated documents, recognised by the xxh3-64 of their text and left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

if TYPE_CHECKING:
    from sae_harvest.harvest.text.documents import Cursor, Document

_MIN_RECENT = 65_536
_RECENT_SHARE = 16  # at most one of so many hashes is in the set of recent ones

Hashes = npt.NDArray[np.uint64]


class HashSet:
    """A growing set of 64-bit hashes, in about 14 bytes each.

    Most are in one sorted array, 8 bytes each. The latest, at most a sixteenth, are in a Python
    set, about 90 bytes each, until they are merged into the array. A merge needs a second copy of
    the array for a moment.
    """

    def __init__(self, hashes: Iterable[Hashes] = ()) -> None:
        self._sorted = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def add(self, value: int) -> bool:
        """Add a value; True if it is new."""
        if value in self._recent:
            return False
        key = np.uint64(value)
        at = int(np.searchsorted(self._sorted, key))
        if at < len(self._sorted) and self._sorted[at] == key:
            return False
        self._recent.add(value)
        if len(self._recent) > max(_MIN_RECENT, len(self._sorted) // _RECENT_SHARE):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._recent = set()
            recent.sort()
            places = np.searchsorted(self._sorted, recent)
            self._sorted = np.insert(self._sorted, places, recent)
        return True


def without_duplicates(
    documents: Iterable[tuple[Document, Cursor]], seen_hashes: Iterable[Hashes] = ()
) -> Iterator[tuple[Document, Cursor]]:
    """Yield the documents with new texts, each with the cursor after it.

    Args:
        seen_hashes: xxh3-64 of the UTF-8 texts of all documents before the first one here.
    """
    texts = HashSet(seen_hashes)
    for document, after in documents:
        if texts.add(xxhash.xxh3_64_intdigest(document.text.encode())):
            yield document, after
