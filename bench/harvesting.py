"""The harvest against the bare truncated forward pass, and against SAELens."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bench.forward import forward_rates
from bench.inputs import gpt2_model, write_news
from bench.measurement import Measurement
from sae_harvest.common.console import output
from sae_harvest.harvest.model.models import PACKAGED, resolve_model
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.run.log import log_path
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import open_objects

SHARDS = 3
SHARD_ROWS = 65_536
ROUNDS = 3

PEER = Path(__file__).parents[1] / ".venv-peers" / "saelens" / "bin" / "python"
PEER_SCRIPT = Path(__file__).parent / "peers" / "saelens_cache.py"
PEER_TOKENS = 32_768
SAME_PRECISION = ("autocast", "bfloat16")  # the peer's ways to compute as we do

_DONE = re.compile(r"([\d.]+) s in the model, ([\d.]+) s writing$")


@dataclass(frozen=True)
class _Case:
    """A model and the layer harvested; `hook` is the block's module in transformers' model."""

    suffix: str
    model: str
    layer: int
    hook: str

    @property
    def config(self) -> HarvestConfig:
        return HarvestConfig(
            model=self.model,
            corpus=CorpusSpec(name="news"),
            sites=(f"resid_post.{self.layer}",),
            tokens=SHARDS * SHARD_ROWS,
        )


SMOLLM2 = _Case("", PACKAGED, 12, "model.layers.12")


@dataclass(frozen=True)
class _Round:
    """One harvest, and the forward passes on either side of it; rates in tokens/s."""

    rate: float
    bare: float
    parts: dict[str, float]  # where the time went, shares of all

    @property
    def efficiency(self) -> float:
        return self.rate / self.bare


def measure(folder: Path) -> list[Measurement]:
    """harvest_efficiency and harvest_vs_saelens of two models, and bytes_per_row.

    Leaves the last store of SmolLM2 in `folder`.
    """
    gpt2 = gpt2_model(folder / "gpt2")
    cases = (_Case("_gpt2", str(gpt2), 8, "transformer.h.8"), SMOLLM2)  # whose store stays
    measured: list[Measurement] = []
    for case in cases:
        measured += _measure_case(case, folder)
    return measured


def make_store(folder: Path) -> None:
    """The store that other benches read, where this one is not run: SmolLM2's, in `folder`."""
    run(SMOLLM2.config, folder / "store", Execution(workers=1))


def _measure_case(case: _Case, folder: Path) -> list[Measurement]:
    store, config = folder / "store", case.config
    log = log_path(open_objects(store).place)
    assert log is not None, "the parts of a harvest's time are read from its log"
    # A first small harvest makes the plan; it also converts the model if need be.
    warm = folder / f"warm{case.suffix}"
    plan = run(config.model_copy(update={"tokens": 4096}), warm, Execution(workers=0)).plan
    forward = [forward_rates(warm)]
    rounds = []
    for _ in range(ROUNDS):
        shutil.rmtree(store, ignore_errors=True)
        log.unlink(missing_ok=True)
        result = run(config, store, Execution(workers=1))
        forward.append(forward_rates(warm))
        bare, captured = (sum(rates) / 2 for rates in zip(*forward[-2:], strict=True))
        parts = _parts(log, result.rows_run, result.seconds, bare, captured)
        rounds.append(_Round(result.rows_run / result.seconds, bare, parts))
    middle = sorted(rounds, key=lambda one: one.efficiency)[ROUNDS // 2]
    _print_parts(config, middle)
    stored = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    width = result.plan.width(config.sites[0])
    return [
        Measurement(
            f"harvest_efficiency{case.suffix}",
            middle.rate,
            middle.bare,
            "tokens/s",
            0.97,
            0.90,
            higher_is_better=True,
            parts=middle.parts,
        ),
        *_against_peer(case, plan, width, middle.rate, folder),
        Measurement(
            f"bytes_per_row{case.suffix}",
            stored / result.rows,
            width * 2,
            "bytes",
            1.005,
            1.01,
            higher_is_better=False,
        ),
    ]


def _parts(log: Path, rows: int, seconds: float, bare: float, captured: float) -> dict[str, float]:
    """Shares of a harvest's time; they add up to 1.

    A worker tells its log how long each shard was in the model and being written. While one is
    written the next is in the model, so that writing shows as a slower model, and by itself only
    after the last shard.
    """
    lines = log.read_text().splitlines()
    told = [tuple(map(float, found.groups())) for line in lines if (found := _DONE.search(line))]
    if len(told) != SHARDS:
        raise AssertionError(f"the log tells of {len(told)} shards, {SHARDS} were harvested")
    in_model, last_written = sum(model for model, _ in told), told[-1][1]
    spent = {
        "bare forward pass": rows / bare,
        "capture, cast, norms": rows / captured - rows / bare,
        "writing beside the model": in_model - rows / captured,
        "writing after the last shard": last_written,
        "waiting": seconds - in_model - last_written,
    }
    return {name: part / seconds for name, part in spent.items()}


def _print_parts(config: HarvestConfig, one: _Round) -> None:
    table = Table(f"part of a harvest of {config.sites[0]}", "%", box=None)
    for name, share in one.parts.items():
        table.add_row(name, f"{100 * share:.1f}")
    output().print(table)


def _against_peer(
    case: _Case, plan: Plan, width: int, rate: float, folder: Path
) -> list[Measurement]:
    """Our tokens/s against SAELens's: with its own settings, and with its best in our precision."""
    if not PEER.exists():
        output().print("harvest_vs_saelens is left out: `make bench` installs the peer.")
        return []
    news = folder / "news"
    write_news(news / "news.jsonl")

    def peer(how: str) -> float:
        cached = folder / "cached"
        model = resolve_model(case.model).path
        arguments = (model, case.hook, width, plan.context_length, news, cached, PEER_TOKENS, how)
        command = [str(PEER), str(PEER_SCRIPT), *map(str, arguments)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        shutil.rmtree(cached)
        return float(json.loads(printed.splitlines()[-1])["tokens_per_second"])

    own, same = peer("default"), max(map(peer, SAME_PRECISION))
    name = f"harvest_vs_saelens{case.suffix}"
    return [
        Measurement(name, rate, own, "tokens/s", 4.0, 2.0, higher_is_better=True),
        Measurement(f"{name}_bf16", rate, same, "tokens/s", 1.5, 1.0, higher_is_better=True),
    ]
