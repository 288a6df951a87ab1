"""The whole path on the packaged model and text, in minutes on two cores."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sae_harvest.common.atomic import new_folder
from sae_harvest.common.console import Progress, Terminated
from sae_harvest.common.errors import RunError
from sae_harvest.common.parsing import first_line, parse_json
from sae_harvest.common.paths import shown
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution
from sae_harvest.harvest.run.progress import harvest_with_progress
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.evaluate.downstream import downstream_loss
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.building.progress import build_with_progress
from sae_harvest.pipelines.features.reading.query import connect, reading
from sae_harvest.pipelines.features.reading.show import highlight
from sae_harvest.pipelines.features.tables.texts import pieces
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.run.files import write_json
from sae_harvest.train.run.progress import train_with_progress

SITE = "resid_post.12"
HARVEST = HarvestConfig(
    model="smollm2-135m",
    corpus=CorpusSpec(name="news"),
    sites=(SITE,),
    tokens=262_144,
)
EPOCHS = 6
TRAIN = TrainConfig(n_latents=4608, k=32, tokens=EPOCHS * 262_144)
FEATURES = FeatureConfig()
N_DOWNSTREAM_CONTEXTS = 64
_FIGURES = TypeAdapter(dict[str, dict[str, str | float]])
N_INTERESTING = 5
N_SHOWN_CONTEXTS = 4


def run_demo(root: Path, workers: int, console: Console, tokens: int | None = None) -> None:
    """Harvest, train, build tables, measure; then print figures and five latents.

    The outputs are in `root`/{store,sae,features}. Finished steps are not repeated.

    Args:
        root: folder of the outputs.
        workers: number of Ray workers that harvest; 0 harvests without Ray.
        console: the console that shows figures and latents.
        tokens: tokens to harvest; training reads each `EPOCHS` times. None takes the default.
    """
    harvest, train = HARVEST, TRAIN
    if tokens is not None:
        harvest = harvest.model_copy(update={"tokens": tokens})
        train = train.model_copy(update={"tokens": EPOCHS * tokens})
    store, sae, features = root / "store", root / "sae", root / "features"
    new_folder(root.resolve())
    figures = Figures(root / "figures.json")
    console.rule("1/4  harvest: SmolLM2-135M over news")
    harvested = harvest_with_progress(harvest, store, Execution(workers=workers))
    assert harvested.digest is not None  # every shard was asked for
    if harvested.rows_run:
        figures.set("harvest", harvested.digest, rate=harvested.rows_run / harvested.seconds)
    console.rule("2/4  train: a TopK sparse autoencoder")
    trained = train_with_progress(train, store, sae, SITE, "auto")
    if not trained.finished:
        raise KeyboardInterrupt if trained.signal == signal.SIGINT else Terminated
    console.rule("3/4  features: tables of every latent")
    built = build_with_progress(store, sae, features, FEATURES)
    digest = built.run["sae_digest"]
    console.rule("4/4  downstream loss: the SAE in the model's place")
    if figures.get("downstream", digest) is None:
        with Progress("contexts") as progress:
            count = progress.counting("measuring")
            measured = downstream_loss(store, [sae], N_DOWNSTREAM_CONTEXTS, count, "auto")
        figures.set("downstream", digest, **measured.to_json())
    console.print()
    with reading(features):
        console.print(figures_table(store, features, trained.evaluation, figures, harvested.digest))
        for latent in interesting_latents(features):
            console.print(brief(features, latent))
        console.print(next_commands(store, sae, features))


class Figures:
    """Measured figures that no output holds, each with the digest of the measured object."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._all: dict[str, dict[str, Any]] = {}
        try:
            self._all = _FIGURES.validate_python(parse_json(path.read_bytes()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} is damaged ({first_line(error)}); remove it and run again."
            ) from None

    def set(self, name: str, of: str, **values: Any) -> None:
        """Save values that were measured on the store or SAE with the digest `of`."""
        self._all[name] = {"of": of, **values}
        write_json(self._path, self._all)

    def get(self, name: str, of: str) -> dict[str, Any] | None:
        """Return the values if they were measured on the digest `of`, else None."""
        found = self._all.get(name)
        return found if found is not None and found.get("of") == of else None


def figures_table(
    store_path: Path,
    features: Path,
    evaluation: dict[str, Any],
    figures: Figures,
    store_digest: str,
) -> Table:
    """Return the figures that the demo measured, each with the rows it was measured on."""
    store = ActivationStore.open(store_path)
    site, plan = SITE, store.plan
    ordinary, every = evaluation["without_outliers"], evaluation["with_outliers"]
    harvested = figures.get("harvest", store_digest)
    sae_digest = evaluation["sae_digest"]
    downstream = figures.get("downstream", sae_digest)
    if downstream is None:
        raise RunError("The downstream loss of this SAE was not measured; run the demo again.")
    statistics = store.statistics(site)
    n_outliers = statistics["outlier"].rows
    connection = connect(features)
    [(n_latents, n_dead)] = connection.execute(
        "SELECT count(*), count(*) FILTER (dead) FROM latents"
    ).fetchall()
    table = Table("figure", "value", "on what", box=None, title="Measured", title_justify="left")
    table.add_row(
        "rows", f"{store.n_rows:,}", f"{plan['model']['name']}, {site}, {plan['corpus']['name']}"
    )
    table.add_row(
        "outlier rows",
        f"{n_outliers:,} ({n_outliers / store.n_rows:.2%})",
        f"{statistics['outlier_rule']}; left out below unless it says with",
    )
    if harvested is not None:
        table.add_row(
            "harvest", f"{harvested['rate']:,.0f} tokens/s", "when it ran, all workers together"
        )
    table.add_row("store", f"{store.n_bytes / store.n_rows:,.1f} bytes/row", "everything counted")
    table.add_row("held-out FVU", f"{ordinary['fvu']:.4f}", f"{ordinary['rows']:,} held-out rows")
    table.add_row(
        "  with outlier rows", f"{every['fvu']:.4f}", f"{every['rows']:,} rows; says little"
    )
    table.add_row("L0", f"{ordinary['l0']:.1f}", "active latents per held-out row")
    table.add_row(
        "dead latents", f"{n_dead / n_latents:.2%}", f"of {n_latents:,}, never fired in the store"
    )
    table.add_row(
        "ΔCE",
        f"{downstream['delta_ce']:+.4f} nats/token",
        f"{downstream['ce_model']:.3f} → {downstream['ce_sae']:.3f} on {downstream['tokens']:,} "
        f"held-out tokens, {downstream['replaced']:.1%} of rows replaced",
    )
    return table


def interesting_latents(features: Path) -> list[int]:
    """Return latents worth a first look, the highest median activation first.

    Such a latent is neither rare nor common. Its top contexts come from at least five web sites, so
    that it does not show the boilerplate of one. It fires mostly on words, and on several
    different words: a search finds a latent of a single token anyway.
    """
    found = connect(features).execute(
        """
        SELECT latent
        FROM latents JOIN (
            SELECT latent, count(DISTINCT source) AS sources
            FROM contexts JOIN documents USING (document)
            WHERE stratum = 'top' AND rank < 10
            GROUP BY latent
        ) USING (latent)
        WHERE density BETWEEN 0.0005 AND 0.005 AND sources >= 5
            AND token_entropy_bits BETWEEN 2 AND 6.5 AND top_token_counts[1] < 0.35 * n_fire
            AND list_bool_and(list_transform(
                top_tokens[:6], lambda t: regexp_full_match(t, ' ?[A-Za-z]{3,}')
            ))
        ORDER BY q50 DESC, latent
        LIMIT ?
        """,
        [N_INTERESTING],
    )
    return [latent for (latent,) in found.fetchall()]


def brief(features: Path, latent: int) -> Group:
    """Return a latent in a few lines: its density, its most frequent tokens, its top contexts."""
    connection = connect(features)
    [(density, tokens, maximum)] = connection.execute(
        "SELECT density, top_tokens[:6], max FROM latents WHERE latent = ?", [latent]
    ).fetchall()
    title = Text(f"\nlatent {latent}", style="bold underline")
    title.append(f"  fires on {density:.2%} of tokens: ", style="not bold not underline dim")
    title.append(" ".join(repr(t) for t in tokens), style="not bold not underline")
    lines = [title]
    for text, ends, activations, position, start, source in connection.execute(
        "SELECT c.text, c.token_ends, c.activations, c.position, c.window_start, d.source "
        "FROM contexts c LEFT JOIN documents d USING (document) "
        "WHERE c.latent = ? AND c.stratum = 'top' ORDER BY c.rank LIMIT ?",
        [latent, N_SHOWN_CONTEXTS],
    ).fetchall():
        peak = position - start
        near = slice(max(0, peak - 24), peak + 9)
        line = Text("  ")
        line.append_text(
            highlight(pieces(text, ends)[near], activations[near], maximum, peak - near.start)
        )
        lines.append(line.append(f"  {source}", style="dim italic"))
    return Group(*lines)


def next_commands(store: Path, sae: Path, features: Path) -> Group:
    """Return the commands to type next."""
    sql = "SELECT latent, density, top_tokens FROM latents ORDER BY density DESC LIMIT 10"
    latent = [*interesting_latents(features), 0][0]
    tables = shown(features)
    commands = [
        f"sae-features serve --features {tables}",
        f"sae-features show {latent} --features {tables}",
        f'sae-features query "{sql}" --features {tables}',
        f"harvest show --store {shown(store)}",
        f"harvest verify --store {shown(store)}",
        f"sae-features build --store {shown(store)} --sae {shown(sae)} --out {tables}-40 --top 40",
    ]
    title = Text("\nTry next", style="bold")
    return Group(title, *(Text(f"  {command}") for command in commands))
