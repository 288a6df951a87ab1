"""Answers that are kept in an SQLite file, so that nothing is asked twice.

An answer is written when it arrives: whatever ends the process, only the requests under way are
lost. A failure is not kept. Several processes may use one file.

    answers(key, value, digest)    key: hash of the client's identity and of the whole request
                                   value: the answer as JSON; digest: its hash
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sae_harvest.common.atomic import new_folder
from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.explain.client.interface import (
    A,
    Answer,
    Client,
    Failure,
    Generation,
    OnAnswer,
    Read,
    Reading,
    Request,
    Text,
    Usage,
    unheard,
)

WAIT_SECONDS = 60.0  # for another process that writes


class CachedClient:
    """A client whose answers are kept in a file."""

    def __init__(self, client: Client, path: Path) -> None:
        """Take a client and the place of the file, which is made if missing."""
        self._client, self._path = client, path
        self.tally = client.tally

    @property
    def identity(self) -> str:
        """The client's own."""
        return self._client.identity

    @property
    def reads(self) -> bool:
        """True if the client reads."""
        return self._client.reads

    def generate(
        self, requests: Sequence[Generation], on_answer: OnAnswer = unheard
    ) -> list[Text | Failure]:
        """Answer generations: from the file, or by the client.

        Raises:
            RunError: the file is damaged, or cannot be written.
        """
        return self._answered(requests, self._client.generate, on_answer)

    def read(
        self, requests: Sequence[Reading], on_answer: OnAnswer = unheard
    ) -> list[Read | Failure]:
        """Answer readings: from the file, or by the client.

        Raises:
            RunError: the file is damaged, or cannot be written.
            InputError: two choices begin with the same token.
        """
        return self._answered(requests, self._client.read, on_answer)

    def _answered(
        self,
        requests: Sequence[Any],
        ask: Callable[[Sequence[Any], OnAnswer], list[A]],
        on_answer: OnAnswer,
    ) -> list[A]:
        keys = [_key(self.identity, request) for request in requests]
        numbers: dict[str, list[int]] = {}  # by key
        for number, key in enumerate(keys):
            numbers.setdefault(key, []).append(number)
        found: dict[int, Any] = {}

        def tell(key: str, answer: Answer) -> None:
            for number in numbers[key]:
                found[number] = answer
                on_answer(number, answer)

        with closing(self._opened()) as file:
            absent = []
            for key, equal in numbers.items():
                kept = self._kept(file, key)
                if kept is None:
                    absent.append(key)
                else:
                    self.tally.cached += len(equal)
                    tell(key, kept)

            def keep(number: int, answer: Answer) -> None:
                if not isinstance(answer, Failure):
                    self._keep(file, absent[number], answer)
                tell(absent[number], answer)

            if absent:
                ask([requests[numbers[key][0]] for key in absent], keep)
        return [found[number] for number in range(len(requests))]

    def _opened(self) -> sqlite3.Connection:
        new_folder(self._path.parent)
        with self._using():
            file = sqlite3.connect(self._path, timeout=WAIT_SECONDS, isolation_level=None)
            try:
                file.execute("PRAGMA journal_mode = WAL")
                file.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the latest
                file.execute(
                    "CREATE TABLE IF NOT EXISTS answers "
                    "(key TEXT PRIMARY KEY, value TEXT, digest TEXT) WITHOUT ROWID"
                )
            except BaseException:
                file.close()
                raise
        return file

    def _kept(self, file: sqlite3.Connection, key: str) -> Text | Read | None:
        with self._using():
            row = file.execute("SELECT value, digest FROM answers WHERE key = ?", [key]).fetchone()
        if row is None:
            return None
        value, digest = row
        if not isinstance(value, str) or _hash(value) != digest:
            raise self._damaged("an answer was altered")
        return _from_json(value)

    def _keep(self, file: sqlite3.Connection, key: str, answer: Text | Read) -> None:
        value = _as_json(answer)
        with self._using():
            row = [key, value, _hash(value)]
            file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", row)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Report an error of SQLite in one sentence."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise RunError(
                f"The cache of answers {self._path} cannot be used ({error}); see to the disk and "
                "its permissions, then run the same command again."
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> RunError:
        return RunError(
            f"The cache of answers {self._path} is damaged ({reason}); delete it, and the files "
            f"{self._path.name}-wal and {self._path.name}-shm beside it if they are there: its "
            "answers are asked again."
        )


def _key(identity: str, request: Request) -> str:
    fields = {"identity": identity, "kind": type(request).__name__, **asdict(request)}
    return _hash(json.dumps(fields, sort_keys=True))


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _as_json(answer: Text | Read) -> str:
    usage = asdict(answer.usage)
    if isinstance(answer, Text):
        return json.dumps({"text": answer.text, "usage": usage})
    return json.dumps(
        {"probability": answer.probability.tolist(), "shape": answer.probability.shape}
        | {"usage": usage}
    )


def _from_json(value: str) -> Text | Read:
    fields = json.loads(value)
    usage = Usage(**fields["usage"])
    if "text" in fields:
        return Text(fields["text"], usage)
    return Read(np.array(fields["probability"], np.float64).reshape(fields["shape"]), usage)
