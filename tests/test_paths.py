"""Paths that a user gives: absolute from the first moment, whatever becomes of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import ray

import harvest.cli
import pipelines.cli
import pipelines.features.cli
import train.cli
from store import cluster, environment
from store.options import NameOption, PathOption, PlaceOption
from store.paths import shown

COMMANDS = (harvest.cli.main, train.cli.main, pipelines.cli.main, pipelines.features.cli.main)
PATHS = {
    *("store", "out", "sae", "sae_folder", "features", "compare", "corpus", "model", "into"),
    *("saes", "stores", "models", "target", "file", "path", "sources", "sweep", "recipe"),
}
NAMES_ONLY = {("import", "model")}  # what is noted of a model that is not read


def parameters(command: click.Command) -> Iterator[tuple[str, click.Parameter]]:
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from parameters(inner)
    else:
        yield from ((str(command.name), parameter) for parameter in command.params)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.callback.__module__)
def test_every_option_that_names_a_path_makes_it_absolute(
    command: click.Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    checked = 0
    for owner, parameter in parameters(command):
        if parameter.name not in PATHS or (owner, parameter.name) in NAMES_ONLY:
            assert not isinstance(parameter.type, click.Path), (owner, parameter.name)
            continue
        if isinstance(parameter.type, PathOption) and not parameter.type.dir_okay:
            (tmp_path / "file").touch()
            given = "file"
        else:
            given = "there"
        found = parameter.type.convert(given, parameter, None)
        assert str(found) == str(tmp_path / given), (owner, parameter.name)
        checked += 1
    assert checked > 2


def test_links_addresses_and_names_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "news").mkdir()
    monkeypatch.chdir(tmp_path)
    place, name = PlaceOption(), NameOption("news")
    assert place.convert("link/x", None, None) == str(tmp_path / "link" / "x")
    assert place.convert("s3://bucket/a", None, None) == "s3://bucket/a"
    assert place.convert("~/x", None, None) == str(Path.home() / "x")
    assert name.convert("news", None, None) == "news"
    assert name.convert("./news", None, None) == str(tmp_path / "news")
    assert name.convert("owner/name", None, None) == "owner/name"
    assert name.convert("../other", None, None) == str(tmp_path / "../other")
    assert shown(tmp_path / "link" / "x") == "link/x"
    assert shown("/elsewhere") == "/elsewhere"
    assert shown("s3://bucket/a") == "s3://bucket/a"


@pytest.mark.parametrize("given", ["", "a\0b", "x" * 300, "a/" + "é" * 128])
@pytest.mark.parametrize("kind", [PathOption(), PlaceOption(), NameOption()])
def test_what_no_file_can_be_called_is_a_usage_error(kind: click.ParamType, given: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        kind.convert(given, None, None)
    assert caught.value.message.count("\n") == 0


def test_joining_ray_changes_neither_the_folder_nor_an_environment_that_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    environment.set_defaults()
    before = dict(os.environ)
    seen: dict[str, Any] = {}

    def init(**given: Any) -> None:
        assert Path.cwd() == tmp_path
        assert dict(os.environ) == before
        seen.update(given["runtime_env"])
        assert list(Path(seen["working_dir"]).iterdir()) == []

    monkeypatch.setattr(ray, "init", init)
    cluster.connect(None, 1, "do without")
    assert not Path(seen["working_dir"]).exists()
    # a job with a folder of its own keeps it
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://a"}}')
    before = dict(os.environ)
    monkeypatch.setattr(ray, "init", lambda **given: seen.update(found=given["runtime_env"]))
    cluster.connect(None, 1, "do without")
    assert "working_dir" not in seen["found"]
