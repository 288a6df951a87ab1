"""`sae-features serve` and `sae-features site`."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import click

from sae_harvest.common.console import Progress, output, when_interrupted
from sae_harvest.common.errors import InputError
from sae_harvest.common.options import NameOption, PathOption, PlaceOption
from sae_harvest.common.paths import shown
from sae_harvest.pipelines.options import features_option

compare_option = click.option(
    "--compare",
    type=PathOption(),
    help="Folder of the tables of a second SAE of the same site, shown beside the first.",
)
matches_option = click.option(
    "--matches",
    type=PathOption(),
    help="Folder that `sae-features diff` wrote for the SAEs of --features and --compare.",
)
sae_option = click.option(
    "--sae",
    "saes",
    type=PathOption(),
    multiple=True,
    help="Folder of the SAE, if it has moved; repeat for the SAE of --compare.",
)


@click.command()
@features_option
@compare_option
@matches_option
@sae_option
@click.option(
    "--store",
    "stores",
    type=PlaceOption(),
    multiple=True,
    help="Folder or address of the store, if it has moved; repeat for the store of --compare.",
)
@click.option(
    "--model",
    "models",
    type=NameOption(),
    multiple=True,
    help="The store's model, if it has moved: a folder or a name.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Every address but 127.0.0.1, localhost and ::1 asks for a token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8800,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="cpu",
              show_default=True, help="Device for live text and steering.")  # fmt: skip
@click.option("--allow-sql", is_flag=True, help="Offer a page for SELECT queries over the tables.")
def serve(
    features: Path,
    compare: Path | None,
    matches: Path | None,
    saes: tuple[Path, ...],
    stores: tuple[str, ...],
    models: tuple[str, ...],
    host: str,
    port: int,
    device: str,
    allow_sql: bool,
) -> None:
    """Show every latent in the browser: search, contexts, live text, steering, notes.

    \b
    sae-features serve --features runs/demo/features
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"`sae-features serve` needs {' and '.join(missing)}, which this Python lacks; "
            f"pip install {' '.join(missing)}."
        )
    from sae_harvest.pipelines.live import LiveModel
    from sae_harvest.pipelines.source import Locations
    from sae_harvest.pipelines.viewer.run import run_server
    from sae_harvest.pipelines.viewer.server import open_viewer

    open_model = partial(LiveModel.open, moved=Locations(saes, stores, models))
    viewer = open_viewer(features, compare, allow_sql, device, open_model, saes, matches)
    run_server(viewer, host, port, lambda line: click.echo(line), lambda w: click.echo(w, err=True))


@click.command()
@features_option
@compare_option
@matches_option
@sae_option
@click.option("--out", type=PathOption(), required=True, help="Folder to write.")
def site(
    features: Path,
    compare: Path | None,
    matches: Path | None,
    saes: tuple[Path, ...],
    out: Path,
) -> None:
    """Write the pages as files that open from a disk or any web server.

    Live text, steering, notes and SQL need `serve`; the pages say so.

    \b
    sae-features site --features runs/demo/features --out runs/demo/site
    """
    from sae_harvest.pipelines.viewer.site import write_site

    nothing = f"Nothing was written into {out}; run the same command again."
    with when_interrupted(nothing), Progress("latents") as progress:
        size = write_site(features, compare, out, progress, saes, matches)
    output().print(
        f"{shown(out)}: open {shown(out / 'index.html')} in a browser ({size.n_files:,} files, "
        f"{size.n_bytes / 1e6:,.0f} MB).",
        soft_wrap=True,
    )
