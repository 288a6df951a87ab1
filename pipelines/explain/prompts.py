"""Prompts as files: what a language model is asked, with places for the data of a latent.

A file has sections that begin with a line `=== NAME`. The sections of a conversation are `system`,
`user` and `assistant`, in any number; those of a text in which something is read are `prefix` and
`text`. `{{name}}` is replaced. Lines before the first section are comments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.explain.client.interface import Message, Reading

FOLDER = "prompt_files"
ROLES = ("system", "user", "assistant")
PLACES: dict[str, tuple[str, ...]] = {
    "explain": ("marked", "numbers", "silent", "top_tokens", "promoted_tokens", "program"),
    "simulate": ("explanation", "tokens"),
    "detect": ("explanation", "text"),
    "fuzz": ("explanation", "marked"),
    "intruder": ("list",),
    "propose": ("explanation", "n"),
    "revise": ("explanation", "tried"),
}
READINGS = ("simulate", "detect", "fuzz", "intruder")


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    name: str
    """Name of its file, without the ending."""

    digest: str
    """Identity of its content, xxh3-64."""

    sections: tuple[tuple[str, str], ...]
    """Names and texts of its sections."""

    def messages(self, values: Mapping[str, str]) -> tuple[Message, ...]:
        """Return the conversation, with values in their places."""
        return tuple(
            Message(role, _filled(text, values).strip())  # type: ignore[arg-type]
            for role, text in self.sections
        )

    def prefix(self, values: Mapping[str, str]) -> str:
        """Return the part that does not depend on the text that is read."""
        return _filled(dict(self.sections)["prefix"], values)

    def text(self, values: Mapping[str, str]) -> str:
        """Return the rest, without the line end of the file."""
        return _filled(dict(self.sections)["text"], values).removesuffix("\n")

    def at_the_end(
        self, shared: Mapping[str, str], values: Mapping[str, str], choices: tuple[str, ...]
    ) -> Reading:
        """Return the reading of what follows the whole text."""
        text = self.text(values)
        return Reading(self.prefix(shared), text, (len(text),), choices)


def load_prompts(folder: Path | None = None) -> dict[str, Prompt]:
    """Read the packaged prompts; those in a folder take their place.

    Raises:
        InputError: a file is no prompt, or has a place that is not known.
    """
    found = {}
    for name in PLACES:
        packaged = files(__package__).joinpath(FOLDER, f"{name}.txt")
        found[name] = _parsed(name, f"{name}.txt", packaged.read_text(encoding="utf-8"))
    if folder is None:
        return found
    own = sorted(folder.glob("*.txt"))
    if not own:
        raise InputError(
            f"{folder} holds no prompt; put files such as explain.txt there, in the form of the "
            "packaged ones."
        )
    for path in own:
        if path.stem not in PLACES:
            raise InputError(
                f"{path} is no prompt that is known; the names are {', '.join(PLACES)}."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); give a text in UTF-8.") from None
        found[path.stem] = _parsed(path.stem, str(path), text)
    return found


def _parsed(name: str, where: str, text: str) -> Prompt:
    _, *parts = re.split(r"^=== (.*)\n", text, flags=re.MULTILINE)
    sections = tuple(zip(map(str.strip, parts[::2]), parts[1::2], strict=True))
    names = [section for section, _ in sections]
    if name in READINGS:
        if names != ["prefix", "text"]:
            raise InputError(f"{where} has the sections {names}; expected prefix and text.")
    elif not names or names[-1] != "user" or not set(names) <= set(ROLES):
        raise InputError(
            f"{where} has the sections {names}; expected {', '.join(ROLES)}, and user as the last."
        )
    used = {place for _, part in sections for place in re.findall(r"{{(\w+)}}", part)}
    if unknown := sorted(used - set(PLACES[name])):
        raise InputError(
            f"{where} has the place {unknown[0]!r}; those of this prompt are "
            f"{', '.join(PLACES[name])}."
        )
    return Prompt(name, xxhash.xxh3_64_hexdigest(text.encode()), sections)


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: values[match[1]], text)
