"""The report: every part is measured once, survives a kill, and says what it was measured on."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution
from sae_harvest.harvest.run.driver import run as run_harvest
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.evaluate import cli
from sae_harvest.pipelines.evaluate.compute_equivalent import ComputeTable
from sae_harvest.pipelines.evaluate.figures import Figure
from sae_harvest.pipelines.evaluate.report import of_model, of_probes, of_rows
from sae_harvest.pipelines.evaluate.report.definitions import DEFINITIONS, SECTIONS
from sae_harvest.pipelines.evaluate.report.measure import Evaluation
from sae_harvest.pipelines.evaluate.report.page import page
from sae_harvest.pipelines.evaluate.report.parts import Part
from sae_harvest.pipelines.evaluate.report.svg import Axis, Series, plot
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.synthetic.config import SyntheticConfig
from sae_harvest.train.synthetic.store import make
from tests.dictionaries import random_sae

RULE = RowRule(heldout_fraction=0.4)


@pytest.fixture(scope="module")
def place(tiny_store):
    return str(tiny_store)


@pytest.fixture(scope="module")
def saes(place, tmp_path_factory):
    store = ActivationStore.open(place)
    folder = tmp_path_factory.mktemp("saes")
    random_sae(store, 64, 4, RULE).save(folder / "a")
    random_sae(store, 96, 8, RULE, seed=1).save(folder / "b")
    return folder


def evaluate(*arguments):
    return CliRunner().invoke(cli.main, ["eval", *map(str, arguments)], catch_exceptions=False)


def run(place, folders, report, *more):
    given = [word for folder in folders for word in ("--sae", folder)]
    options = ["--rows", 600, "--contexts", 4, "--ablated-rows", 2, "--device", "cpu"]
    probes = [] if "--probes" in more else ["--no-probes"]
    return evaluate(*given, "--store", place, "--report", report, *options, *probes, *more)


class Balance(HTMLParser):
    """Notes open elements; those that HTML closes by itself are left out."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "line", "circle", "polyline"):
            assert self.open.pop() == tag


def test_a_report_has_every_metric_with_baselines_and_intervals(place, saes, tmp_path):
    done = run(place, [saes / "a", saes / "b"], tmp_path / "r", "--compute-table", "gpt2-124m")
    assert done.exit_code == 0, done.output

    def query(sql):
        path = tmp_path / "r" / "metrics.parquet"
        return duckdb.execute(sql.replace("FROM t", f"FROM '{path}'")).fetchall()

    [rows] = query("SELECT count(*), count(DISTINCT sae), min(command) FROM t")
    assert rows[0] > 200
    assert rows[1] == 2
    assert rows[2].startswith("train-sae")
    subjects = query("SELECT DISTINCT subject FROM t WHERE metric = 'fvu' ORDER BY subject")
    assert [name for (name,) in subjects] == [
        "PCA", "SAE", "channels", "mean", "random", "shuffled decoder",
    ]  # fmt: skip
    [(value, low, high, definition)] = query(
        "SELECT value, low, high, definition FROM t WHERE metric = 'delta_ce' AND subject = 'SAE' "
        "AND sae LIKE '%a'"
    )
    assert low < value < high
    assert definition == DEFINITIONS["delta_ce"].meaning
    elsewhere = "Recovery of known features"  # on synthetic stores only
    sections = {name: metrics for name, metrics in SECTIONS.items() if name != elsewhere}
    listed = {metric for metrics in sections.values() for metric in metrics}
    listed = {metric for metric in listed if not metric.startswith(("probe_", "program_"))}
    measured = {m for (m,) in query("SELECT DISTINCT metric FROM t")}
    assert listed <= measured
    assert listed <= set(DEFINITIONS)
    text = (tmp_path / "r" / "report.html").read_text()
    page = Balance()
    page.feed(text)
    assert not page.open
    assert {"svg", "table", "figure", "polyline", "circle"} <= page.seen
    assert "http" not in text.replace("http://www.w3.org", "")
    for metric in ("fvu", "delta_ce", "compute_share"):
        assert DEFINITIONS[metric].meaning in unescape(text)


# what a result file of SAEBench 0.6's core evaluation must have, from its JSON schema
SAEBENCH = {
    "model_behavior_preservation": "kl_div_score kl_div_with_ablation kl_div_with_sae",
    "model_performance_preservation": "ce_loss_score ce_loss_with_ablation ce_loss_with_sae "
    "ce_loss_without_sae",
    "reconstruction_quality": "explained_variance explained_variance_legacy mse cossim",
    "shrinkage": "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias",
    "sparsity": "l0 l1",
    "token_stats": "total_tokens_eval_reconstruction total_tokens_eval_sparsity_variance",
    "misc_metrics": "freq_over_1_percent freq_over_10_percent normalized_freq_over_1_percent "
    "normalized_freq_over_10_percent average_max_encoder_cosine_sim "
    "average_max_decoder_cosine_sim frac_alive",
}
SAEBENCH_KEYS = (
    "eval_config eval_id datetime_epoch_millis eval_result_metrics sae_bench_commit_hash "
    "sae_lens_id sae_lens_release_id sae_lens_version sae_cfg_dict"
)


def test_saebench_gets_its_layout_with_the_same_figures(place, saes, tmp_path):
    assert run(place, [saes / "a"], tmp_path / "r").exit_code == 0
    [path] = (tmp_path / "r" / "saebench").iterdir()
    content = json.loads(path.read_text())
    assert set(SAEBENCH_KEYS.split()) <= set(content)
    metrics = content["eval_result_metrics"]
    assert {name: set(values.split()) for name, values in SAEBENCH.items()} == {
        name: set(values) for name, values in metrics.items()
    }
    assert all(value is not None for values in metrics.values() for value in values.values())
    path = tmp_path / "r" / "metrics.parquet"
    ours = {
        (metric, subject): value
        for metric, subject, value in duckdb.execute(
            f"SELECT metric, subject, value FROM '{path}' WHERE part != 'with outliers'"
        ).fetchall()
    }
    assert metrics["reconstruction_quality"]["explained_variance"] == 1 - ours["fvu", "SAE"]
    kept = metrics["model_performance_preservation"]
    score = (kept["ce_loss_with_ablation"] - kept["ce_loss_with_sae"]) / (
        kept["ce_loss_with_ablation"] - kept["ce_loss_without_sae"]
    )
    assert kept["ce_loss_score"] == pytest.approx(score)
    assert kept["ce_loss_score"] == ours["recovered_zero", "SAE"]
    assert metrics["sparsity"]["l0"] == 4


def test_finished_parts_are_not_measured_again(place, saes, tmp_path, monkeypatch):
    calls = []
    original = of_rows.reconstruction

    def noted(*arguments, **named):
        calls.append("reconstruction")
        return original(*arguments, **named)

    def killed(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(of_rows, "reconstruction", noted)
    monkeypatch.setattr(of_model, "spliced_losses", killed)
    assert run(place, [saes / "a"], tmp_path / "r").exit_code == 130
    assert calls == ["reconstruction"]
    assert not (tmp_path / "r" / "report.html").exists()
    monkeypatch.undo()
    monkeypatch.setattr(of_rows, "reconstruction", noted)
    assert run(place, [saes / "a"], tmp_path / "r").exit_code == 0
    assert calls == ["reconstruction"]  # its file was kept
    first = (tmp_path / "r" / "metrics.parquet").read_bytes()
    assert run(place, [saes / "a"], tmp_path / "r").exit_code == 0
    assert (tmp_path / "r" / "metrics.parquet").read_bytes() == first
    assert run(place, [saes / "a"], tmp_path / "r", "--rows", 500).exit_code == 0
    assert len(calls) == 2  # another sample size is another part


def test_a_damaged_part_is_named(place, saes, tmp_path):
    assert run(place, [saes / "a"], tmp_path / "r").exit_code == 0
    [path] = (tmp_path / "r" / "parts").glob("*-weights.json")
    content = json.loads(path.read_text())
    content["part"]["figures"][0]["value"] = "many"
    path.write_text(json.dumps(content))
    refused = run(place, [saes / "a"], tmp_path / "r")
    assert refused.exit_code == 1
    assert re.search(r"weights\.json is damaged .*\s+remove it, and the part", refused.output)


def test_without_a_report_the_reconstruction_is_printed_for_each_sae(place, saes):
    done = evaluate("--sae", saes / "a", "--sae", saes / "b", "--store", place, "--device", "cpu")
    assert done.exit_code == 0
    assert done.stdout.count("without outliers") == 2
    refused = evaluate("--sae", saes / "a", "--sae", saes / "b", "--store", place, "--out", "x")
    assert refused.exit_code == 2
    assert "--out takes one SAE" in refused.output


def test_saes_of_several_sites_are_also_measured_in_one_forward_pass(
    model_folder, corpus_file, tmp_path
):
    config = HarvestConfig(
        model=str(model_folder),
        corpus=CorpusSpec(name=str(corpus_file)),
        sites=("resid_post.0", "mlp_out.1"),
        tokens=2048,
        context_length=32,
        shard_rows=2048,
        compute_dtype="float32",
    )
    run_harvest(config, tmp_path / "store", Execution(workers=0, device="cpu"))
    store = ActivationStore.open(tmp_path / "store")
    for site in store.sites:
        random_sae(store, 64, 4, RULE, site=site).save(tmp_path / site)
    done = run(store.place, [tmp_path / site for site in store.sites], tmp_path / "r")
    assert done.exit_code == 0, done.output
    path = tmp_path / "r" / "metrics.parquet"
    found = duckdb.execute(
        f"SELECT sae, value FROM '{path}' WHERE metric = 'delta_ce' AND subject = 'SAE'"
    ).fetchall()
    assert [" + " in name for name, _ in found] == [False, False, True]
    alone = [abs(value) for _, value in found[:2]]
    assert abs(found[2][1]) > max(alone)  # the model is random, so a loss may fall
    page = (tmp_path / "r" / "report.html").read_text()
    assert "all of them in one forward pass" in page


def test_probes_and_programs_are_parts_of_the_report(
    place, saes, corpus_file, tmp_path, monkeypatch
):
    """The texts are those of the fixture, so only tasks about tokens have examples."""
    monkeypatch.setattr(of_probes, "CORPUS", str(corpus_file))
    build(place, saes / "a", tmp_path / "features", FeatureConfig(n_top=2), device="cpu")
    asked = ["--probes", "--features", tmp_path / "features", "--n2g-latents", 2]
    done = run(place, [saes / "a"], tmp_path / "r", *asked)
    assert done.exit_code == 0, done.output
    path = tmp_path / "r" / "metrics.parquet"
    found = duckdb.execute(
        f"SELECT metric, subject FROM '{path}' WHERE metric LIKE 'pro%' AND value IS NOT NULL"
    ).fetchall()
    assert {("probe_loss", name) for name in ("SAE", "random", "channels", "constant")} <= {*found}
    assert {("program_f1", name) for name in ("SAE", "random")} <= {*found}
    [probes] = (tmp_path / "r" / "probes").glob("*/probes.parquet")
    assert duckdb.execute(f"SELECT count(DISTINCT task) FROM '{probes}'").fetchall()[0][0] > 3
    assert (tmp_path / "features" / "programs.parquet").exists()
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Probe loss" in page
    assert "binary tasks" in page
    refused = run(place, [saes / "b"], tmp_path / "q", "--features", tmp_path / "features")
    assert refused.exit_code == 1
    assert "tables of another SAE" in refused.output


def test_own_tasks_are_probed_in_the_evaluated_store(place, saes, tmp_path):
    store = ActivationStore.open(place)
    tokens = store.tokens(0, store.n_rows // store.context_length).reshape(-1)
    rows = np.arange(len(tokens))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    pq.write_table(pa.table({"row": rows, "label": tokens % 2 == 0}), tasks / "even.parquet")
    report, features = tmp_path / "r", tmp_path / "features"
    refused = run(place, [saes / "a"], report, "--tasks", tasks)
    assert refused.exit_code == 1
    assert "--features" in refused.output
    build(place, saes / "a", features, FeatureConfig(n_top=2), device="cpu")
    asked = ["--features", features, "--n2g-latents", 0, "--tasks", tasks]
    done = run(place, [saes / "a"], report, *asked)
    assert done.exit_code == 0, done.output
    found = duckdb.execute(
        f"SELECT subject, part, value FROM '{report / 'metrics.parquet'}' "
        "WHERE metric = 'probe_loss_relative'"
    ).fetchall()
    assert {"SAE", "random"} <= {subject for subject, _, _ in found}
    assert {part for _, part, _ in found} == {"token tasks of --tasks"}
    assert all(0 < value <= 1 for _, _, value in found)
    [listed] = (report / "probes").glob("*/tasks.parquet")
    assert duckdb.execute(f"SELECT DISTINCT task FROM '{listed}'").fetchall() == [("even",)]
    before = listed.stat().st_mtime_ns
    run(place, [saes / "a"], report, *asked)
    assert listed.stat().st_mtime_ns == before
    pq.write_table(pa.table({"row": rows, "label": tokens % 3 == 0}), tasks / "even.parquet")
    run(place, [saes / "a"], report, *asked)
    assert listed.stat().st_mtime_ns > before  # other labels are another task


def test_a_synthetic_store_has_recovery_in_place_of_what_needs_a_model(tmp_path):
    config = SyntheticConfig(features=24, width=12, parents=4, rows=128 * 128, l0=2)
    made = make(config, tmp_path / "s")
    # the true directions: the mean over features of the cosine with their latent is 1
    directions = torch.from_numpy(made.features.directions)
    sae_config = SAEConfig(
        d_in=12,
        n_latents=len(directions),
        k=3,
        site="synthetic",
        rule=RowRule(heldout_fraction=0.4),
    )
    zeros = torch.zeros(len(directions)), torch.zeros(12)
    SAE(sae_config, directions.clone(), directions.clone(), *zeros).save(tmp_path / "true")
    report = tmp_path / "r"
    done = run(tmp_path / "s" / "store", [tmp_path / "true"], report)
    assert done.exit_code == 0, done.output
    found = dict(
        duckdb.execute(
            f"SELECT subject, value FROM '{report / 'metrics.parquet'}' "
            "WHERE metric = 'matched_cosine'"
        ).fetchall()
    )
    assert found["SAE"] == pytest.approx(1, abs=1e-6)
    assert found["ideal"] == pytest.approx(1, abs=1e-6)
    assert found["random"] < 0.95
    page = (report / "report.html").read_text()
    assert "Recovery of known features" in page
    assert "Downstream loss" not in page
    refused = run(
        tmp_path / "s" / "store", [tmp_path / "true"], report, "--compute-table", "gpt2-124m"
    )
    assert refused.exit_code == 1
    assert "no model" in refused.output


def test_probe_losses_of_several_saes_are_drawn_against_their_latents():
    def evaluation(name, n):
        rng = torch.Generator().manual_seed(0)
        weights = torch.randn(n, 4, generator=rng)
        sae = SAE(
            SAEConfig(d_in=4, n_latents=n, k=2, site="resid_post.0"),
            weights, weights, torch.zeros(n), torch.zeros(4),
        )  # fmt: skip
        figures = [
            Figure("probe_loss_relative", "SAE", "all tasks", 0.5, 0.4, 0.6, 9, "tasks"),
            Figure("probe_loss_relative", "channels", "all tasks", 0.6, 0.5, 0.7, 9, "tasks"),
        ]
        return Evaluation(name, [sae], {"probes": Part(figures)})

    found = page([evaluation("a", 8), evaluation("b", 80)], "title", "command")
    drawing = found[found.index("Probe loss against n") :]
    assert drawing[: drawing.index("</figure>")].count("<circle") == 2
    assert "number of latents" in drawing


def test_the_same_sae_twice_is_refused(place, saes, tmp_path):
    refused = run(place, [saes / "a", saes / "a"], tmp_path / "r")
    assert refused.exit_code == 1
    assert "given twice" in refused.output


def test_compute_is_read_from_the_line_through_the_table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("# made up\ncompute,loss\n1e15,6\n1e17,4\n1e18,3\n")
    table = ComputeTable.read(path)
    assert table.share(0) == 1
    assert table.share(-0.5) == 1
    assert table.share(1) == pytest.approx(0.1)  # the second row
    assert table.share(0.5) == pytest.approx(10**-0.5)  # halfway between the last two, in log
    assert table.share(3) == pytest.approx(1e-3)
    assert table.share(3.1) is None
    packaged = ComputeTable.read("gpt2-124m")
    assert packaged.loss[-1] == 3.2722
    assert packaged.compute[-1] == pytest.approx(6 * 124_475_904 * 19_560 * 524_288, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss,compute\n1,2\n3,4\n", "columns compute,loss"),
        ("compute,loss\n1e15,6\n1e17,x\n", "no table of compute and loss"),
        ("compute,loss\n1e15,6\n1e17,7\n", "rising compute and falling loss"),
        ("compute,loss\n0,6\n1e17,5\n", "compute of 0 or less"),
        ("", "no table of compute and loss"),
    ],
)
def test_a_table_of_compute_that_is_none_is_refused(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        ComputeTable.read(tmp_path / "t.csv")
    with pytest.raises(InputError, match="cannot be read"):
        ComputeTable.read(tmp_path / "missing.csv")


def test_axes_have_round_ticks_that_lie_inside():
    assert Axis("x", 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Axis("x", 0.9, 110, log=True).ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert Axis("x", 1e-5, 1e2, log=True).ticks()[:2] == pytest.approx([1e-5, 1e-4])
    assert Axis.over("x", [3.0, 3.0]).high > 3
    drawn = plot([Series("a", [0, 1, 2], [1.0, None, 2.0])], "x", "y", {"a": "red"})
    assert drawn.count("<polyline") == 2  # a gap
    assert "<title>a</title>" in drawn
