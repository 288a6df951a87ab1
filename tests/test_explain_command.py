"""`sae-features explain` with a local model and with a server: the same, and killed halfway."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
import torch
from click.testing import CliRunner
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_harvest.pipelines.features.commands.cli import main
from tests.completion_server import KEY, CompletionServer, serving

VOCABULARY = 400
# The server takes the most likely token always; only the first candidate does so here.
SIZES = ["--candidates", "1", "--shown", "2", "--contrast", "1", "--scored", "1"]
TWO, ONE = ("--latents", "0:2"), ("--latents", "1")


@pytest.fixture(scope="module")
def explainer(tmp_path_factory, corpus_file: Path) -> Path:
    """A Llama of one small layer that reads long prompts; Yes and No are tokens."""
    folder = tmp_path_factory.mktemp("explainer") / "small"
    answers = folder.parent / "answers.txt"
    answers.write_text("(Yes) (No)\n" * 5000)
    bpe = ByteLevelBPETokenizer()
    bpe.train(
        [str(corpus_file), str(answers)], vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        eos_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def server(explainer: Path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(explainer) as server:
        yield server


def tables_of(folders, root: Path) -> Path:
    """A copy of the tables beside their store and SAE."""
    _, _, features = folders
    root.mkdir()
    shutil.copytree(features, root / "features")
    return root / "features"


def typed(features: Path, folders, *options: str) -> list[str]:
    store, _, _ = folders
    return [
        "explain",
        "--features",
        str(features),
        "--store",
        str(store),
        *SIZES,
        *options,
    ]


def endpoint(server: CompletionServer) -> list[str]:
    return ["--endpoint", server.url, "--model", "small", "--top-logprobs", str(VOCABULARY)]


def explained(features: Path) -> list[tuple]:
    return duckdb.execute(
        f"SELECT latent, explanation, chosen FROM '{features / 'explanations.parquet'}'"
    ).fetchall()


def scores(features: Path) -> dict[tuple, float | None]:
    rows = duckdb.execute(
        "SELECT latent, subject, task, part, metric, value, failed "
        f"FROM '{features / 'scores.parquet'}'"
    ).fetchall()
    assert all(row[6] == 0 for row in rows)
    return {row[:5]: row[5] for row in rows}


def run(words: list[str]) -> str:
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_server_and_this_process_give_the_same_explanations_and_scores(
    folders, explainer, server, tmp_path
):
    here, there = (tables_of(folders, tmp_path / name) for name in ("here", "there"))
    said = run(typed(here, folders, *TWO, "--model", str(explainer), "--device", "cpu"))
    assert "2 latents have an explanation" in said
    assert "failed" not in run(typed(there, folders, *TWO, *endpoint(server)))
    assert explained(here) == explained(there)
    ours, theirs = scores(here), scores(there)
    assert len(ours) > 50
    assert ours == pytest.approx(theirs, abs=1e-6, nan_ok=True)
    assert server.bodies
    again = run(typed(there, folders, *TWO, *endpoint(server)))
    assert "0 requests were sent" in again
    assert KEY not in again
    for path in (tmp_path / "there").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_a_killed_run_continues_without_asking_again(folders, server, tmp_path):
    features = tables_of(folders, tmp_path / "killed")
    words = typed(features, folders, *ONE, *endpoint(server), "--concurrency", "1")
    command = [sys.executable, "-m", "sae_harvest", "sae-features", *words]
    answered = 6
    server.faults, server.stays = [""] * answered, "stall"
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(answered + 1):  # the last one hangs
        assert server.arrived.acquire(timeout=300)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.stays = ""
    assert not (features / "scores.parquet").exists()
    said = run(words)
    assert f"{answered} answered from the cache" in said
    repeated = [prompt for prompt, times in server.asked().items() if times > 1]
    assert len(repeated) <= 1  # the one under way
    fresh = tables_of(folders, tmp_path / "fresh")
    run(typed(fresh, folders, *ONE, *endpoint(server)))
    assert scores(fresh) == pytest.approx(scores(features), abs=1e-9, nan_ok=True)


def test_a_dry_run_asks_nothing_and_prints_tokens_and_cost(folders, server, tmp_path):
    features = tables_of(folders, tmp_path / "dry")
    said = run(typed(features, folders, *TWO, *endpoint(server), "--dry-run", "--prices", "2,4"))
    assert "2 generations" in said
    assert "At these prices" in said
    assert not server.bodies
    assert not (features / "explanations.parquet").exists()
    assert not (features / "answers.sqlite").exists()


def test_an_endpoint_without_log_probabilities_is_asked_in_words(folders, server, tmp_path):
    """A model of random weights gives no number, so every answer in words is a failure."""
    features = tables_of(folders, tmp_path / "words")
    words = typed(features, folders, *ONE, *endpoint(server), "--api", "chat")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert all("prompt" not in body for body in server.bodies)
    [(answered, every)] = duckdb.execute(
        "SELECT count(*) FILTER (failure IS NULL), count(*) "
        f"FROM '{features / 'questions.parquet'}'"
    ).fetchall()
    assert answered == 0
    assert every > 0
    values = duckdb.execute(
        f"SELECT count(value) FROM '{features / 'scores.parquet'}' WHERE subject = 'explanation'"
    ).fetchall()[0][0]
    assert values == 0
