"""Every command and all code of README, docs and --help, typed in the order of the page.

Each page is typed in a folder of its own. Pages of docs/ and the --help texts begin where
`make demo` has been typed. What differs from the page is in the tables of tests/typist.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import uvicorn
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sae_harvest.harvest.model.models
import sae_harvest.pipelines.demo
import sae_harvest.train.planning.measure
import sae_harvest.train.scaling.fits
from sae_harvest.harvest.model.models import ResolvedModel
from sae_harvest.harvest.text.corpus import NewsCorpus
from sae_harvest.harvest.text.documents import Document
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.train.scaling.fits import fit
from tests import typist
from tests.pages import PROGRAMS, ROOT, Block, blocks, commands, examples, spans, unfenced
from tests.s3_server import S3Server, s3_server, without_aws
from tests.typist import BATCH, MAINS, Typist

README = ROOT / "README.md"
EVERY = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if list(blocks(page))]
MODELS = ("gpt2", "my-model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A Llama of 13 layers of width 32, so that the pages' layers 3, 8 and 12 are there."""
    folder = tmp_path_factory.mktemp("model") / "small"
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(corpus_file)], vocab_size=400, special_tokens=["<|endoftext|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=13,
        num_attention_heads=4,
        max_position_embeddings=8192,
        eos_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def surroundings(corpus_file: Path, model: Path) -> Iterator[None]:
    """What the pages need beside a folder, small: a bucket, datasets of the hub, the demo."""
    build = datasets.load_dataset_builder

    def packaged(name: str, file: Path) -> ResolvedModel:
        return ResolvedModel(name, str(model), None, "directory")

    def local(name: str, config: str | None, revision: str | None) -> Any:
        return build("json", config or "default", data_files=str(corpus_file))

    class Server(S3Server):
        bucket = "bucket"

    with pytest.MonkeyPatch.context() as patch, s3_server(Server) as server:
        for name in set(os.environ) - set(without_aws(dict(os.environ))):
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setattr(datasets, "load_dataset_builder", local)
        patch.setattr(sae_harvest.harvest.model.models, "_from_gguf", packaged)
        patch.setattr(uvicorn.Server, "run", typist.serve_a_moment)
        small = {"shard_rows": 512}
        patch.setattr(
            sae_harvest.pipelines.demo,
            "HARVEST",
            sae_harvest.pipelines.demo.HARVEST.model_copy(update=small),
        )
        patch.setattr(sae_harvest.pipelines.demo, "EPOCHS", 1)
        small = {"n_latents": 256, "batch_rows": BATCH}
        patch.setattr(
            sae_harvest.pipelines.demo,
            "TRAIN",
            sae_harvest.pipelines.demo.TRAIN.model_copy(update=small),
        )
        patch.setattr(sae_harvest.pipelines.demo, "N_DOWNSTREAM_CONTEXTS", 4)
        contexts = FeatureConfig(n_top=4, n_random=2, n_decile=1, n_inactive=2, n_hard=2)
        patch.setattr(sae_harvest.pipelines.demo, "FEATURES", contexts)

        def few(found: tuple[Document, dict[str, int]]) -> bool:
            return found[1]["rows"] <= 300

        # the first articles, few draws, and rates that are measured once
        read = NewsCorpus._read
        patch.setattr(NewsCorpus, "_read", lambda *of: takewhile(few, read(*of)))
        patch.setattr(
            sae_harvest.train.scaling.fits,
            "fit",
            lambda law, losses, _, seed: fit(law, losses, 50, seed),
        )
        patch.setattr(
            sae_harvest.train.planning.measure,
            "measure_rates",
            cache(sae_harvest.train.planning.measure.measure_rates),
        )
        yield


def begin(folder: Path, model: Path, corpus_file: Path, demo: Path | None) -> Typist:
    """Somebody in an empty folder, but for models, texts and the project's own files."""
    for name in MODELS:
        shutil.copytree(model, folder / name)
    (folder / "texts").mkdir()
    (folder / "texts" / "stories.jsonl").symlink_to(corpus_file)
    return Typist(folder, demo)


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory, model: Path, corpus_file: Path, surroundings: None
) -> Path:
    """What `make demo` leaves."""
    folder = tmp_path_factory.mktemp("demo")
    begin(folder, model, corpus_file, None).command("make demo")
    return folder / "runs" / "demo"


@pytest.fixture
def somebody(tmp_path: Path, model: Path, corpus_file: Path, demo: Path) -> Typist:
    return begin(tmp_path, model, corpus_file, demo)


def test_readme(somebody: Typist) -> None:
    for block in blocks(README):
        somebody.block(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_after_the_demo(somebody: Typist, page: Path) -> None:
    somebody.command("make demo")
    for block in blocks(page):
        somebody.block(block)


def test_help_after_the_demo(somebody: Typist) -> None:
    """In the order of README's table of commands, which names them all; with its YAML files."""
    somebody.command("make demo")
    for block in blocks(README):
        if block.language == "yaml":
            somebody.block(block)
    for program, names in table_of_commands().items():
        main = MAINS[program]
        assert sorted(names) == sorted(main.commands)
        for command in (main, *(main.commands[name] for name in names)):
            shown = examples(command)
            assert shown, f"{program} {command.name} --help shows no example"
            for text in shown:
                somebody.command(text)


def table_of_commands() -> dict[str, list[str]]:
    """Program → its commands, as README's table has them."""
    rows = "".join(re.findall(r"^\|.*$", README.read_text(), re.MULTILINE))
    found = re.findall(rf"`({'|'.join(PROGRAMS)}) ([a-z ]+)`", rows)
    return {program: names.split() for program, names in found}


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.stem)
def test_nothing_to_type_stands_outside_of_a_block(page: Path) -> None:
    assert unfenced(page) == []


OF_BENCH = {"--who", "--recipe", "--seeds"}  # of bench.quality, in docs/comparison.md


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.stem)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        program, name, *_ = [*span.split(), "", ""]
        if program not in PROGRAMS and not program.startswith("--"):
            continue  # of another program, or no command
        known = [command for main in MAINS.values() for command in main.commands.values()]
        if program in PROGRAMS and name:
            known = [MAINS[program].commands[name]]
        parameters = [parameter for command in known for parameter in command.params]
        options = OF_BENCH | {"--help"}
        options |= {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span)) <= options, span


def test_a_command_that_cannot_be_run_fails(tmp_path: Path) -> None:
    somebody = Typist(tmp_path, None)
    for wrong in (
        Block("console", "$ harvest-all --store x", 1),
        Block("bash", "ls", 1),
        Block("console", "$ python -m bench.nothing", 1),
    ):
        with pytest.raises(pytest.fail.Exception):
            somebody.block(wrong)
    with pytest.raises(Exception, match="--sotre"):
        somebody.command("harvest show --sotre x")
    with pytest.raises(AssertionError):
        somebody.command("harvest show --store not-there")
    with pytest.raises(AssertionError):
        somebody.command("pip install '.[veiwer]'")


def test_commands_are_read_with_the_lines_that_continue_them() -> None:
    assert commands("$ a 'b\nc' \\\n   d  # e\n$ f") == ["a 'b\nc' \\\n   d  # e", "f"]
    command = SimpleNamespace(help="Does it.\n\n\b\nharvest a \\\n    --b\nharvest c\n")
    assert examples(command) == ["harvest a \\\n--b", "harvest c"]  # type: ignore[arg-type]
