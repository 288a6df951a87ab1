"""An interrupted harvest stops between two blocks of the model, and loses little."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from sae_harvest.harvest.commands.cli import main
from sae_harvest.harvest.run import driver as run
from sae_harvest.harvest.run.prefetch import Ahead
from sae_harvest.harvest.run.prepare import default_shard_rows
from sae_harvest.harvest.run.progress import interruption_note
from sae_harvest.harvest.run.worker import ShardWorker, Stopped
from sae_harvest.harvest.text.corpus import CorpusSpec, open_corpus
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.writer import read_plan
from tests.commands import invoke, options
from tests.shards import SITES, local_model, make_inputs, make_plan
from tests.synthetic import make_plan as synthetic_plan
from tests.synthetic import make_store


def test_a_stopped_worker_ends_before_the_next_block(model_folder: Path) -> None:
    model = local_model(model_folder)
    worker = ShardWorker(model, SITES, "float32", "cpu", threads=None)
    worker.widths()
    ran: list[int] = []

    def stop_after(layer: int) -> None:
        ran.append(layer)
        worker.stop()

    for layer, block in enumerate(worker._tap._model.transformer.h):
        block.register_forward_hook(lambda *_, layer=layer: stop_after(layer))
    with pytest.raises(Stopped):
        worker.activations(make_plan(model), make_inputs(1)[0].tokens)
    assert ran == [0]


def test_a_corpus_ends_at_the_next_document_once_it_is_not_wanted(corpus_file: Path) -> None:
    corpus = open_corpus(CorpusSpec(name=str(corpus_file)))
    making = threading.Event()

    def documents() -> Iterator[int]:
        for number, _ in enumerate(corpus.documents()):
            making.set()
            while number == 5 and not corpus._stopped:
                time.sleep(0.01)
        yield number  # made of the whole corpus, as a window of contexts is

    with closing(Ahead(documents(), corpus.stop)) as ahead:
        assert making.wait(10)
        assert not ahead.ready(wait=False)
    assert not ahead._thread.is_alive()
    assert len(list(open_corpus(CorpusSpec(name=str(corpus_file))).documents())) == 200


@pytest.mark.parametrize(
    ("config", "last_layer", "rows"),
    [
        (LlamaConfig(hidden_size=576, intermediate_size=1536), 12, 16_384),  # SmolLM2-135M
        (GPT2Config(), 8, 16_384),
        (LlamaConfig(hidden_size=2048, intermediate_size=5632), 21, 4096),  # TinyLlama
        (GPT2Config(n_embd=32), 1, 65_536),
    ],
)
def test_shards_are_about_half_a_minute_on_a_cpu(
    config: PreTrainedConfig, last_layer: int, rows: int
) -> None:
    assert default_shard_rows(config, last_layer, "cpu") == rows
    assert default_shard_rows(config, last_layer, "cuda") == 65_536


def test_a_store_goes_on_with_the_shards_it_has(
    model_folder: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(model_folder, corpus_file, tmp_path / "store", shard_rows=None)
    assert invoke(*arguments).exit_code == 0
    assert read_plan(LocalObjects(tmp_path / "store")).shard_rows == 4096
    monkeypatch.setattr("sae_harvest.harvest.run.prepare.default_shard_rows", lambda *_: 1024)
    result = invoke(*arguments)
    assert "0 of them now" in result.stdout, result.output


def test_an_interrupted_harvest_counts_what_is_kept(tmp_path: Path) -> None:
    assert (
        interruption_note(tmp_path)
        == f"0 shards committed in {tmp_path}; the same command continues."
    )
    make_store(tmp_path / "store", synthetic_plan())
    n = len(list((tmp_path / "store" / "commits").iterdir()))
    assert interruption_note(tmp_path / "store").startswith(
        f"{n} shards committed in {tmp_path / 'store'}; "
    )


def test_an_interrupted_command_ends_with_130(
    tmp_path: Path, model_folder: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run._Work, "run", interrupted)
    arguments = options(model_folder, corpus_file, tmp_path / "store")
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 130
    assert result.stderr == (
        f"Interrupted. 0 shards committed in {tmp_path / 'store'}; the same command continues.\n"
    )
