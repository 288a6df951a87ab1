"""Imports run one way: from a room to those below it, and never to a command line.

Private APIs of other packages are used in one module.
"""

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
# the module that may use private APIs of other packages, and what else may be used in one place
PRIVATE_APIS = "sae_harvest/common/private_apis.py"
EXCEPTIONS = {"pipelines/viewer/connections.py": ["uvicorn.protocols"]}
# modules without an underscore that their packages do not document
UNDOCUMENTED = (
    "numba.core",
    "ray.train.v2",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models",
    "uvicorn.protocols",
    "zarr.core",
)
# documented names that begin with an underscore, of os and of named tuples
DOCUMENTED = {"_exit", "_asdict", "_fields", "_replace"}
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


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file gives to functions, classes, variables, and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            found.add(node.attr)
    return found


def private_uses(source: str) -> Iterator[str]:
    """Private names of others that a file imports, reads, sets or passes by keyword."""
    tree = ast.parse(source)
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = f"{module}.{alias.name}".strip(".")
                if any(is_private(part) for part in name.split(".")):
                    yield name
                yield from (m for m in UNDOCUMENTED if f"{name}.".startswith(f"{m}."))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.Call):
            yield from (k.arg for k in node.keywords if k.arg and is_private(k.arg))
            if ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "monkeypatch.setattr"):
                constants = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                yield from (c for c in constants if isinstance(c, str) and is_private(c))


@pytest.mark.parametrize("room", [*BELOW, "sae_harvest"])
def test_private_apis_of_other_packages_are_used_in_one_module(room: str) -> None:
    paths = modules(room) if room in BELOW else sorted((ROOT / "sae_harvest").glob("*.py"))
    assert paths
    for path in paths:
        place = str(path.relative_to(ROOT))
        if place != PRIVATE_APIS:
            used = [*private_uses(path.read_text())]
            assert used == EXCEPTIONS.get(place, []), f"{place}: move {used} to {PRIVATE_APIS}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._int_mm(a, b)", ["_int_mm"]),
        ("def f(tensor):\n    return tensor._version", ["_version"]),
        ("import ray\nray._private.worker._flag = 1", ["_flag", "_private"]),
        ("from torch._C import device", ["torch._C.device"]),
        ("from zarr.core.buffer import cpu", ["zarr.core"]),
        ("from ray.train import v2", ["ray.train.v2"]),
        ("ray.init(_node_ip_address='')", ["_node_ip_address"]),
        ("getattr(model, '_modules')", ["_modules"]),
        ("from zarr import core, corey\nimport numba.core", ["zarr.core", "numba.core"]),
        ("import os\nos._exit(1)\nplace._replace(x=1)\nmodel.__class__", []),
        ("class A:\n    def f(self, other):\n        self._x = other._x", []),
        ("from __future__ import annotations\nfrom torch import nn", []),
    ],
)
def test_the_check_of_private_apis_finds_them(source: str, found: list[str]) -> None:
    assert list(private_uses(source)) == found
