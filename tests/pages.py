"""The commands and code that README, docs/*.md and the commands' own --help show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
PROGRAMS = ("harvest", "train-sae", "sae-features", "sae-pipeline")
TYPED = re.compile(rf"({'|'.join(PROGRAMS)}|make|pip|python|npm|sqlite3|from|import) ")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the number of its first line."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, in order."""
    fence, lines = None, page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if fence is None:
            fence = number
        else:
            text = "\n".join(lines[fence : number - 1])
            yield Block(lines[fence - 1].removeprefix("```"), text, fence + 1)
            fence = None
    assert fence is None, f"{page}:{fence}: the block has no end"


def commands(text: str) -> list[str]:
    """The commands of a console block, each with the lines that continue it."""
    assert text.startswith("$ "), f"a console block begins with a command: {text}"
    return [part.strip() for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]


def spans(page: Path) -> list[str]:
    """What stands between single backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", _outside(page))


def unfenced(page: Path) -> list[str]:
    """Indented lines outside of fences that look like something to type."""
    indented = (line for line in _outside(page).splitlines() if line.startswith("    "))
    return [line for line in indented if TYPED.match(line.strip())]


def _outside(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def examples(command: click.Command) -> list[str]:
    """The commands that a --help text shows."""
    found: list[str] = []
    for line in map(str.strip, (command.help or "").splitlines()):
        if line.startswith(tuple(f"{program} " for program in (*PROGRAMS, "echo"))):
            found.append(line)
        elif found and found[-1].endswith("\\"):
            found[-1] += f"\n{line}"
    return found
