"""Types what a page shows, as it is there but for sizes, and in this process where it can.

Every change that is made to what is typed is in a table below. A command that is in none of them is
run as it is, and a program that is not known fails the test.

| on the page | here |
|---|---|
| gpt2, smollm2-135m, ./my-model | a folder: a model of 13 small layers |
| a dataset of the hub | a JSONL file of the fixture corpus, read by `datasets` |
| s3://bucket | a server of this machine |
| a cluster, several workers | this process; real ones are in tests/test_*ray*.py and test_pool.py |
| tokens, batches, shards | small ones |
| make TARGET | `make -n TARGET`; `make demo` also runs what it calls |
| a server | one that answers, is given a note, and is stopped |
| programs of others | see `OTHERS` |
"""

from __future__ import annotations

import ast
import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import uvicorn
import yaml
from click.testing import CliRunner

import sae_harvest.harvest.commands.cli
import sae_harvest.pipelines.cli
import sae_harvest.pipelines.evaluate.cli
import sae_harvest.pipelines.features.commands.cli
from tests.pages import ROOT, Block, commands

MAINS = {
    "harvest": sae_harvest.harvest.commands.cli.main,
    "train-sae": sae_harvest.pipelines.evaluate.cli.main,
    "sae-features": sae_harvest.pipelines.features.commands.cli.main,
    "sae-pipeline": sae_harvest.pipelines.cli.main,
}
ROWS = 8192  # of every store
BATCH = 256
STEPS = 4


def harvested(tokens: str) -> str:
    """A store's size: a longer one stays longer."""
    return str(ROWS + 1024 * (int(tokens) >= 200_000_000))


# what is put in the place of an option's value; None takes the option away
HARVEST: dict[str, Callable[[str], str | None]] = {
    "--tokens": harvested,
    "--workers": lambda _: "0",
    "--address": lambda _: None,
}
CHANGED: dict[tuple[str, str], dict[str, Callable[[str], str | None]]] = {
    ("harvest", "plan"): HARVEST,
    ("harvest", "run"): HARVEST,
    ("harvest", "verify"): HARVEST,
    ("train-sae", "run"): {
        "--tokens": lambda _: str(BATCH * STEPS),
        **dict.fromkeys(("--workers", "--address", "--parallel"), lambda _: None),
    },
    ("train-sae", "synthetic"): {"--rows": lambda _: str(ROWS)},
    ("sae-features", "build"): {"--workers": lambda _: "0"},
    ("sae-features", "explain"): {"--latents": lambda _: "1"},
    ("sae-pipeline", "run"): {"--workers": lambda _: "0", "--set": lambda _: None},
    ("sae-pipeline", "demo"): {"--tokens": lambda _: str(ROWS)},
}
# options that are added unless they are there after that; a flag has no value
HARVEST_SIZES = {"--tokens": str(ROWS), "--shard-rows": "512"}
ADDED: dict[tuple[str, str], dict[str, str]] = {
    ("harvest", "plan"): HARVEST_SIZES,
    ("harvest", "run"): HARVEST_SIZES | {"--workers": "0"},
    ("train-sae", "run"): {"--tokens": str(BATCH * STEPS), "--batch-rows": str(BATCH)},
    ("train-sae", "eval"): {
        "--rows": "512",
        "--contexts": "2",
        "--ablated-rows": "1",
        "--n2g-latents": "1",
        "--no-probes": "",  # a model reads 200,000 tokens for them
    },
    ("train-sae", "synthetic"): {"--rows": str(ROWS)},
    ("sae-features", "build"): {"--top": "4", "--random": "2", "--decile": "1", "--silent": "2"},
    ("sae-features", "programs"): {"--n2g-latents": "1"},
    ("sae-features", "explain"): {"--candidates": "1", "--scored": "1", "--shown": "2"},
    ("sae-features", "serve"): {"--port": "0"},
    ("sae-pipeline", "run"): {"--workers": "0"},
    ("sae-pipeline", "demo"): {"--workers": "0", "--tokens": str(ROWS)},
}
# `sae-pipeline run`: sizes for every recipe, typed after those of the page
RECIPE = {
    "harvest.tokens": str(ROWS),
    "train.tokens": str(BATCH * STEPS),
    "train.batch_rows": str(BATCH),
    "layers": "[12]",
}
GRID = {"gpt2-small": {"train.grid.n_latents": "[64, 128]"}, "scaling-smollm2": {}}
# keys of a YAML file on a page: of these files, and of those for training
YAML_SIZES = {
    "harvest.yaml": {"tokens": ROWS, "shard_rows": 512},
    "features.yaml": {"n_top": 4, "n_random": 2, "n_decile": 1, "n_inactive": 2, "n_hard": 2},
}
TRAINING_SIZES = {"tokens": BATCH * STEPS, "batch_rows": BATCH}
# code of packages that are not installed: the program of tests/interop that runs the same calls
PEERS = {"delphi": "run_delphi.py", "neuron_explainer": "run_viewers.py"}


class Typist:
    """Somebody in a folder who types one thing after the other."""

    def __init__(self, folder: Path, made_by_the_demo: Path | None) -> None:
        self.folder = folder
        self._demo = made_by_the_demo
        self._names: dict[str, Any] = {}

    def block(self, block: Block) -> None:
        """A block of a page, of whatever language."""
        match block.language:
            case "console":
                for command in commands(block.text):
                    self.command(command)
            case "python":
                self.python(block.text)
            case "sql":
                self.command(shlex.join(["sae-features", "query", block.text]))
            case "yaml":
                self.file(block.text)
            case _:
                pytest.fail(f"A block of {block.language or 'no language'} cannot be typed.")

    def command(self, text: str) -> None:
        """A line of a console, or several joined by &&, or one that is given what `echo` says."""
        words = shlex.split(text.replace("\\\n", " "), comments=True)
        line: list[str] = []
        given = None
        for word in [*words, "&&"]:
            if word == "|":
                assert line[0] == "echo"
                given, line = " ".join(line[1:]), []
            elif word == "&&":
                print("$", shlex.join(line))
                self._run(line, text, given)
                given, line = None, []
            else:
                line.append(word)

    def _run(self, words: list[str], text: str, given: str | None) -> None:
        while re.match(r"[A-Z_]+=", words[0]):  # of the environment
            words = words[1:]
        program, *rest = words
        if program in MAINS:
            self.ours(program, rest, given)
        elif program in OTHERS:
            OTHERS[program](self, rest)
        else:
            pytest.fail(f"{text}: tests/typist.py does not know how to run {program}.")

    def ours(self, program: str, words: list[str], given: str | None = None) -> None:
        """A command of this project: read as it is typed, then run with the tables' changes."""
        main = MAINS[program]
        name, *rest = words
        assert isinstance(main, click.Group)
        known = main.commands[name]
        with contextlib.chdir(self.folder):
            known.make_context(name, list(rest)).close()  # a wrong option or value ends here
            changed = self._changed(program, name, rest)
            result = CliRunner().invoke(main, [name, *changed], input=given)
        printed = result.stdout + result.stderr
        assert result.exit_code == 0, (shlex.join([program, name, *changed]), printed, result)
        assert "Traceback" not in printed
        assert "does not fit" not in printed

    def _changed(self, program: str, name: str, words: list[str]) -> list[str]:
        changes, added = CHANGED.get((program, name), {}), ADDED.get((program, name), {})
        given: list[str] = []
        waiting = list(words)
        while waiting:
            word = waiting.pop(0)
            if word not in changes:
                given.append(word)
            elif (value := changes[word](waiting.pop(0))) is not None:
                given += [word, value]
        if "--config" in given:  # the file holds the others
            added = {option: added[option] for option in added if option == "--workers"}
        given += [w for option, v in added.items() if option not in given for w in (option, v) if w]
        if (program, name) == ("sae-pipeline", "run"):
            typed = [w for o, w in pairwise(words) if o == "--set"]
            sizes = RECIPE | GRID[words[0]]
            sets = typed + [f"{key}={value}" for key, value in sizes.items()]
            given += [w for each in sets for w in ("--set", each)]
        return given

    def file(self, text: str) -> None:
        """A YAML file whose first line is its name, written with small sizes."""
        name = re.match(r"# ([\w.-]+\.yaml)\b", text)
        assert name is not None, f"the first line of a YAML block is its name, `# run.yaml`: {text}"
        content, sizes = yaml.safe_load(text), YAML_SIZES.get(name[1], TRAINING_SIZES)
        (self.folder / name[1]).write_text(yaml.safe_dump(content | sizes))

    def python(self, code: str) -> None:
        """Code, as in one session."""
        peers = {name for name in PEERS if re.search(rf"^from {name}\.", code, re.MULTILINE)}
        if not peers:
            with contextlib.chdir(self.folder):
                exec(compile(code, "page", "exec"), self._names)
            return
        (peer,) = peers
        run = (ROOT / "tests" / "interop" / "scripts" / PEERS[peer]).read_text()
        shown = {name for name in imports(code) if name[0].startswith(peer)}
        assert shown <= imports(run), f"{PEERS[peer]} does not run what the page shows"
        for path in re.findall(r'"(runs/[^"]+)"', code):
            assert (self.folder / path).is_dir(), path

    # programs of others

    def activate(self, words: list[str]) -> None:
        assert words == [f"{made_by_make('VENV')}/bin/activate"]

    def make(self, words: list[str]) -> None:
        (target,) = words
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
        if target == "demo":
            if self._demo is not None:
                shutil.copytree(self._demo, self.folder / "runs" / "demo", dirs_exist_ok=True)
            self.ours("sae-pipeline", ["demo"])

    def pip(self, words: list[str]) -> None:
        """The extras are ours, and what is pinned is what the Makefile installs."""
        assert words[0] == "install"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for word in words[1:]:
            if extras := re.fullmatch(r"\.\[(.+)\]", word):
                assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
            else:
                assert word in ("--no-deps", *made_by_make("DATA").split())

    def sqlite3(self, words: list[str]) -> None:
        path, query = words
        with contextlib.closing(
            sqlite3.connect(f"file:{self.folder / path}?mode=ro", uri=True)
        ) as db:
            assert db.execute(query).fetchall()

    def npm(self, words: list[str]) -> None:
        """Puts there what the package @sparticuz/chromium holds, with other contents."""
        assert words == ["install", "--prefix", ".browser", "@sparticuz/chromium"]
        packed = self.folder / ".browser/node_modules/@sparticuz/chromium/bin"
        (self.folder / "lib").mkdir()
        (self.folder / "lib" / "libnss3.so").touch()
        packed.mkdir(parents=True)
        subprocess.run(["tar", "-cf", "l.tar", "lib"], cwd=self.folder, check=True)
        self.node(
            [
                "-e",
                'const fs = require("fs"), z = require("zlib");'
                f"fs.writeFileSync('{packed}/chromium.br', z.brotliCompressSync('a browser'));"
                f"fs.writeFileSync('{packed}/al2023.tar.br', "
                "z.brotliCompressSync(fs.readFileSync('l.tar')));",
            ]
        )

    def node(self, words: list[str]) -> None:
        """The one that playwright brings."""
        from playwright._impl._driver import compute_driver_executable

        node = compute_driver_executable()[0]
        subprocess.run([node, *words], cwd=self.folder, check=True)

    def tar(self, words: list[str]) -> None:
        subprocess.run(["tar", *words], cwd=self.folder, check=True)

    def run_python(self, words: list[str]) -> None:
        match words:
            case ["-m", "pytest", pattern]:
                assert list(ROOT.glob(pattern))
                assert os.access(self.folder / ".browser" / "chromium", os.X_OK)
                assert (self.folder / ".browser" / "lib" / "libnss3.so").is_file()
            case ["-m", "bench.quality", *rest]:
                from bench.quality import main

                with contextlib.chdir(self.folder):
                    main([*rest, "--who", "ours", "--seeds", "0", "--steps", "2"])
            case ["-m", "bench.studies.synthetic", *rest]:
                from bench.studies.synthetic import main as study

                with contextlib.chdir(self.folder):
                    study([*rest, "--rows", str(ROWS), "--tokens", str(ROWS)])
            case _:
                pytest.fail(f"python {shlex.join(words)}: tests/typist.py does not know it.")


OTHERS: dict[str, Callable[[Typist, list[str]], None]] = {
    ".": Typist.activate,
    "make": Typist.make,
    "pip": Typist.pip,
    "sqlite3": Typist.sqlite3,
    "npm": Typist.npm,
    "node": Typist.node,
    "tar": Typist.tar,
    "python": Typist.run_python,
}


def imports(code: str) -> set[tuple[str, str]]:
    """(module, name) of every `from module import name`."""
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return {(str(node.module), name.name) for node in found for name in node.names}


def made_by_make(variable: str) -> str:
    """The value of a variable of the Makefile."""
    found = re.search(rf"^{variable} := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def serve_a_moment(server: uvicorn.Server, sockets: Any) -> None:
    """In the place of `uvicorn.Server.run`: answers, takes a note, and is stopped."""
    thread = threading.Thread(target=RUN, args=(server, sockets))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = sockets[0].getsockname()[1]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        page = connection.getresponse()
        assert page.status == 200
        assert b"<html" in page.read()
        note = json.dumps({"note": "seen", "tags": []})
        kind = {"content-type": "application/json"}
        connection.request("POST", "/api/latent/3/notes", note, kind)
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.should_exit = True
        thread.join()


RUN = uvicorn.Server.run
