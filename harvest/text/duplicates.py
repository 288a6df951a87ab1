"""Documents that came before: recognised by the xxh3-64 of their text, and left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

if TYPE_CHECKING:
    from sae_harvest.harvest.text.documents import Cursor, Document

_MIN_RECENT = 65_536
_RECENT_SHARE = 16  # one of so many hashes may be in the set of recent ones

Hashes = npt.NDArray[np.uint64]


class HashSet:
    """A growing set of 64-bit hashes, in about 14 bytes each.

    Most are in one sorted array, 8 bytes each; the latest, a sixteenth at most, are in a set of
    Python, some 90 bytes each, until they are sorted in. Sorting in takes another copy of the array
    for a moment.
    """

    def __init__(self, hashes: Iterable[Hashes] = ()) -> None:
        self._sorted = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def add(self, value: int) -> bool:
        """True if the value is new."""
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
    """The documents, with the cursors after them, whose text is new.

    Args:
        seen_hashes: xxh3-64 of the texts, in UTF-8, of the documents before the first of these.
    """
    texts = HashSet(seen_hashes)
    for document, after in documents:
        if texts.add(xxhash.xxh3_64_intdigest(document.text.encode())):
            yield document, after
