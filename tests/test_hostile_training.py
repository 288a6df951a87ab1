"""Whatever is in the files that training reads ends in a value or in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_harvest.common.errors import RunError
from sae_harvest.common.yamlfile import MAX_BYTES, MAX_DEPTH, read_value, read_yaml
from sae_harvest.pipelines.recipe import read_recipe
from sae_harvest.train.config import SAEConfig, TrainConfig
from sae_harvest.train.run.checkpoint import load_checkpoint, save_checkpoint, saved_steps
from sae_harvest.train.run.folder import FAILED_FILE, failure_of, finished_evaluation
from sae_harvest.train.run.metrics import MetricsFile, last_metrics
from sae_harvest.train.run.status import read_status
from sae_harvest.train.sae.formats import format_named
from sae_harvest.train.sae.formats.pickles import read_pt, write_pt
from sae_harvest.train.sae.formats.reading import Origin
from sae_harvest.train.sae.sae import CONFIG_FILE, SAE, TENSORS_FILE
from sae_harvest.train.sae.sharded_sae import digest_of
from sae_harvest.train.scaling.points import read_sweep
from sae_harvest.train.sweeps.sweepfile import parse_sweep, read_sweep_file
from tests.hostile import RAW, VALUES, altered, damaged, json_text, outcome

quickly = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
pytestmark = pytest.mark.usefixtures("unflushed")
CONFIG = TrainConfig(n_latents=6, k=2, tokens=5000)
FIGURES = {"rows": 10, "fvu": 0.3, "l0": 2.0, "dead_share": 0.0}
EVALUATION = {"without_outliers": FIGURES, "with_outliers": FIGURES, "sae_digest": "d"}
RUN = {"format": 2, "site": "s", "store_digest": "d", "config": CONFIG.model_dump(mode="json")}
SWEEP = {"format": 2, "members": {"a": RUN["config"], "b": RUN["config"]}, "passes": [["a", "b"]]}
STATE = {
    "step": 3,
    "total_variance": 1.0,
    "loader": {"version": 1, "store_digest": "d", "seed": 0, "epoch": 0, "step": 3},
}


def small_sae() -> SAE:
    config = SAEConfig(d_in=4, n_latents=6, k=2, site="resid_post.1")
    return SAE(config, torch.ones(6, 4), torch.ones(6, 4), torch.zeros(6), torch.zeros(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an SAE and one checkpoint."""
    out = tmp_path_factory.mktemp("hostile") / "run"
    small_sae().save(out)
    save_checkpoint(out, 3, small_sae(), {"last_fired": torch.zeros(6).long()}, STATE)
    return out


@pytest.fixture
def kept(folder: Path) -> Iterator[Path]:
    """The folder, whose files are as they were afterwards."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield folder
    for path in list(folder.rglob("*")):
        if path.is_file() and path not in before:
            path.unlink()
    for path, data in before.items():
        path.write_bytes(data)


# YAML

BOMB = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB, MERGES, "&a [*a]", "&a {x: *a}", "[" * 20_000, "{a: " * 20_000, "- " * 20_000,
        "k: " + "1" * 5000, "k: 1e999", "k: -1e999", "k: !!timestamp x", "k: !!int x",
        "k: !!python/object/apply:os.system [ls]", "k: !!set {a}", "? [a, b]\n: c", "? {a: b}\n: c",
        'k: "\\ud800"', 'k: "\\0"', "k: \ud800", "k: *nothing", "<<: 3", "k: 1\nk: 2",
    ],
)  # fmt: skip
def test_yaml_beyond_the_limits_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    for read in (lambda: read_value(text), lambda: read_yaml(path)):
        with pytest.raises(click.UsageError):
            read()
        assert outcome(read) is None
    assert outcome(lambda: read_sweep_file(path, {})) is None
    assert outcome(lambda: read_recipe(str(path), {})) is None


def test_a_settings_file_larger_than_the_limit_is_refused_before_it_is_parsed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"k: 1 " + b" " * MAX_BYTES)
    with pytest.raises(click.UsageError, match="more than 1,048,576 bytes"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1_000", 1000), ("-.5", -0.5), ("010", 10), ("0x10", "0x10"),
        ("1:30", "1:30"), ("2001-13-45", "2001-13-45"), ("yes", True), ("~", None), ("=", "="),
        ("[&a {k: 1}, *a]", [{"k": 1}, {"k": 1}]), ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
    ],
)  # fmt: skip
def test_plain_yaml_is_read(text: str, value: Any) -> None:
    found = read_value(text)
    assert found == value or value is None


@quickly
@given(st.text(alphabet="&*!<>[]{}:,-?|'\"#%@` \n\tab10.e_\\x", max_size=60) | st.text())
def test_any_yaml_text_is_a_value_or_one_sentence(text: str) -> None:
    outcome(lambda: read_value(text))


SWEEP_FILE = {
    "store": "s", "out": "o", "tokens": 5000, "k": 2, "rule": {"split": "train"},
    "grid": {"n_latents": [8, 16], "lr": [0.1, None]}, "runs": [{"k": 4, "name": "four"}],
}  # fmt: skip


@quickly
@given(altered(SWEEP_FILE))
def test_any_content_of_a_sweep_file_is_a_sweep_or_one_sentence(content: Any) -> None:
    if isinstance(content, dict) and all(isinstance(key, str) for key in content):
        sweep = outcome(lambda: parse_sweep(content, "sweep.yaml", {}))
        for name in sweep.members if sweep else ():
            assert "/" not in name
            assert name not in (".", "..", "sweep.json")
            assert len(name.encode()) <= 120


def test_a_grid_of_a_billion_members_is_refused_at_once() -> None:
    grid = {name: list(range(1, 1001)) for name in ("n_latents", "k", "seed")}
    with pytest.raises(click.UsageError, match="more than 10,000 members"):
        parse_sweep({**SWEEP_FILE, "grid": grid}, "sweep.yaml", {})


@pytest.mark.parametrize("key", [".".join("a" * 30), "." * 60_000, "harvest", "layers", ""])
def test_any_key_of_a_recipe_is_a_value_or_one_sentence(key: str) -> None:
    assert outcome(lambda: read_recipe("gpt2-small", {key: {"a": [-1]}})) is None


# records of a run


@quickly
@given(st.one_of(altered(json.loads(small_sae().config.model_dump_json())).map(json_text), RAW))
def test_any_configuration_of_an_sae_is_one_or_one_sentence(kept: Path, data: bytes) -> None:
    (kept / CONFIG_FILE).write_bytes(data)
    outcome(lambda: SAE.load(kept))
    outcome(lambda: digest_of(kept))


@quickly
@given(st.data())
def test_any_bytes_for_weights_are_an_sae_or_one_sentence(kept: Path, data: st.DataObject) -> None:
    whole = (kept / TENSORS_FILE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    try:
        if data.draw(st.booleans()):
            (kept / TENSORS_FILE).write_bytes(data.draw(damaged(whole)))
        else:
            text = json_text(data.draw(altered(header)))
            written = len(text).to_bytes(8, "little") + text + whole[8 + length :]
            (kept / TENSORS_FILE).write_bytes(written)
        sae = outcome(lambda: SAE.load(kept))
        outcome(lambda: digest_of(kept))
        for tensor in sae.tensors().values() if sae else ():
            assert bool(tensor.isfinite().all())
    finally:
        (kept / TENSORS_FILE).write_bytes(whole)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, number: float) -> None:
    sae = small_sae()
    sae.W_dec[3, 1] = number
    sae.save(tmp_path)
    with pytest.raises(RunError, match="numbers in W_dec that are not finite"):
        SAE.load(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    small_sae().save(tmp_path)
    (tmp_path / TENSORS_FILE).unlink()
    (tmp_path / TENSORS_FILE).mkdir()
    with pytest.raises(RunError, match=TENSORS_FILE):
        SAE.load(tmp_path)


@quickly
@given(st.data())
def test_any_state_of_a_checkpoint_is_read_or_one_sentence(kept: Path, data: st.DataObject) -> None:
    path = kept / "checkpoints" / "000003" / "state.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(altered(json.loads(whole)).map(json_text) | RAW))
        outcome(lambda: load_checkpoint(kept, 3, "cpu"))
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["٣٣٣٣٣٣", "3", "0000003", "9" * 400, "000004.tmp", "-00003"])
def test_folders_that_are_no_checkpoints_are_passed_over(kept: Path, name: str) -> None:
    if len(name) < 256:
        (kept / "checkpoints" / name).mkdir(exist_ok=True)
    assert saved_steps(kept) == [3]


LINE = {"step": 1, "tokens": 64, "fvu": 0.5, "l0": 2.0, "dead_share": 0.0}


@quickly
@given(st.lists(altered(LINE).map(json_text) | RAW, max_size=3))
def test_any_lines_of_metrics_are_read_or_one_sentence(kept: Path, lines: list[bytes]) -> None:
    path = kept / "metrics.jsonl"
    path.write_bytes(b"\n".join([json_text(LINE), *lines, b""]))
    assert last_metrics(path).get("step", 0) >= 0  # the tail alone is read
    outcome(lambda: MetricsFile(path, 1).__exit__(None, None, None))


@quickly
@given(st.data())
def test_any_records_of_runs_have_a_status_or_one_sentence(kept: Path, data: st.DataObject) -> None:
    records = {
        "run.json": RUN,
        "sweep.json": SWEEP,
        "evaluation.json": EVALUATION,
        FAILED_FILE: {"step": 1, "sentence": "It diverged."},
    }
    names = data.draw(st.sets(st.sampled_from(sorted(records)), min_size=1))
    for name in records:
        (kept / name).unlink(missing_ok=True)
    for name in names:
        value = records[name]
        (kept / name).write_bytes(data.draw(altered(value).map(json_text) | RAW))
    for run in outcome(lambda: read_status(kept)) or ():
        assert run.state in ("finished", "failed", "running", "unfinished")
        assert ".." not in run.name
    outcome(lambda: finished_evaluation(kept))
    outcome(lambda: failure_of(kept))
    outcome(lambda: read_sweep(kept.parent))


# formats of other packages


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peer") / "dl"
    format_named("dictionary_learning").write(small_sae(), path)
    return path


@quickly
@given(st.data())
def test_any_pt_file_is_read_or_one_sentence(peer: Path, data: st.DataObject) -> None:
    whole = (peer / "ae.pt").read_bytes()
    path = peer.with_name("damaged.pt")
    path.write_bytes(data.draw(damaged(whole) | RAW))
    outcome(lambda: read_pt(path))


@quickly
@given(st.data())
def test_any_content_of_another_packages_files_is_an_sae_or_one_sentence(
    peer: Path, data: st.DataObject
) -> None:
    other = peer.with_name("other")
    other.mkdir(exist_ok=True)
    config = json.loads((peer / "config.json").read_text())
    (other / "config.json").write_bytes(json_text(data.draw(altered(config))))
    state: dict[Any, Any] = read_pt(peer / "ae.pt")
    for name in data.draw(st.sets(st.sampled_from(sorted(state)))):
        state[name] = data.draw(
            st.sampled_from(
                [
                    None, "text", {"k": 3}, torch.zeros(1).expand(10**9, 4), torch.zeros(()),
                    torch.ones(6, 4).to_sparse(), torch.zeros(6, 4, device="meta"),
                    torch.full((6, 4), float("nan")), torch.zeros(6, dtype=torch.complex64),
                ]
            )
        )  # fmt: skip
    write_pt(other / "ae.pt", state)
    read = format_named("dictionary_learning").read
    outcome(lambda: read(other, Origin("resid_post.1")))


@quickly
@given(VALUES, VALUES)
def test_any_openai_file_is_an_sae_or_one_sentence(peer: Path, name: Any, state: Any) -> None:
    path = peer.with_name("openai.pt")
    write_pt(path, {"activation": name, "activation_state_dict": state, "pre_bias": 3})
    outcome(lambda: format_named("openai").read(path, Origin("resid_post.1")))
    write_pt(
        path, {"activation": "TopK", "activation_state_dict": {"k": name, "postact_fn": state}}
    )
    outcome(lambda: format_named("openai").read(path, Origin("resid_post.1")))


SAELENS = {
    "architecture": "topk", "d_in": 4, "d_sae": 6, "k": 2, "apply_b_dec_to_input": True,
    "normalize_activations": "none", "metadata": {"sae_lens_version": "6.54.12"},
    "scaling_factor": 2,
}  # fmt: skip


@quickly
@given(altered(SAELENS))
def test_any_settings_of_saelens_are_an_sae_or_one_sentence(peer: Path, content: Any) -> None:
    path = peer.with_name("saelens")
    if not path.exists():
        format_named("saelens").write(small_sae(), path)
    for name in ("cfg.json", "activation_scaler.json"):
        (path / name).write_bytes(json_text(content))
    outcome(lambda: format_named("saelens").read(path, Origin("resid_post.1")))
