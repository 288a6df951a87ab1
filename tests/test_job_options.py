"""Options, YAML keys and the configuration are three spellings of one thing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from sae_harvest.common.settings import config_file_option, options_for, settings_of
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.options import DEFAULTS, Places, RunSettings

PLACE = ("--store", "/s", "--out", "/o")
FILE = "store: /s\nout: /o\n"


@click.command()
@config_file_option
@options_for(settings_of(Places))
@options_for(settings_of(TrainConfig), DEFAULTS)
@click.pass_context
def command(context: click.Context, file: Path | None, **given: Any) -> None:
    settings = RunSettings.of(context, file)
    context.obj.append((settings.places(), settings.config()))


def invoke(*arguments: str, file: str | None = None) -> tuple[Result, list[Any]]:
    found: list[Any] = []
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        if file is not None:
            Path("job.yaml").write_text(file)
            arguments = ("--config", "job.yaml", *arguments)
        return CliRunner().invoke(command, list(arguments), obj=found), found


def settings(*arguments: str, file: str | None = None) -> tuple[Places, TrainConfig]:
    result, found = invoke(*arguments, file=file)
    assert result.exit_code == 0, result.output
    return found[0]


def refusal(*arguments: str, file: str | None = None) -> str:
    result, _ = invoke(*arguments, file=file)
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def test_options_and_a_file_say_the_same() -> None:
    typed = (
        *("--n-latents", "64", "--k", "4", "--tokens", "10000", "--lr", "1e-3", "--seed", "7"),
        *("--matryoshka", "16, 64", "--ema-decay", "none", "--normalization", "none"),
        *("--max-norm-medians", "none", "--heldout-fraction", "0.1", "--site", "resid_post.3"),
    )
    written = """
site: resid_post.3
n_latents: 64
k: 4
tokens: 10_000
lr: 1e-3
seed: 7
matryoshka: [16, 64]
ema_decay: null
normalization: none
rule:
  max_norm_medians: null
  heldout_fraction: 0.1
"""
    expected = TrainConfig(
        n_latents=64,
        k=4,
        tokens=10_000,
        lr=1e-3,
        seed=7,
        matryoshka=(16, 64),
        ema_decay=None,
        normalization="none",
        rule=RowRule(max_norm_medians=None, heldout_fraction=0.1),
    )
    places = Places(store="/s", out="/o", site="resid_post.3")
    assert settings(*PLACE, *typed) == settings(file=FILE + written) == (places, expected)


def test_options_win_over_the_file() -> None:
    file = FILE + "k: 4\nn_latents: 64\nrule: {heldout_fraction: 0.1, split: all}\n"
    places, config = settings("--k", "5", "--out", "/p", "--split", "train", file=file)
    assert (places.store, places.out) == ("/s", "/p")
    assert (config.k, config.n_latents) == (5, 64)
    assert config.rule == RowRule(heldout_fraction=0.1, split="train")


def test_k_has_a_default_where_there_is_a_k() -> None:
    assert settings(*PLACE)[1] == TrainConfig(n_latents=8192, k=32, tokens=10_000_000)
    assert settings(*PLACE, "--activation", "gated")[1].k is None


def test_help_comes_from_the_configuration() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for setting in RunSettings.settings():
        assert setting.spelling in text
        assert setting.field.description
    assert "--lr NUMBER|none Learning rate of Adam;" in text
    assert "[at least 1, default: 4096]" in text
    assert "[topk|batchtopk|jumprelu|relu_l1|relu_kl|gated]" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--k", "x"), "Invalid value for '--k': it should be a valid integer"),
        (("--k", "0"), "Invalid value for '--k': it should be greater than or equal to 1, got '0'"),
        (("--lr", "2"), "Invalid value for '--lr': it should be less than or equal to 1"),
        (("--split", "q"), "Invalid value for '--split': it should be 'train', 'heldout' or 'all'"),
        (("--matryoshka", "4,a"), "Invalid value for '--matryoshka': it should be a valid integer"),
        (("--out", "o"), "Missing option '--store'; it may also be a line `store: …` of --config."),
        (("--k", "9", "--n-latents", "8"), "--k must be at most --n-latents, got 9 > 8."),
        (("--tokens", "5"), "--tokens must be at least --batch-rows, got 5 < 4096."),
        (
            ("--activation", "gated", "--k", "3"),
            "--k is only for topk, batchtopk, jumprelu, ",
        ),
    ],
)
def test_what_was_typed_is_refused_as_it_was_typed(
    arguments: tuple[str, ...], sentence: str
) -> None:
    places = () if "--out" in arguments else PLACE
    assert refusal(*places, *arguments).startswith(sentence)


@pytest.mark.parametrize("number", ["inf", "nan", "1e308", "-1", "9" * 400])
@pytest.mark.parametrize("option", ["l1", "auxk-alpha", "clip-norm", "adam-eps", "tokens", "seed"])
def test_a_number_that_no_computation_can_hold_is_refused(option: str, number: str) -> None:
    message = refusal(*PLACE, f"--{option}", number)
    assert message.startswith(f"Invalid value for '--{option}': it should be ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("spelling", ["2000000", "2_000_000", "2e6", "2M"])
def test_a_count_may_be_spelled_as_people_do(spelling: str) -> None:
    assert settings(*PLACE, "--tokens", spelling)[1].tokens == 2_000_000
    file = FILE + f"tokens: {spelling}\nmatryoshka: [4k, 8192]\n"
    config = settings(file=file)[1]
    assert (config.tokens, config.matryoshka) == (2_000_000, (4000, 8192))


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("nlatents: 8", "has an unknown key 'nlatents' (did you mean n_latents?)."),
        ("rule: {slit: all}", "has an unknown key 'rule.slit' (did you mean split?)."),
        ("xyzzy: 1", "has an unknown key 'xyzzy'; expected some of store, out, site"),
        ("k: nine", ": k should be a valid integer, got 'nine'."),
        ("k: 2.5", ": k should be a valid integer, got 2.5."),
        ("k: yes", ": k should be a valid integer, got True."),
        ("k: [9]", ": k should be a valid integer."),
        ("rule: 3", ": rule should be an object, got 3."),
        ("device: gpu", ": device should be 'auto', 'cpu' or 'cuda', got 'gpu'."),
        ("rule: {heldout_fraction: -1}", ": rule.heldout_fraction should be greater than or equal"),
        ("k: 9\nk: 8", "cannot be read as YAML: the key 'k' is there twice in line 4."),
        ("[1", "cannot be read as YAML: "),
        ("matryoshka: [4, 9]", ": matryoshka must grow from at least 1 to --n-latents 8192,"),
    ],
)
def test_what_is_in_the_file_is_refused_by_file_and_key(file: str, sentence: str) -> None:
    message = refusal(file=FILE + file + "\n")
    assert message.startswith("job.yaml")
    assert message.removeprefix("job.yaml").lstrip().startswith(sentence), message


def test_fields_of_both_are_each_spelled_as_they_were_given() -> None:
    message = refusal("--k", "9", file=FILE + "n_latents: 8\n")
    assert message == "job.yaml: --k must be at most n_latents, got 9 > 8."


@pytest.mark.parametrize("text", ["hello", "- 1", "1: 2"])
def test_a_file_that_is_no_mapping_is_refused(text: str) -> None:
    assert "job.yaml should hold lines like `k: 32`" in refusal(file=text)


def test_a_file_that_is_not_there_is_refused() -> None:
    assert refusal("--config", "none.yaml") == "There is no file none.yaml."
