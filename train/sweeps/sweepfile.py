"""The file of a sweep: the settings that all members share, and the values that distinguish them.

    store: runs/demo/store        any key of `train-sae run --config`
    out: runs/demo/sweep
    tokens: 2_000_000
    grid:                         every combination of these
      n_latents: [4096, 8192]
      k: [16, 32]
    runs:                         and each of these; a name is optional
      - {activation: jumprelu, k: 32, n_latents: 8192, name: jump}

All members are trained on one stream of batches, so the settings that decide the stream are the
same for all. `order_seed` is by default the `seed` above: seeds in the grid change only weights.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sae_harvest.common.paths import shown
from sae_harvest.common.yamlfile import read_yaml
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.options import Places, RunSettings

GRID, RUNS, NAME = "grid", "runs", "name"
# settings of the stream of batches, of checkpoints and of evaluation
SHARED = ("batch_rows", "target_site", "order_seed", "rule", "checkpoint_every", "eval_rows")
ONLY = "run"  # name of the member of a sweep that has one
MAX_NAME_BYTES = 120  # bytes; file systems end at 255
MAX_MEMBERS = 10_000
TAKEN = ("sweep.json",)  # in the folder of the members' folders


@dataclass(frozen=True)
class Sweep:
    """The places that a sweep reads and writes, and its runs by the names of their folders."""

    places: Places
    members: dict[str, TrainConfig]


def read_sweep_file(path: Path, options: Mapping[str, Any]) -> Sweep:
    """Return the sweep of a YAML file; see `parse_sweep`."""
    return parse_sweep(read_yaml(path), shown(path), options)


def parse_sweep(found: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> Sweep:
    """Return the sweep that a file's content describes.

    Args:
        found: the content.
        where: name of the file in errors.
        options: typed options (store, out, site, device); they take precedence over the file.

    Raises:
        click.UsageError: it is not a sweep; names the file, the member and the key.
    """
    shared = {key: value for key, value in found.items() if key not in (GRID, RUNS)}
    places = RunSettings(shared, where, options).places()
    shared = {key: value for key, value in shared.items() if key not in Places.model_fields}
    variants = list(itertools.islice(_variants(found, where), MAX_MEMBERS + 1))
    if len(variants) > MAX_MEMBERS:
        raise click.UsageError(
            f"{where} describes more than {MAX_MEMBERS:,} members; make several sweeps of it."
        )
    names = _names(variants, where)
    members = {
        name: RunSettings({**shared, **variant}, f"{where}, member {name}", {}).config()
        for name, (_, variant) in zip(names, variants, strict=True)
    }
    members = _one_order(members, shared)
    _check(members, where)
    return Sweep(places, members)


def _variants(found: Mapping[str, Any], file: str) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield each member's name, if it has one, and the values that distinguish it."""
    grid, runs = found.get(GRID), found.get(RUNS)
    if grid is not None:
        if not isinstance(grid, dict) or not all(
            isinstance(values, list) and values for values in grid.values()
        ):
            raise click.UsageError(
                f"{file}: {GRID} should hold lines like `k: [16, 32]`, a name and a list."
            )
        _check_keys(grid, GRID, file)
        for values in itertools.product(*grid.values()):
            yield None, dict(zip(grid, values, strict=True))
    if runs is not None:
        if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            raise click.UsageError(
                f"{file}: {RUNS} should be a list of lines like `- {{k: 16, n_latents: 4096}}`."
            )
        for run in runs:
            _check_keys({key: run[key] for key in run if key != NAME}, RUNS, file)
            name = run.get(NAME)
            if name is not None and not _is_name(name):
                raise click.UsageError(
                    f"{file}: {name!r} cannot name a folder; use letters, digits and =,.+-_ only."
                )
            yield name and str(name), {key: value for key, value in run.items() if key != NAME}
    if grid is None and not runs:
        yield ONLY, {}


def _is_name(name: object) -> bool:
    """True if a member may have this name, which is also its folder's."""
    if not isinstance(name, str | int) or not re.fullmatch(r"\w[\w=,.+-]*", str(name)):
        return False
    return str(name) not in TAKEN


def _check_keys(values: Mapping[Any, Any], where: str, file: str) -> None:
    """Raise `click.UsageError` unless the keys of a grid or a run are settings of one member."""
    for key in values:
        if key in Places.model_fields or key in SHARED:
            raise click.UsageError(
                f"{file}: {key} is the same for all members of a sweep, which read one stream of "
                f"batches; take it out of {where}, or make two sweeps."
            )
        if key not in RunSettings.top_keys():
            RunSettings({key: None}, f"{file}, {where},", {})


def _names(variants: list[tuple[str | None, dict[str, Any]]], file: str) -> list[str]:
    """Return the names of folders: given names, else the values that distinguish a member."""
    names = [name or _spelled(values) for name, values in variants]
    for name, count in Counter(names).items():
        if count > 1:
            raise click.UsageError(
                f"{file}: {count} members are called {name}; members have to differ, or be given "
                "names."
            )
        if len(name.encode()) > MAX_NAME_BYTES:
            raise click.UsageError(
                f"{file}: {name} is too long to name a folder; list the members under {RUNS} and "
                f"give each a {NAME}."
            )
    return names


def _spelled(values: Mapping[str, Any]) -> str:
    """Return a name such as `k=32,n_latents=4096`, in the order of the file."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return "-".join(map(text, value))
        return "none" if value is None else re.sub(r"[^\w.+-]", "-", str(value))

    return ",".join(f"{key}={text(value)}" for key, value in values.items()) or ONLY


def _one_order(
    members: dict[str, TrainConfig], shared: Mapping[str, Any]
) -> dict[str, TrainConfig]:
    """Return the members with the same order of rows: the file's, or that of the sweep's seed."""
    if shared.get("order_seed") is not None:
        return members
    seed = shared.get("seed", TrainConfig.model_fields["seed"].default)
    return {
        # a member with this seed stays as `train-sae run` would have it
        name: config if config.seed == seed else config.model_copy(update={"order_seed": seed})
        for name, config in members.items()
    }


def _check(members: dict[str, TrainConfig], file: str) -> None:
    """Raise `click.UsageError` if two members have the same configuration."""
    seen: dict[str, str] = {}
    for name, config in members.items():
        other = seen.setdefault(config.model_dump_json(), name)
        if other != name:
            raise click.UsageError(
                f"{file}: members {other} and {name} are the same run; take one out."
            )
