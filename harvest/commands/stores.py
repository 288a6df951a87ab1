"""`harvest merge` and `harvest export`: join stores, and export their rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import click

from sae_harvest.common.console import (
    SAME_COMMAND,
    Progress,
    output,
    store_option,
    when_interrupted,
)
from sae_harvest.common.options import PlaceOption
from sae_harvest.common.paths import shown


@click.command()
@click.option(
    "--into",
    type=PlaceOption(),
    required=True,
    help="Store that receives the shards it lacks: a new or existing folder or s3://bucket/prefix.",
)
@click.argument("sources", metavar="SOURCE...", type=PlaceOption(), nargs=-1, required=True)
def merge(into: str, sources: tuple[str, ...]) -> None:
    """Join the stores of several machines that harvested one plan, each with its --shards.

    \b
    harvest run --model gpt2 --layer 8 --shards 0:8 --store runs/first-half
    harvest run --model gpt2 --layer 8 --shards 8:16 --store s3://bucket/second-half
    harvest merge --into runs/whole runs/first-half s3://bucket/second-half
    """
    from sae_harvest.common.errors import StoreError
    from sae_harvest.harvest.run.status import read_status
    from sae_harvest.store.maintenance.merge import merge as join
    from sae_harvest.store.objects import open_objects

    target, name = open_objects(into), shown(into)
    status = read_status(target)
    if status is not None and status.alive:
        raise StoreError(
            f"A harvest is writing into {name} ({status.host}, pid {status.pid}); merge when it "
            "has ended."
        )
    with when_interrupted(SAME_COMMAND), Progress("bytes") as progress:
        places = [open_objects(source) for source in sources]
        merged = join(target, places, progress.counting("merging"))
    words = f"{name}: {len(merged.copied)} shards copied"
    if merged.already:
        words += f", {len(merged.already)} there already"
    if merged.differing:
        words += (
            f" (kept as they were; shards {_spans(merged.differing)} are not the same to the bit "
            "in the sources)"
        )
    ending = (
        f"Digest {merged.digest}."
        if merged.digest
        else f"Not sealed: shards {_spans(merged.missing)} are missing."
        if merged.missing
        else "Nothing is committed in any of them."
    )
    output().print(f"{words}. {ending}", soft_wrap=True)


@click.command()
@store_option
@click.option(
    "--out", type=PlaceOption(), required=True, help="New folder or s3://bucket/prefix to write."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["parquet", "safetensors"]),
    required=True,
    help="Format of the files.",
)
@click.option("--site", multiple=True, help="Site to export; repeat for several. Default: all.")
@click.option("--shards", metavar="FIRST:LAST", help="Shards to export, without LAST.")
@click.option("--without-outliers", is_flag=True, help="Leave out the outlier rows.")
def export(
    store: str,
    out: str,
    kind: str,
    site: tuple[str, ...],
    shards: str | None,
    without_outliers: bool,
) -> None:
    """Export rows to Parquet or safetensors, a file per site and shard; run again, it continues.

    \b
    harvest export --store runs/demo/store --out runs/demo/rows --format parquet
    """
    from sae_harvest.harvest.commands.request import parse_shards
    from sae_harvest.harvest.inspect.export import ExportConfig
    from sae_harvest.harvest.inspect.export import export as write

    span = parse_shards(shards)
    config = ExportConfig.model_validate(
        {
            "format": kind,
            "sites": site,
            "shards": (span.start, span.stop) if span else None,
            "without_outliers": without_outliers,
        }
    )
    with when_interrupted(SAME_COMMAND), Progress("rows") as progress:
        done = write(store, out, config, progress.counting("exporting"))
    output().print(
        f"{shown(out)}: {done.rows:,} rows in {done.files} files, {done.n_bytes:,} bytes with the "
        "documents.",
        soft_wrap=True,
    )


def _spans(shards: Sequence[int]) -> str:
    """Format the shards 0..6 and 9 as `0 to 6, 9`."""
    breaks = [i for i, (a, b) in enumerate(pairwise(shards), start=1) if b != a + 1]
    runs = [shards[i:j] for i, j in pairwise([0, *breaks, len(shards)])]
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
