"""A recipe: harvest several sites of several layers of a model and train a sweep on each.

    OUT/recipe.json               the recipe; a different one is refused in the same folder
    OUT/layer.8/store             one layer's activations; removed when its SAEs are finished
    OUT/resid_post.8/<member>/    a run's folder as of `train-sae run`, within the sweep's folder
    OUT/suite.parquet             one row per finished SAE: site, settings, figures, folder

Layers are done one after the other, so that the disk holds one layer's activations at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from rich.table import Table

from sae_harvest.common.atomic import replacing
from sae_harvest.common.differences import differences
from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.locks import claimed
from sae_harvest.common.numbers import Count
from sae_harvest.common.parsing import first_line
from sae_harvest.common.paths import exact_file
from sae_harvest.common.yamlfile import MAX_DEPTH, read_yaml
from sae_harvest.harvest.model.models import load_config, resolve_model
from sae_harvest.harvest.model.sites import SITE_KINDS
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution
from sae_harvest.harvest.run.progress import harvest_with_progress
from sae_harvest.train.run.files import read_json, write_json
from sae_harvest.train.run.folder import finished_evaluation
from sae_harvest.train.run.progress import sweep_with_progress
from sae_harvest.train.sweeps.sweep import SweepResult
from sae_harvest.train.sweeps.sweepfile import Sweep, parse_sweep

RECIPE_FILE, SUITE_FILE, STORE = "recipe.json", "suite.parquet", "store"
FIGURES = ("fvu", "l0", "dead_share")

Announce = Callable[[str], None]


class Recipe(BaseModel):
    """The harvest, and the SAEs to train on each of its sites."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    harvest: dict[str, Any] = Field(
        description="fields of HarvestConfig except sites: model, corpus, tokens, …"
    )
    layers: Literal["all"] | tuple[Annotated[Count, Field(ge=0, lt=10_000)], ...] = Field(
        description="all, or a list of layer numbers, from 0"
    )
    sites: tuple[str, ...] = Field(
        min_length=1, description="kinds of site, harvested together in one pass per layer"
    )
    train: dict[str, Any] = Field(
        description="content of a sweep file without its paths; the sweep is trained on each site"
    )
    keep_stores: bool = Field(
        False, description="whether to keep a layer's store when its SAEs are finished"
    )

    @field_validator("harvest")
    @classmethod
    def _without_sites(cls, harvest: dict[str, Any]) -> dict[str, Any]:
        if "sites" in harvest:
            raise ValueError("sites belongs beside layers, not in harvest")
        return harvest

    @field_validator("sites")
    @classmethod
    def _known(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [site for site in sites if site not in SITE_KINDS]:
            raise ValueError(f"unknown site {', '.join(unknown)}; use {', '.join(SITE_KINDS)}")
        return sites

    def harvest_config(self, layer: int) -> HarvestConfig:
        """Return the settings of one layer's harvest."""
        sites = tuple(f"{kind}.{layer}" for kind in self.sites)
        return HarvestConfig.model_validate({**self.harvest, "sites": sites})


def packaged_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = files("pipelines") / "recipes"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir())


def read_recipe(name: str, changes: Mapping[str, Any]) -> Recipe:
    """Read a packaged recipe or a YAML file, and change some of its values.

    Args:
        name: name of a packaged recipe (`gpt2-small`), or the path of a YAML file.
        changes: new values by their key, such as `harvest.model` or `train.grid.n_latents`.

    Raises:
        InputError: the recipe is missing or not valid; the message names the key.
    """
    path = Path(name)
    if not path.is_file():
        path = Path(str(files("pipelines") / "recipes" / f"{name}.yaml"))
    if not path.is_file():
        raise InputError(
            f"There is no recipe {name}: it is neither a file nor one of "
            f"{', '.join(packaged_recipes())}."
        )
    content = read_yaml(path)
    for key, value in changes.items():
        keys = key.split(".", MAX_DEPTH)
        if len(keys) > MAX_DEPTH:
            raise InputError(f"{key:.40}… has more than {MAX_DEPTH} parts; name a key of a recipe.")
        _set(content, keys, value)
    above = ""
    try:
        recipe = Recipe.model_validate(content)
        above = "harvest."
        recipe.harvest_config(0)
    except ValidationError as error:
        raise InputError(f"{path} is not a recipe: {above}{first_line(error)}.") from None
    _sweep(recipe, Path(), "resid_post.0", "auto")
    return recipe


def run_recipe(
    recipe: Recipe, out: Path, execution: Execution, announce: Announce = lambda text: None
) -> int | None:
    """Harvest and train all sites that are not finished yet, and write the suite's table.

    Returns:
        The signal that stopped it between two training steps; None if all sites are finished.

    Raises:
        SaeHarvestError: a step failed; the same call continues.
        RunError: `out` holds another recipe, another process works in it, or a member of a sweep
            failed.
    """
    with claimed(out, RECIPE_FILE):
        _begin(out, recipe)
        return _run(recipe, out, execution, announce)


def _run(recipe: Recipe, out: Path, execution: Execution, announce: Announce) -> int | None:
    layers = _layers(recipe)
    suite: list[dict[str, Any]] = []
    for number, layer in enumerate(layers, 1):
        sweeps = [_sweep(recipe, out, f"{kind}.{layer}", execution.device) for kind in recipe.sites]
        found = [_evaluations(sweep) for sweep in sweeps]
        left = [place for place, evaluations in enumerate(found) if None in evaluations.values()]
        if left:
            sites = ", ".join(str(sweeps[place].places.site) for place in left)
            announce(f"Layer {layer}, {number} of {len(layers)}: {sites}")
            harvest_with_progress(recipe.harvest_config(layer), sweeps[0].places.store, execution)
        for place in left:
            result = _train(sweeps[place])
            if result.signal is not None:
                return result.signal
            found[place] = {name: member.evaluation for name, member in result.members.items()}
        if not recipe.keep_stores and (out / f"layer.{layer}").is_dir():
            shutil.rmtree(out / f"layer.{layer}")
        for sweep, evaluations in zip(sweeps, found, strict=True):
            suite += _rows(sweep, evaluations)
        with replacing(out / SUITE_FILE) as temporary, exact_file(temporary, "wb") as sink:
            pq.write_table(pa.Table.from_pylist(suite), sink)
    return None


def _train(sweep: Sweep) -> SweepResult:
    """Train all members of a sweep; raise `RunError` if one failed."""
    folder = Path(sweep.places.out)
    result: SweepResult = sweep_with_progress(sweep, folder)
    if result.failed:
        raise RunError(
            f"Training in {folder} failed for {', '.join(result.failed)}; the failed.json of each "
            "says why."
        )
    return result


def _layers(recipe: Recipe) -> tuple[int, ...]:
    """Return the layers' numbers; for `all`, every layer of the model."""
    if recipe.layers != "all":
        return recipe.layers
    config = recipe.harvest_config(0)
    model = load_config(resolve_model(config.model, config.model_revision))
    return tuple(range(model.num_hidden_layers))


def _sweep(recipe: Recipe, out: Path, site: str, device: str) -> Sweep:
    """Return the sweep that is trained on a site, with its folders."""
    layer = site.rpartition(".")[2]
    places = {
        "store": str(out / f"layer.{layer}" / STORE),
        "out": str(out / site),
        "site": site,
        "device": device,
    }
    return parse_sweep(recipe.train, "train of the recipe", places)


def _evaluations(sweep: Sweep) -> dict[str, dict[str, Any] | None]:
    """Return the evaluation of each member; None for a member that is not finished."""
    return {name: finished_evaluation(Path(sweep.places.out) / name) for name in sweep.members}


def _begin(out: Path, recipe: Recipe) -> None:
    """Write recipe.json; raise `RunError` if the folder holds another recipe."""
    path, wanted = out / RECIPE_FILE, recipe.model_dump(mode="json")
    if not path.exists():
        write_json(path, wanted)
    found = read_json(path, "The suite", "choose another --out")
    if not isinstance(found, dict):
        raise RunError(f"{path} is not a recipe; choose another --out.")
    if differing := differences(found, wanted):
        raise RunError(
            f"{out} holds another recipe; differing: {'; '.join(differing)}. Choose another --out."
        )


def _rows(
    sweep: Sweep, evaluations: Mapping[str, dict[str, Any] | None]
) -> Iterator[dict[str, Any]]:
    """Yield one row per finished SAE; its figures are from held-out rows without outliers."""
    site = sweep.places.site
    for name, config in sweep.members.items():
        evaluation = evaluations[name]
        if evaluation is None:
            continue
        figures = evaluation["without_outliers"]
        yield {
            "site": site,
            "activation": config.activation,
            "n_latents": config.n_latents,
            "k": config.k,
            "seed": config.seed,
            "tokens": config.tokens,
            **{figure: figures[figure] for figure in FIGURES},
            "heldout_rows": figures["rows"],
            "folder": f"{site}/{name}",
        }


def _set(content: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value in nested mappings; raise `InputError` if a part of its path is no mapping."""
    for depth, key in enumerate(path[:-1]):
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise InputError(f"{'.'.join(path[: depth + 1])} of the recipe holds no further keys.")
    content[path[-1]] = value


def suite_table(out: Path) -> Table:
    """Return the content of `suite.parquet` as a table for the terminal."""
    table = Table("site", "latents", "k", "FVU", "L0", "never fired", box=None)
    for row in pq.read_table(exact_file(out / SUITE_FILE)).to_pylist():
        table.add_row(
            row["site"],
            f"{row['n_latents']:,}",
            "-" if row["k"] is None else str(row["k"]),
            f"{row['fvu']:.4f}",
            f"{row['l0']:.1f}",
            f"{row['dead_share']:.1%}",
        )
    return table
