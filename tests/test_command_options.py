"""Options, YAML keys and fields of the configurations are the same things, for every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel

import sae_harvest.harvest.run.progress
import sae_harvest.pipelines.features.building.progress
from sae_harvest.common.settings import CommandSettings
from sae_harvest.harvest.commands.cli import main as harvest
from sae_harvest.harvest.commands.request import HarvestSettings
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.evaluate.cli import main as train
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.commands.cli import BuildSettings
from sae_harvest.pipelines.features.commands.cli import main as features
from sae_harvest.train.commands.plan import ASKED
from sae_harvest.train.options import RunSettings

RUN, PLAN = harvest.commands["run"], harvest.commands["plan"]
BUILD = features.commands["build"]

# option → default that the help shows; None: it has none, or no fixed one
HARVEST: dict[str, Any] = {
    "--model": None, "--model-revision": None, "--corpus": "news", "--dataset-config": None,
    "--split": "train", "--revision": None, "--text-column": None, "--dedup": "no-dedup",
    "--keep-text": "no-keep-text", "--site": None, "--tokens": "all", "--context-length": 128,
    "--bos": "auto", "--seed": 0, "--dtype": "float16", "--compute-dtype": "auto",
    "--batch-tokens": 2048, "--shard-rows": None, "--device": "auto",
}  # fmt: skip
FEATURES: dict[str, Any] = {
    "--store": None, "--sae": None, "--site": None, "--model": None, "--out": None, "--top": 20,
    "--random": 10, "--decile": 2, "--silent": 10, "--window": 64, "--seed": 0, "--device": "auto",
}  # fmt: skip
TRAINED = {"--n-latents": 8192, "--k": 32, "--tokens": 10_000_000, "--batch-rows": 4096}
# written beside the generated ones
OWN = {
    "harvest run": {"--config", "--layer", "--workers", "--address", "--shards"},
    "harvest plan": {"--config", "--layer"},
    "sae-features build": {"--config", "--workers", "--address"},
    "train-sae plan": {
        *("--store", "--site", "--d-in", "--d-out", "--devices", "--parallel", "--dead-share"),
        *("--gpu", "--link", "--device"),
    },
}
COMMANDS: dict[str, tuple[click.Command, dict[str, Any]]] = {
    "harvest run": (RUN, HARVEST | {"--store": None}),
    "harvest plan": (PLAN, HARVEST),
    "sae-features build": (BUILD, FEATURES),
    "train-sae plan": (train.commands["plan"], TRAINED),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_have_the_names_and_defaults_that_they_had(name: str) -> None:
    command, expected = COMMANDS[name]
    options = {p.opts[0]: p for p in command.params if isinstance(p, click.Option)}
    assert set(options) == set(expected) | OWN[name]
    for option, default in expected.items():
        text = options[option].help or ""
        assert (
            text.endswith(f"default: {default}]")
            if default is not None
            else ("default:" not in text)
        )


def leaves(model: type[BaseModel]) -> Iterator[str]:
    """Names of all fields, with those of models in their place."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{name}.{leaf}" for leaf in leaves(inner))
        else:
            yield name


@pytest.mark.parametrize(
    ("settings", "command", "without"),
    [
        (HarvestSettings, RUN, set()),
        (RunSettings, train.commands["run"], set()),
        (BuildSettings, BUILD, {"n_neighbours", "n_tokens", "n_logits", "batch_rows"}),
    ],
)
def test_no_field_is_forgotten(
    settings: type[CommandSettings], command: click.Command, without: set[str]
) -> None:
    found = {".".join(setting.path): setting for setting in settings.settings()}
    assert set(found) == {leaf for model in settings.models for leaf in leaves(model)}
    assert {key for key, setting in found.items() if setting.option is None} == without
    typed = {option for parameter in command.params for option in parameter.opts}
    for key in set(found) - without:
        assert found[key].spelling in typed
        assert found[key].field.description


def test_a_plan_knows_what_it_asks_of_a_run() -> None:
    assert set(ASKED) == {option[2:].replace("-", "_") for option in TRAINED}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What the commands would do, instead of doing it."""
    found: list[tuple[Any, ...]] = []

    def note(*given: Any, **more: Any) -> None:
        found.append((*given, more))
        raise click.exceptions.Exit(0)

    monkeypatch.setattr(sae_harvest.harvest.run.progress, "harvest_with_progress", note)
    monkeypatch.setattr(
        sae_harvest.pipelines.features.building.progress, "build_with_progress", note
    )
    monkeypatch.chdir(tmp_path)
    return found


def invoke(command: click.Command, *arguments: str, file: str | None = None) -> Result:
    if file is not None:
        Path("job.yaml").write_text(file)
        arguments = ("--config", "job.yaml", *arguments)
    return CliRunner().invoke(command, list(arguments))


def refusal(command: click.Command, *arguments: str, file: str | None = None) -> str:
    result = invoke(command, *arguments, file=file)
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def test_a_harvest_is_the_same_as_options_as_a_file_and_in_python(asked: list[Any]) -> None:
    typed = (
        *("--model", "gpt2", "--corpus", "owner/set", "--dataset-config", "c", "--split", "test"),
        *("--dedup", "--site", "mlp_out.1", "--site", "mlp_act.1,resid_pre.1", "--layer", "2"),
        *("--tokens", "1.5M", "--shard-rows", "4_096", "--bos", "none", "--batch-tokens", "512"),
        *("--store", "s3://b/x", "--workers", "0"),
    )
    written = """
model: gpt2
corpus: {name: owner/set, config: c, split: test, dedup: true}
sites: [mlp_out.1, mlp_act.1, resid_pre.1, resid_post.2]
tokens: 1.5M
shard_rows: 4_096
bos: none
batch_tokens: 512
store: s3://b/x
"""
    expected = HarvestConfig(
        model="gpt2",
        corpus=CorpusSpec(name="owner/set", config="c", split="test", dedup=True),
        sites=("mlp_out.1", "mlp_act.1", "resid_pre.1", "resid_post.2"),
        tokens=1_500_000,
        shard_rows=4096,
        bos="none",
        batch_tokens=512,
    )
    assert invoke(RUN, *typed).exit_code == 0
    assert invoke(RUN, "--workers", "0", file=written).exit_code == 0
    for config, store, *_ in asked:
        assert (config, store) == (expected, "s3://b/x")
    assert len(asked) == 2


def test_what_is_not_asked_of_a_harvest_is_left_to_the_configuration(asked: list[Any]) -> None:
    assert invoke(RUN, "--model", "gpt2", "--layer", "8").exit_code == 0
    config, store, execution, *_ = asked[0]
    assert config == HarvestConfig(model="gpt2", sites=("resid_post.8",))
    assert config.corpus == CorpusSpec(name="news")
    assert "tokens" not in config.model_fields_set  # a dataset of the Hub wants them typed
    assert store == str(Path("runs/gpt2-resid_post.8/store").absolute())
    assert (execution.device, execution.workers) == ("auto", 1)


def test_options_of_a_harvest_win_over_its_file(asked: list[Any]) -> None:
    file = "model: gpt2\nsites: [mlp_out.1]\ncorpus: {dedup: true, split: a}\nshard_rows: 9\n"
    typed = ("--no-dedup", "--layer", "2", "--shard-rows", "none", "--tokens", "all")
    assert invoke(RUN, *typed, file=file).exit_code == 0
    config = asked[0][0]
    assert config.corpus == CorpusSpec(split="a")
    assert (config.sites, config.shard_rows, config.tokens) == (("resid_post.2",), None, "all")


def test_names_in_a_file_become_absolute_like_those_that_are_typed(asked: list[Any]) -> None:
    for folder in ("mine", "texts", "news"):
        Path(folder).mkdir()
    file = "model: mine\nsites: [mlp_out.1]\ncorpus: {name: texts}\nstore: here\n"
    assert invoke(RUN, file=file).exit_code == 0
    assert invoke(RUN, "--model", "mine", "--layer", "1", "--corpus", "news").exit_code == 0
    (first, store, *_), (second, *_) = asked
    here = Path.cwd()
    assert (first.model, first.corpus.name, store) == (
        str(here / "mine"), str(here / "texts"), str(here / "here")
    )  # fmt: skip
    assert (second.model, second.corpus.name) == (str(here / "mine"), "news")


def test_a_build_is_the_same_as_options_as_a_file_and_in_python(asked: list[Any]) -> None:
    typed = (
        *("--store", "st", "--sae", "identity", "--out", "o", "--site", "mlp_act.1", "--top", "7"),
        *("--random", "6", "--decile", "5", "--silent", "4", "--window", "33", "--seed", "1k"),
    )
    written = """
store: st
sae: identity
out: o
site: mlp_act.1
n_top: 7
n_random: 6
n_decile: 5
n_inactive: 4
n_hard: 4
window_tokens: 33
seed: 1k
"""
    expected = FeatureConfig(
        n_top=7, n_random=6, n_decile=5, n_inactive=4, n_hard=4, window_tokens=33, seed=1000
    )
    assert invoke(BUILD, *typed).exit_code == 0
    assert invoke(BUILD, file=written).exit_code == 0
    assert invoke(BUILD, "--silent", "9", file=written + "n_logits: 3\n").exit_code == 0
    here = Path.cwd()
    execution = {
        "site": "mlp_act.1", "model": None, "workers": 0, "address": None, "device": "auto",
    }  # fmt: skip
    same = (str(here / "st"), "identity", here / "o", expected, execution)
    changed = expected.model_copy(update={"n_inactive": 9, "n_hard": 9, "n_logits": 3})
    assert asked == [same, same, (*same[:3], changed, execution)]


HARVESTED = ("--model", "gpt2", "--layer", "8")
BUILT = ("--store", "s", "--sae", "identity", "--out", "o")


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        (RUN, (*HARVESTED, "--tokens", "x"), "Invalid value for '--tokens': it should be a valid "
         "integer, or 'all', got 'x'."),
        (RUN, (*HARVESTED, "--tokens", "0"), "Invalid value for '--tokens': it should be greater "
         "than or equal to 1, or 'all', got '0'."),
        (RUN, (*HARVESTED, "--context-length", "1"), "Invalid value for '--context-length': it "
         "should be greater than or equal to 2, got 1."),
        (RUN, (*HARVESTED, "--dtype", "int4"), "Invalid value for '--dtype': it should be "
         "'float16', 'float32' or 'int8', got 'int4'."),
        (RUN, (*HARVESTED, "--corpus", ""), "Invalid value for '--corpus': '' is not a path."),
        (RUN, ("--model", "gpt2"), "Name what to record: --layer 8, or --site mlp_out.8."),
        (RUN, ("--layer", "8"), "Missing option '--model'; it may also be a line `model: …` of "
         "--config."),
        (BUILD, (*BUILT, "--top", "1001"), "Invalid value for '--top': it should be less than or "
         "equal to 1000, got 1001."),
        (BUILD, (*BUILT, "--silent", "-1"), "Invalid value for '--silent': it should be greater "
         "than or equal to 0, got -1."),
        (BUILD, (*BUILT[:4], "--out", "s3://b/x"), "Invalid value for '--out': 's3://b/x' is an "
         "address; give a path on this machine."),
        (BUILD, BUILT[:4], "Missing option '--out'; it may also be a line `out: …` of --config."),
        (BUILD, ("--config", "none.yaml"), "There is no file none.yaml."),
    ],
)  # fmt: skip
def test_what_was_typed_is_refused_as_it_was_typed(
    asked: list[Any], command: click.Command, arguments: tuple[str, ...], sentence: str
) -> None:
    assert refusal(command, *arguments) == sentence
    assert asked == []


HARVEST_FILE = "model: gpt2\nsites: [resid_post.8]\n"
BUILD_FILE = "store: s\nsae: identity\nout: o\n"


@pytest.mark.parametrize(
    ("command", "file", "sentence"),
    [
        (RUN, HARVEST_FILE + "token: 9", "job.yaml has an unknown key 'token' (did you mean "
         "tokens?)."),
        (RUN, HARVEST_FILE + "split: a", "job.yaml has an unknown key 'split' (did you mean "
         "corpus.split?)."),
        (RUN, HARVEST_FILE + "corpus: {nmae: a}", "job.yaml has an unknown key 'corpus.nmae' (did "
         "you mean name?)."),
        (RUN, HARVEST_FILE + "corpus: {dataset_config: a}", "job.yaml has an unknown key "
         "'corpus.dataset_config' (did you mean corpus.config?)."),
        (RUN, HARVEST_FILE + "corpus: news", "job.yaml: corpus should be an object, got 'news'."),
        (RUN, HARVEST_FILE + "corpus: {split: ''}", "job.yaml: corpus.split should have at least 1 "
         "character, got ''."),
        (RUN, HARVEST_FILE + "tokens: x", "job.yaml: tokens should be a valid integer, or 'all', "
         "got 'x'."),
        (RUN, "model: gpt2\nsites: [1]\n", "job.yaml: sites.0 should be a valid string, got 1."),
        (RUN, "model: gpt2\nsites: []\n", "job.yaml: sites should have at least 1 item after "
         "validation, not 0."),
        (RUN, HARVEST_FILE + "seed: 1\nseed: 1", "job.yaml cannot be read as YAML: the key 'seed' "
         "is there twice in line 4."),
        (RUN, HARVEST_FILE + "corpus: {split: a, split: a}", "job.yaml cannot be read as YAML: the "
         "key 'split' is there twice in line 3."),
        (PLAN, HARVEST_FILE + "dtype: int4", "job.yaml: dtype should be 'float16', 'float32' or "
         "'int8', got 'int4'."),
        (BUILD, BUILD_FILE + "top: 4", "job.yaml has an unknown key 'top' (did you mean n_top?)."),
        (BUILD, BUILD_FILE + "n_top: 0", "job.yaml: n_top should be greater than or equal to 1, "
         "got 0."),
        (BUILD, BUILD_FILE + "silent: 4", "job.yaml has an unknown key 'silent' (did you mean "
         "n_inactive?)."),
        (BUILD, BUILD_FILE + "n_hard: yes", "job.yaml: n_hard should be a valid integer, got "
         "True."),
    ],
)  # fmt: skip
def test_what_is_in_the_file_is_refused_by_file_and_key(
    asked: list[Any], command: click.Command, file: str, sentence: str
) -> None:
    assert refusal(command, file=file + "\n") == sentence
    assert asked == []


def test_the_help_lists_every_option_once_under_its_heading() -> None:
    lines = CliRunner().invoke(BUILD, ["--help"], terminal_width=100).output.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options:", "Places:", "Contexts:", "Execution:"]
    listed = [line.split()[0] for line in lines if line.startswith("  --") and "--help" not in line]
    assert sorted(listed) == sorted({*FEATURES, *OWN["sae-features build"]})
    contexts = lines[lines.index("Contexts:") : lines.index("Execution:")]
    assert [line.split()[0] for line in contexts if line.startswith("  --")] == [
        "--top", "--decile", "--random", "--silent", "--window", "--seed",
    ]  # fmt: skip
    assert any("--window TOKENS" in line for line in contexts)
