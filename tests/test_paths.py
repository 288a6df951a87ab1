"""Paths that a user gives: absolute from the first moment, whatever becomes of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import ray

import sae_harvest.harvest.commands.cli
import sae_harvest.pipelines.cli
import sae_harvest.pipelines.evaluate.cli
import sae_harvest.pipelines.features.commands.cli
from sae_harvest.common import environment
from sae_harvest.common import ray_cluster as cluster
from sae_harvest.common.options import NameOption, PathOption, PlaceOption
from sae_harvest.common.paths import shown

COMMANDS = (
    sae_harvest.harvest.commands.cli.main,
    sae_harvest.pipelines.evaluate.cli.main,
    sae_harvest.pipelines.cli.main,
    sae_harvest.pipelines.features.commands.cli.main,
)
PATHS = {
    *("store", "out", "sae", "sae_folder", "features", "compare", "corpus", "model", "into"),
    *("saes", "stores", "models", "target", "file", "path", "sources", "sweep", "recipe"),
    *("a", "b", "report", "matches", "prompts"),
}
# what is noted of a model that is not read; a number of features
NAMES_ONLY = {("import", "model"), ("synthetic", "features")}


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
    seen: list[dict[str, Any]] = []

    def init(**given: Any) -> None:
        assert Path.cwd() == tmp_path
        assert dict(os.environ) == before
        seen.append(given)

    monkeypatch.setattr(ray, "init", init)
    cluster.connect(None, 1, "do without")
    assert len(seen) == 1
