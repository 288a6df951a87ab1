"""Notes and tags in an SQLite file, the only file that the viewer writes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sae_harvest.common.errors import InputError, RunError

NOTES_FILE = "notes.sqlite"
MAX_NOTE_CHARS = 20_000  # characters
MAX_TAG_CHARS, MAX_TAGS = 40, 20

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS notes (sae TEXT NOT NULL, latent INTEGER NOT NULL, "
    "note TEXT NOT NULL, PRIMARY KEY (sae, latent))",
    "CREATE TABLE IF NOT EXISTS tags (sae TEXT NOT NULL, latent INTEGER NOT NULL, "
    "tag TEXT NOT NULL, PRIMARY KEY (sae, latent, tag))",
)
MADE = "SELECT count(*) = 2 FROM sqlite_master WHERE name IN ('notes', 'tags')"


class Notes:
    """Notes on the latents of one SAE.

    Each note is saved with the SAE's digest, so that tables of another SAE in the same folder do
    not show it.

    Args:
        path: the SQLite file; the first save creates it.
    """

    def __init__(self, path: Path, sae_digest: str) -> None:
        self.path, self._sae = path, sae_digest

    @classmethod
    def beside(cls, features: Path, sae_digest: str) -> Notes:
        """Open the notes in the tables' folder, or beside the folder if it is not writable."""
        inside = features / NOTES_FILE
        outside = features.parent / f"{features.name}.{NOTES_FILE}"
        writable = os.access(features, os.W_OK) and (
            not inside.exists() or os.access(inside, os.W_OK)
        )
        return cls(inside if writable else outside, sae_digest)

    def get(self, latent: int) -> dict[str, Any]:
        """Return note and tags of a latent; both are empty if nothing was saved."""
        if not self.path.exists():
            return {"note": "", "tags": []}
        with self._open() as connection:
            if not _is_made(connection):
                return {"note": "", "tags": []}
            note = connection.execute(
                "SELECT note FROM notes WHERE sae = ? AND latent = ?", (self._sae, latent)
            ).fetchone()
            tags = connection.execute(
                "SELECT tag FROM tags WHERE sae = ? AND latent = ? ORDER BY tag",
                (self._sae, latent),
            ).fetchall()
        note = self._checked(latent, note[0])[1] if note else ""
        return {"note": note, "tags": [self._checked(latent, tag)[1] for (tag,) in tags]}

    def put(self, latent: int, note: str, tags: list[str]) -> dict[str, Any]:
        """Save note and tags in one transaction, and return them as saved.

        Raises:
            InputError: the note is too long, or the tags are too long or too many.
            RunError: the file cannot be written.
        """
        tags = sorted({tag.strip() for tag in tags} - {""})
        if len(note) > MAX_NOTE_CHARS:
            raise InputError(
                f"A note has at most {MAX_NOTE_CHARS:,} characters, this one has {len(note):,}."
            )
        if len(tags) > MAX_TAGS or any(len(tag) > MAX_TAG_CHARS for tag in tags):
            raise InputError(
                f"A latent has at most {MAX_TAGS} tags of at most {MAX_TAG_CHARS} characters."
            )
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                for statement in SCHEMA:
                    connection.execute(statement)
                for table in ("notes", "tags"):
                    connection.execute(
                        f"DELETE FROM {table} WHERE sae = ? AND latent = ?", (self._sae, latent)
                    )
                if note.strip():
                    connection.execute(
                        "INSERT INTO notes VALUES (?, ?, ?)", (self._sae, latent, note)
                    )
                connection.executemany(
                    "INSERT INTO tags VALUES (?, ?, ?)", [(self._sae, latent, t) for t in tags]
                )
        return self.get(latent)

    def noted(self) -> dict[int, dict[str, Any]]:
        """Return note and tags of every latent that has any, by the latent's number."""
        found: dict[int, dict[str, Any]] = {}
        if not self.path.exists():
            return found
        with self._open() as connection:
            if not _is_made(connection):
                return found
            for table, column in (("notes", "note"), ("tags", "tag")):
                for row in connection.execute(
                    f"SELECT latent, {column} FROM {table} WHERE sae = ? ORDER BY latent, {column}",
                    (self._sae,),
                ):
                    latent, text = self._checked(*row)
                    entry = found.setdefault(latent, {"note": "", "tags": []})
                    if column == "note":
                        entry["note"] = text
                    else:
                        entry["tags"].append(text)
        return dict(sorted(found.items()))

    def _checked(self, latent: object, text: object) -> tuple[int, str]:
        """Return a row of the file after a check, as any program may have written it."""
        if not isinstance(latent, int) or not 0 <= latent < 2**31 or not isinstance(text, str):
            raise RunError(
                f"{self.path} holds a note or tag that is not text, or whose latent is not a "
                f"number (at latent {str(latent)[:20]}); delete that row, or move the file away."
            )
        return latent, text

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Connect to the file; writers wait for each other for up to 10 s."""
        try:
            with closing(sqlite3.connect(self.path, timeout=10)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise RunError(
                f"Notes cannot be saved in {self.path} ({error}); "
                "make it writable, or move it away if it is damaged."
            ) from error


def _is_made(connection: sqlite3.Connection) -> bool:
    """Whether the tables exist: a server that is killed at its first save leaves an empty file."""
    return bool(connection.execute(MADE).fetchone()[0])
