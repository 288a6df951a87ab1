"""Arguments that are not text: every command refuses them before it does anything."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sae_harvest.harvest.commands.cli import main as harvest
from sae_harvest.pipelines.cli import main as sae_pipeline
from sae_harvest.pipelines.evaluate.cli import main as train_sae
from sae_harvest.pipelines.features.commands.cli import main as sae_features
from tests.commands import refusal

GROUPS = {
    "harvest": harvest,
    "train-sae": train_sae,
    "sae-features": sae_features,
    "sae-pipeline": sae_pipeline,
}
PATHS = [
    (name, command, parameter)
    for name, group in GROUPS.items()
    for command, found in group.commands.items()
    for parameter in found.params
    if not isinstance(parameter, click.Option) or not (parameter.is_flag or parameter.count)
]


@pytest.mark.parametrize("name", GROUPS)
def test_bytes_that_are_not_utf8_are_refused_in_one_sentence_whatever_the_option(
    name, tmp_path, monkeypatch
):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    Path(folder).mkdir()
    for command in GROUPS[name].commands.values():  # or a failure would run the demo
        monkeypatch.setattr(command, "callback", None)
    for group, command, parameter in PATHS:
        if group != name:
            continue
        given = [parameter.opts[0], folder] if isinstance(parameter, click.Option) else [folder]
        result = CliRunner().invoke(GROUPS[name], [command, *given])
        sentence = refusal(result, code=2)
        assert r"caf\udce9' has bytes that are not UTF-8" in sentence
        assert len(result.stderr.splitlines()) == 1
    assert not any(Path(folder).iterdir())


def test_arguments_in_any_writing_system_are_text():
    for text in ("café", "東京", "👩‍👩‍👧", "مرحبا"):
        result = CliRunner().invoke(harvest, ["show", "--store", f"/nowhere/{text}"])
        assert f"/nowhere/{text} holds no activation store" in refusal(result)
