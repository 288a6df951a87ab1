"""Imports run one way: from a room to those below it, and never to a command line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "common": {"common"},
    "store": {"common", "store"},
    "harvest": {"common", "store", "harvest"},
    "train": {"common", "store", "train"},
    "pipelines": {"common", "store", "harvest", "train", "pipelines"},
}
# command lines, and what starts them
COMMANDS = ("commands", "cli", "__main__")


def modules(room: str) -> list[Path]:
    folder = ROOT / "sae_harvest" / "common" if room == "common" else ROOT / room
    return sorted(folder.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    assert modules(room)
    for path in modules(room):
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package == "sae_harvest":
                assert rest.split(".")[0] in BELOW[room], f"{path.relative_to(ROOT)}: {name}"


@pytest.mark.parametrize("room", BELOW)
def test_no_module_imports_a_command_line(room: str) -> None:
    for path in modules(room):
        if {*path.relative_to(ROOT).with_suffix("").parts} & {*COMMANDS}:
            continue
        for name in imported(path):
            if name.startswith("sae_harvest."):
                assert not {*name.split(".")} & {*COMMANDS}, f"{path.relative_to(ROOT)}: {name}"


def test_the_page_of_the_architecture_names_every_folder() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    hidden = {"kernels", "formats", "objectives", "static", "recipes", "features", "__pycache__"}
    for room in BELOW:
        for path in modules(room):
            folder = path.parent.name
            assert folder in hidden or f"{folder}/" in page, path
