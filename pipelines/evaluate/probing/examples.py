"""The examples of tasks: documents or rows of a store, with a class for each task.

Rows that the dictionary's rule leaves out, end-of-text tokens and BOS tokens are no examples and
are not pooled. Documents are divided into training and test documents by the hash of their text,
as the tables divide them for explanations and scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.evaluate.intervals import clusters_of
from sae_harvest.pipelines.evaluate.probing.newton import ABSENT, Codes
from sae_harvest.pipelines.evaluate.probing.tasks import Task
from sae_harvest.pipelines.features.encoding.sources import StoreSource
from sae_harvest.pipelines.features.tables.rows import for_scores

FEWEST = 8  # examples of each class among the training documents, and among the test documents
DOCUMENTS, ROWS = "documents", "rows"


@dataclass(frozen=True, eq=False)
class StoreRows:
    """The first rows of a store, arrays [rows]."""

    token: npt.NDArray[np.int32]
    """Token id."""
    number: npt.NDArray[np.int64]
    """Number of the token in its document, from 0; -1 without a document."""
    document: npt.NDArray[np.int64]
    """Number of the document; -1 without a document."""
    text_hash: npt.NDArray[np.uint64]
    """Hash of the document's text."""
    used: npt.NDArray[np.bool_]
    """Mask of the rows that the dictionary's rule reads and that are tokens of a text."""

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of several tasks."""

    unit: str
    """`documents` or `rows`."""
    names: tuple[str, ...]
    """Names of the tasks."""
    codes: Codes
    """uint8 [examples, tasks]: 0 negative, 1 positive, 2 not in the task."""
    test: npt.NDArray[np.bool_]
    """Mask of the examples of test documents [examples]."""
    cluster: npt.NDArray[np.int64]
    """Cluster of the example's document, for intervals [examples]."""
    of_row: npt.NDArray[np.int32]
    """Example that a row belongs to; -1: none [rows]."""
    n_rows: npt.NDArray[np.int64]
    """Number of rows of each example [examples]."""
    last_row: npt.NDArray[np.int64]
    """Last row of each example in the order of its document [examples]."""

    def __len__(self) -> int:
        return len(self.codes)

    def part(self, test: bool) -> Codes:
        """Return the codes with only the training, or only the test documents."""
        return np.where((self.test == test)[:, None], self.codes, np.uint8(ABSENT))

    def taken(self, examples: npt.NDArray[np.int64], codes: Codes) -> Examples:
        """Return some of the examples, without rows, with other codes [taken, tasks]."""
        return replace(
            self,
            codes=codes,
            test=self.test[examples],
            cluster=self.cluster[examples],
            of_row=np.empty(0, np.int32),
            n_rows=self.n_rows[examples],
            last_row=self.last_row[examples],
        )


def store_rows(source: StoreSource, end_of_text: int, most_rows: int) -> StoreRows:
    """Read what is known of the first rows of a store: whole blocks of firings, at least one.

    Args:
        end_of_text: id of the token after each document.
        most_rows: number of rows, rounded down to whole blocks.
    """
    store, length = source.store, source.context_length
    n_rows = min(source.n_rows, max(1, most_rows // source.block_rows) * source.block_rows)
    parts = []
    for shard, (tokens, documents, hashes, read) in enumerate(source.rows()):
        first, _ = store.shard_span(shard)
        pieces = store.pieces(shard)
        starts, stops = (pieces[name].to_numpy().astype(np.int64) for name in ("start", "stop"))
        begins = pieces["context"].to_numpy() * length + starts - first
        lengths = stops - starts
        offset = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        number = np.full(len(tokens), -1, np.int64)
        number[np.repeat(begins, lengths) + offset] = offset + np.repeat(
            pieces["first_token"].to_numpy(), lengths
        )
        used = read & (documents >= 0) & (tokens != end_of_text)
        parts.append((tokens, number, documents, hashes, used))
        if first + len(tokens) >= n_rows:
            break
    return StoreRows(*(np.concatenate(columns)[:n_rows] for columns in zip(*parts, strict=True)))


def document_examples(
    rows: StoreRows, tasks: Sequence[Task], place: str
) -> tuple[Examples, dict[str, str]]:
    """Find the documents of tasks.

    Args:
        rows: rows of the store.
        tasks: tasks whose key is `text` or `document`.
        place: the store, for messages.

    Returns:
        The examples of the tasks that have enough of them; for each other task, by name, the
        reason as a sentence.
    """
    numbers, first = np.unique(np.where(rows.used, rows.document, -1), return_index=True)
    inside = numbers >= 0
    numbers, hashes = numbers[inside], rows.text_hash[first[inside]]
    columns, left_out = dict[str, Codes](), dict[str, str]()
    for task in tasks:
        column = np.full(len(numbers), ABSENT, np.uint8)
        if task.key == "text":  # copies of a text: the first of them
            by_hash, first_with = np.unique(hashes, return_index=True)
            at, known = _found(task.keys, by_hash)
            column[first_with[at[known]]] = task.labels[known]
        else:
            at, known = _found(task.keys, numbers)
            column[at[known]] = task.labels[known]
        _enough(task, column, for_scores(hashes), columns, left_out, place)
    codes = _stacked(columns, len(numbers))
    labelled = (codes != ABSENT).any(axis=1)
    numbers, hashes, codes = numbers[labelled], hashes[labelled], codes[labelled]
    at, known = _found(rows.document, numbers)
    of_row = np.where(known & rows.used, at, -1).astype(np.int32)
    n_rows = np.bincount(of_row[of_row >= 0], minlength=len(numbers))
    last_row = _last_rows(of_row, rows.number, len(numbers))
    test = for_scores(hashes)
    found = Examples(
        DOCUMENTS, tuple(columns), codes, test, clusters_of(hashes), of_row, n_rows, last_row
    )
    return found, left_out


def row_examples(
    rows: StoreRows, labels: npt.NDArray[np.bool_], names: Sequence[str], tasks: Sequence[Task],
    place: str,
) -> tuple[Examples, dict[str, str]]:  # fmt: skip
    """Find the rows of tasks.

    Args:
        rows: rows of the store.
        labels: bool [rows, names], the classes of all rows for the packaged tasks.
        names: names of these tasks.
        tasks: other tasks whose key is `row`.
        place: the store, for messages.

    Returns:
        As `document_examples`.
    """
    columns, left_out = dict[str, Codes](), dict[str, str]()
    test, every = for_scores(rows.text_hash), np.arange(len(rows))
    given = [Task(name, "row", every, column) for name, column in zip(names, labels.T, strict=True)]
    for task in [*given, *tasks]:
        column = np.full(len(rows), ABSENT, np.uint8)
        known = (task.keys >= 0) & (task.keys < len(rows))
        column[task.keys[known]] = task.labels[known]
        column[~rows.used] = ABSENT
        _enough(task, column, test, columns, left_out, place)
    found = Examples(
        ROWS,
        tuple(columns),
        _stacked(columns, len(rows)),
        test,
        clusters_of(rows.text_hash),
        np.where(rows.used, every, -1).astype(np.int32),
        np.ones(len(rows), np.int64),
        every,
    )
    return found, left_out


def require_all(tasks: Sequence[Task], left_out: dict[str, str]) -> None:
    """Raise `InputError` with the reason if one of the tasks was left out."""
    for task in tasks:
        if task.name in left_out:
            raise InputError(left_out[task.name])


def _found(
    keys: npt.NDArray[np.generic], among: npt.NDArray[np.generic]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the place of each key among sorted values, and whether it is there."""
    if len(among) == 0:
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
    at = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    return at, among[at] == keys


def _enough(
    task: Task,
    column: Codes,
    test: npt.NDArray[np.bool_],
    columns: dict[str, Codes],
    left_out: dict[str, str],
    place: str,
) -> None:
    """Add the column of a task, or the reason why it is left out."""
    counts = [int(((column == c) & (test == t)).sum()) for c in (0, 1) for t in (False, True)]
    if sum(counts) == 0:
        left_out[task.name] = (
            f"None of the {len(task.keys):,} {task.key}s of the task {task.name} is among the rows "
            f"of {place} that are read; harvest them, or give another store."
        )
    elif min(counts) < FEWEST:
        left_out[task.name] = (
            f"The task {task.name} has {counts[0]} negative and {counts[2]} positive {task.unit} "
            f"of training documents, {counts[1]} and {counts[3]} of test documents in {place}; "
            f"expected at least {FEWEST} of each; add labels, or harvest more text."
        )
    else:
        columns[task.name] = column


def _stacked(columns: dict[str, Codes], n: int) -> Codes:
    if not columns:
        return np.empty((n, 0), np.uint8)
    return np.ascontiguousarray(np.stack(list(columns.values()), axis=1))


def _last_rows(
    of_row: npt.NDArray[np.int32], number: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.int64]:
    """Return the row of the last token of each example, int64 [n]."""
    rows = np.flatnonzero(of_row >= 0)
    ordered = rows[np.lexsort((number[rows], of_row[rows]))]
    last = np.full(n, -1, np.int64)
    last[of_row[ordered]] = ordered  # the last of each example stays
    return last
