"""One fixture model, one fixture corpus, one fixture store; everything small and real."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import settings

from sae_harvest.common.locks import lock
from sae_harvest.harvest.text import corpus

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray gives its workers the lowest priority but four; beside busy tests they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")

# The same cases every time: a failure belongs to the change that is tested.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

# `make test-fast`: what a file or a test names if it needs a model, Ray, a server or a browser.
SLOW_WORDS = re.compile(
    r"\b(transformers|ray|forked|processes|small_models|steer_cases|families|hand_blocks|triton"
    r"|s3_server|viewer_fixtures|viewer_cases|LiveModel|subprocess|tests\.commands)\b"
)
SLOW_FIXTURES = {"model_folder", "tiny_store", "folders"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only what needs no model, Ray, server or browser"
    )


# Files of tests are in memory where there is room: most tests write many small ones, for which a
# disk needs ten times the processor time, and every fsync waits for it.
MEMORY_DISK = Path("/dev/shm")
FREE_BYTES = 8 << 30


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or config.option.basetemp is not None:
        return
    if not MEMORY_DISK.is_dir() or shutil.disk_usage(MEMORY_DISK).free < FREE_BYTES:
        return
    for left in MEMORY_DISK.glob("sae-harvest-tests-*"):  # of a run that was killed
        if not Path("/proc", left.name.rpartition("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    config.option.basetemp = str(MEMORY_DISK / f"sae-harvest-tests-{os.getpid()}")


def pytest_unconfigure(config: pytest.Config) -> None:
    base = str(config.option.basetemp)
    if not hasattr(config, "workerinput") and base.startswith(f"{MEMORY_DISK}/sae-harvest-tests-"):
        shutil.rmtree(base, ignore_errors=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --fast, files that name what is slow are not even imported."""
    is_test = config.getoption("--fast") and collection_path.name.startswith("test_")
    return True if is_test and SLOW_WORDS.search(collection_path.read_text()) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --fast, tests that are marked slow or use a model are left out."""
    if not config.getoption("--fast"):
        return
    slow = {
        item
        for item in items
        if item.get_closest_marker("slow") or SLOW_FIXTURES & set(getattr(item, "fixturenames", ()))
    }
    config.hook.pytest_deselected(items=[item for item in items if item in slow])
    items[:] = [item for item in items if item not in slow]


N_LAYERS = 3
WIDTH = 32
CONTEXT_LENGTH = 32

SUBJECTS = ["the cat", "a senator", "our team", "the bank", "this river", "my neighbour"]
VERBS = ["sees", "crossed", "announced", "follows", "did not want", "will repair"]
OBJECTS = ["the bridge", "a new law", "three goals", "café menus", "the red house", "東京"]


# Processes that run tests side by side ignore Ctrl-C, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of the processes that run tests side by side makes, for all to read."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, made = root / name, root / f"{name}.made"
    with lock(root / f"{name}.lock", wait=True):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed or was killed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents of a few sentences, as JSONL with id, title, url and text."""
    return made_once(tmp_path_factory, "corpus", make_corpus) / "stories.jsonl"


def make_corpus(folder: Path) -> None:
    rng = random.Random(0)
    with (folder / "stories.jsonl").open("w") as file:
        for number in range(200):
            sentences = [
                f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {number}."
                for _ in range(rng.randint(3, 30))
            ]
            row = {
                "id": f"story-{number}",
                "title": f"Story {number}",
                "url": f"https://example.org/{number}",
                "text": " ".join(sentences),
            }
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A 3-layer GPT-2 of width 32 with a byte-level BPE tokenizer, saved as users save theirs."""

    def make(folder: Path) -> None:
        make_model(folder / "tiny-gpt2", corpus_file)

    return made_once(tmp_path_factory, "model", make) / "tiny-gpt2"


def make_model(folder: Path, corpus_file: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400,
        n_positions=64,
        n_embd=WIDTH,
        n_layer=N_LAYERS,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_store(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> Path:
    """A sealed store of 8 shards of 1,024 rows: resid_post.1, width 32, float16."""
    from sae_harvest.harvest.run.config import HarvestConfig
    from sae_harvest.harvest.run.driver import Execution, run
    from sae_harvest.harvest.text.corpus import CorpusSpec

    config = HarvestConfig(
        model=str(model_folder),
        corpus=CorpusSpec(name=str(corpus_file)),
        sites=("resid_post.1",),
        tokens=8 * 1024,
        context_length=CONTEXT_LENGTH,
        shard_rows=1024,
        compute_dtype="float32",
    )

    def make(folder: Path) -> None:
        run(config, folder / "store", Execution(workers=0, device="cpu"))

    return made_once(tmp_path_factory, "store", make) / "store"


@pytest.fixture(scope="session")
def folders(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(store, sae, features): tables of a random dictionary with one latent that never fires."""
    from sae_harvest.pipelines.features.building.build import build
    from tests.feature_cases import BUILD_CONFIG, save_sae

    def make(folder: Path) -> None:
        build(tiny_store, save_sae(tiny_store, folder / "sae"), folder / "features", BUILD_CONFIG)

    folder = made_once(tmp_path_factory, "features", make)
    return tiny_store, folder / "sae", folder / "features"


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: for tests that write much and pull no plug."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class InTurn(Executor):
    """Does everything at once, so that the n-th call on the disk is always the same one."""

    def __init__(self, max_workers: int) -> None:
        pass

    def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are written and verified without threads: for tests that write thousands."""
    monkeypatch.setattr("sae_harvest.store.writer.ThreadPoolExecutor", InTurn)
    monkeypatch.setattr("sae_harvest.store.maintenance.verify.ThreadPoolExecutor", InTurn)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as anything looks up or connects to a host."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError(f"the network was touched: {args[:2]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_hub(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `no_network`, and no corpus is looked for on the hub."""

    def refuse(*args: Any) -> NoReturn:
        raise AssertionError("the corpus was looked for on the hub")

    monkeypatch.setattr(corpus, "HubCorpus", refuse)
