"""Memory of a harvest's driver and of its worker: ten million tokens of corpus against one."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import time
from collections import defaultdict
from pathlib import Path

from bench.inputs import gpt2_model, write_long_news
from bench.measurement import Measurement, peak_bytes
from sae_harvest.common.console import output
from sae_harvest.harvest.run.worker import ShardWorker

SMALL, LARGE = 1_000_000, 10_000_000  # tokens
MODEL = {"n_layer": 1, "n_embd": 64, "n_head": 1}  # cheap: memory is measured, not speed
SAMPLE_SECONDS = 0.25
GOAL, FLOOR = 1.05, 1.10
PROC = Path("/proc")
ACTOR = f"ray::{ShardWorker.__name__}".encode()  # how Ray names a worker's process


def measure(folder: Path) -> list[Measurement]:
    """memory_driver and memory_worker, peaks of `harvest run` over corpora made in `folder`."""
    if not PROC.is_dir():
        output().print("memory_driver and memory_worker are left out: they need Linux's /proc.")
        return []
    model = gpt2_model(folder / "narrow", **MODEL)
    driver, worker = zip(*(_peaks(folder, model, n) for n in (SMALL, LARGE)), strict=True)
    return [
        Measurement(name, large / 1e6, small / 1e6, "MB", GOAL, FLOOR, higher_is_better=False)
        for name, (small, large) in {"memory_driver": driver, "memory_worker": worker}.items()
    ]


def _peaks(folder: Path, model: Path, tokens: int) -> tuple[int, int]:
    """Most bytes in memory of the driver and of the worker while they harvest a whole corpus."""
    corpus, store = folder / "corpus.jsonl", folder / "long"
    write_long_news(corpus, tokens)
    arguments = {"model": model, "layer": 0, "corpus": corpus, "tokens": tokens, "store": store}
    command = [str(Path(sysconfig.get_path("scripts"), "harvest")), "run"]
    for option, value in arguments.items():
        command += [f"--{option}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    driver = worker = 0
    while process.poll() is None:
        driver = max(driver, peak_bytes(process.pid))
        worker = max([worker, *map(peak_bytes, _workers(process.pid))])
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    shutil.rmtree(store)
    corpus.unlink()
    return driver, worker


def _workers(driver: int) -> list[int]:
    """Processes below the driver that run a worker."""
    children = defaultdict(list)
    for entry in PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children[int(stat.rpartition(")")[2].split()[1])].append(int(entry.name))
    below, found = [driver], []
    while below:
        pid = below.pop()
        below += children[pid]
        try:
            name = (PROC / str(pid) / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith(ACTOR):
            found.append(pid)
    return found
