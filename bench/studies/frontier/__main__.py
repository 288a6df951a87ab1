"""Train and judge every point of the frontier; print a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.studies.frontier import __doc__ as usage
from bench.studies.frontier.judging import Judge
from bench.studies.frontier.members import (
    BASELINES_OF,
    Point,
    baseline_points,
    members,
    points,
)
from bench.studies.frontier.table import drawing, markdown
from sae_harvest.common.atomic import new_folder, replacing, write_text
from sae_harvest.common.console import Progress, output
from sae_harvest.common.locks import HeldError, lock
from sae_harvest.harvest.run.driver import Execution
from sae_harvest.harvest.run.progress import harvest_with_progress
from sae_harvest.pipelines.demo import HARVEST, SITE
from sae_harvest.pipelines.evaluate.baselines import baselines
from sae_harvest.pipelines.evaluate.figures import figures_table
from sae_harvest.pipelines.evaluate.report.of_probes import FIRINGS_ONLY, probe_texts
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.sweeps.sweep import sweep

ROWS, EPOCHS = 262_144, 2
FOUND = "found"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.studies.frontier", description=usage)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the store")
    parser.add_argument("--contexts", type=int, default=32, help="contexts for the model's loss")
    parser.add_argument("--n2g-latents", type=int, default=8, help="latents with an N2G program")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.folder
    config = HARVEST.model_copy(update={"tokens": chosen.rows})
    harvest_with_progress(config, folder / "store", Execution(workers=0))
    with Progress() as progress:
        configs = members(EPOCHS * chosen.rows)
        store, out = folder / "store", folder / "sweep"
        result = sweep(configs, store, out, device="cpu", report=progress)
    if not result.finished or result.failed:
        sys.exit("Error: the sweep did not finish; the same command continues it.")
    judge_all(folder, chosen.contexts, chosen.n2g_latents)
    missing = [
        point.key for point, _ in dictionaries(folder) if not path_of(folder, point).exists()
    ]
    if missing:
        sys.exit(f"Error: another process judges {', '.join(missing)}; run the command again.")
    every = [point for point, _ in points()] + [point for point, _ in baseline_points()]
    table = pa.concat_tables(pq.read_table(path_of(folder, point)) for point in every)
    write_table(folder / "metrics.parquet", table)
    text = markdown(table, every)
    write_text(folder / "frontier.md", text)
    write_text(folder / "frontier.svg", drawing(table, every))
    output().print(text, soft_wrap=True, markup=False)


def judge_all(folder: Path, contexts: int, n2g_latents: int) -> None:
    """Measure every point that has no figures yet."""
    left = [pair for pair in dictionaries(folder) if not path_of(folder, pair[0]).exists()]
    if not left:
        return
    new_folder(folder / FOUND)
    first, store = folder / "sweep" / next(points())[0].names[0], folder / "store"
    texts = probe_texts(ActivationStore.open(store), [SITE], folder / "texts", "cpu")
    build(str(store), first, folder / "features", FIRINGS_ONLY, device="cpu")
    with Progress() as progress:
        judge = Judge(folder / "features", texts, first, contexts, n2g_latents)
        for number, (point, load) in enumerate(left, 1):
            path = path_of(folder, point)
            with ExitStack() as stack:
                try:  # several processes may judge at the same time
                    stack.enter_context(lock(path.with_suffix(".lock")))
                except HeldError:
                    continue
                if path.exists():
                    continue
                table = figures_table(judge.figures(load(), stages(progress, number, len(left))))
                write_table(path, table)


def stages(progress: Progress, number: int, n: int) -> Callable[[str, int, int], None]:
    """Return a function that reports the stages of one point."""
    return lambda name, done, total: progress(f"point {number} of {n}: {name}", done, total, "")


def dictionaries(folder: Path) -> Iterator[tuple[Point, Callable[[], dict[str, SAE]]]]:
    """Yield each point, and a function that loads its dictionaries."""
    for point, _ in points():
        yield point, partial(trained, folder, point)
    for point, k in baseline_points():
        yield point, partial(untrained, folder, point, k)


def trained(folder: Path, point: Point) -> dict[str, SAE]:
    """Load the SAEs of a point."""
    return {name: SAE.load(folder / "sweep" / name) for name in point.names}


def untrained(folder: Path, point: Point, k: int) -> dict[str, SAE]:
    """Make the dictionary of a baseline, with the norms of a trained SAE's rows."""
    trained = SAE.load(folder / "sweep" / f"{BASELINES_OF}-k{k}-seed0")
    made = baselines(ActivationStore.open(folder / "store"), trained, k)
    return {point.names[0]: made[point.family]}


def path_of(folder: Path, point: Point) -> Path:
    """Return the path of the figures of a point."""
    return folder / FOUND / f"{point.key}.parquet"


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


if __name__ == "__main__":
    main(sys.argv[1:])
