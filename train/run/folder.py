"""A run's folder: its description, its lock, and the store as it was when the run began.

OUT/run.json            configuration and the store it reads; written first
OUT/metrics.jsonl       one line per step
OUT/checkpoints/000200  everything needed to continue, the newest two
OUT/sae.safetensors, OUT/config.json, OUT/evaluation.json    at the end
OUT/.lock               held by the process that writes here
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sae_harvest.common.errors import RunError, UnfinishedError
from sae_harvest.common.locks import claimed
from sae_harvest.common.parsing import first_line
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.config import READERS, TrainConfig
from sae_harvest.train.run.files import read_json, read_record, write_json
from sae_harvest.train.run.records import Evaluation, Failure
from sae_harvest.train.sae.sae import CONFIG_FILE
from sae_harvest.train.sae.sharded_sae import digest_of

RUN_FILE, METRICS_FILE, EVALUATION_FILE = "run.json", "metrics.jsonl", "evaluation.json"
FAILED_FILE = "failed.json"
FORMAT = 2


def open_store(place: str | Path, out: Path, name: str = RUN_FILE) -> ActivationStore:
    """Open the store as it was when the run in `out` began, or as it is now without a run.

    Args:
        place: place of a sealed store.
        out: the run's folder, which may not exist yet.
        name: name of the record with the store's digest.
    """
    store, record = ActivationStore.open(place), out / name
    if record.exists():
        begun = _begun(read_json(record, "The run", "choose another --out"))
        if begun != store.digest:
            with contextlib.suppress(UnfinishedError):  # another store: `claim` says so
                return ActivationStore.open(place, begun)
    return store


def config_of(path: Path, content: Any, remedy: str) -> TrainConfig:
    """Return the configuration in the record of a run, of any version that can be read.

    Raises:
        RunError: the configuration is missing or invalid; names the file.
    """
    try:
        given = content["config"]
        activation = given.get("activation", "topk")
        # unused fields had the default of the version that trained the run
        unread = [name for name, readers in READERS.items() if activation not in readers]
        return TrainConfig.model_validate(
            {name: value for name, value in given.items() if name not in unread}
        )
    except ValidationError as error:
        reason = first_line(error)
    except (KeyError, TypeError, AttributeError):
        reason = "it has no config"
    raise RunError(f"{path} does not belong to a training run ({reason}); {remedy}.")


def _begun(record: Any) -> str | None:
    """Return the store's digest in a record of any content; `claim` reports what is wrong."""
    digest = record.get("store_digest") if isinstance(record, dict) else None
    return digest if isinstance(digest, str) else None


def describe_run(config: TrainConfig, store: ActivationStore, site: str) -> dict[str, Any]:
    """Return the content of run.json: everything that decides the result, except the device."""
    return {
        "format": FORMAT,
        "site": site,
        "store_digest": store.digest,
        "model": store.plan["model"],
        "config": config.model_dump(mode="json"),
    }


@contextlib.contextmanager
def claim(out: Path, description: dict[str, Any], name: str = RUN_FILE) -> Iterator[None]:
    """Hold `out` for the described run: create it, or check that it belongs to this run.

    Args:
        out: the folder, made if it is missing.
        description: fields that the record must contain.
        name: name of the record's file.

    Raises:
        RunError: the folder belongs to another run (names the differing fields) or to no run, or
            another process writes there.
    """
    record = out / name
    with claimed(out, name):
        if not record.exists():
            write_json(record, description)
        else:
            _compare(out, read_json(record, "The run", "choose another --out"), description)
        yield


def finished_evaluation(out: Path, digest: str | None = None) -> dict[str, Any] | None:
    """Return the evaluation in a folder, if it belongs to the SAE there and to `digest`."""
    path = out / EVALUATION_FILE
    if not (path.exists() and (out / CONFIG_FILE).exists()):
        return None
    found = read_record(path, Evaluation, "The run", "delete that file")
    there = digest_of(out)
    return found if found.get("sae_digest") == there and digest in (None, there) else None


def failure_of(out: Path) -> str | None:
    """Return the message of a failed run; None for other runs."""
    path = out / FAILED_FILE
    if not path.exists():
        return None
    remedy = "delete that file to try it again"
    return str(read_record(path, Failure, "The run", remedy)["sentence"])


def _compare(out: Path, found: Any, description: dict[str, Any]) -> None:
    """Raise `RunError` unless a record matches the description."""
    there = found.get("format") if isinstance(found, dict) else None
    if there != description["format"]:
        raise RunError(
            f"{out} holds a run in format {there}, begun by another version of this software, "
            f"which writes {description['format']}; end it with that version, or choose another "
            "--out."
        )
    old = _flat({key: value for key, value in found.items() if key in description})
    new = _flat(description)
    differing = [
        f"{name} (there {old.get(name)}, here {new.get(name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise RunError(
            f"{out} holds a run that differs in {', '.join(differing)}; give the same options to "
            "continue it, or choose another --out."
        )


def _flat(run: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries: keys are joined by dots, without the leading `config.`."""
    if not isinstance(run, dict):
        return {prefix.removesuffix(".").removeprefix("config."): run}
    items: dict[str, Any] = {}
    for key, value in run.items():
        items |= _flat(value, f"{prefix}{key}.")
    return items
