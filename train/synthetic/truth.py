"""What is true of a synthetic store: its features, and every firing of them.

GROUND_TRUTH/directions.safetensors   directions: float32 [features, width], rows of length 1
GROUND_TRUTH/features.parquet         feature, parent (null: none), group (null: none), frequency
GROUND_TRUTH/firings/000000.parquet   row, feature, magnitude: the firings of one shard, in order
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae_harvest.common.atomic import new_folder, replacing
from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.parsing import first_line
from sae_harvest.train.run.files import read_tensors, write_tensors
from sae_harvest.train.synthetic.config import SyntheticConfig

DIRECTIONS_FILE, FEATURES_FILE, FIRINGS = "directions.safetensors", "features.parquet", "firings"
FORMAT = "1"
REMEDY = "run `train-sae synthetic` again into another folder"
GROUP = 8  # features that are correlated
DIRECTIONS, GROUPS, CONTEXTS = range(3)  # streams of random numbers
_VERSION = {b"sae_harvest_ground_truth": FORMAT.encode()}
FEATURES_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("parent", pa.int32()),
        ("group", pa.int32()),
        ("frequency", pa.float64()),
    ],
    _VERSION,
)
FIRINGS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("feature", pa.int32()), ("magnitude", pa.float32())], _VERSION
)


@dataclass(frozen=True, eq=False)
class Features:
    """The true features of a synthetic store."""

    directions: npt.NDArray[np.float32]
    """What a firing of magnitude 1 adds to a row, of length 1 [features, width]."""

    parent: npt.NDArray[np.int64]
    """Feature without which it never fires [features]; -1: none."""

    group: npt.NDArray[np.int64]
    """Number of the group of correlated features [features]; -1 for children."""

    frequency: npt.NDArray[np.float64]
    """Expected share of the rows on which it fires [features]."""

    def __len__(self) -> int:
        return len(self.parent)

    @classmethod
    def of(cls, config: SyntheticConfig) -> Features:
        """Draw the features of a configuration."""
        rng = np.random.default_rng([config.seed, DIRECTIONS])
        directions = rng.standard_normal((config.features, config.width))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        group = np.full(config.features, -1, np.int64)
        shuffled = np.random.default_rng([config.seed, GROUPS]).permutation(config.n_roots)
        group[: config.n_roots] = shuffled // GROUP
        return cls(directions.astype(np.float32), config.parent(), group, config.frequencies())

    def save(self, folder: Path) -> None:
        """Write directions and features into the folder (made if missing). Raises RunError."""
        new_folder(folder)
        write_tensors(folder / DIRECTIONS_FILE, {"directions": torch.from_numpy(self.directions)})
        arrays = [
            pa.array(np.arange(len(self)), pa.int32()),
            pa.array(self.parent, pa.int32(), mask=self.parent < 0),
            pa.array(self.group, pa.int32(), mask=self.group < 0),
            pa.array(self.frequency),
        ]
        with replacing(folder / FEATURES_FILE) as temporary:
            pq.write_table(pa.Table.from_arrays(arrays, schema=FEATURES_SCHEMA), temporary)

    @classmethod
    def load(cls, folder: Path) -> Features:
        """Read what `save` wrote.

        Raises:
            InputError: the folder holds no ground truth.
            RunError: a file is missing or damaged.
        """
        path = folder / FEATURES_FILE
        if not path.is_file():
            raise InputError(
                f"{folder} holds no ground truth (no {FEATURES_FILE}); give the --out folder of "
                "`train-sae synthetic`."
            )
        table = _read(path, FEATURES_SCHEMA)
        parent, group = (
            table[name].fill_null(-1).to_numpy().astype(np.int64) for name in ("parent", "group")
        )
        tensors = read_tensors(folder / DIRECTIONS_FILE, "The ground truth", REMEDY)
        directions = tensors.get("directions")
        if directions is None or directions.dim() != 2 or len(directions) != len(table):
            raise RunError(f"{folder / DIRECTIONS_FILE} does not fit {path}; {REMEDY}.")
        return cls(directions.numpy(), parent, group, table["frequency"].to_numpy())


@dataclass(frozen=True, slots=True, eq=False)
class Firings:
    """Firings of true features, by row and feature."""

    row: npt.NDArray[np.int64]
    """Number of the row in the store [firings]."""

    feature: npt.NDArray[np.int64]
    """Number of the feature [firings]."""

    magnitude: npt.NDArray[np.float32]
    """Factor on the feature's direction [firings]."""

    def save(self, folder: Path, shard: int) -> None:
        """Write the firings of a shard. Raises RunError."""
        new_folder(folder / FIRINGS)
        arrays = [
            pa.array(self.row),
            pa.array(self.feature, pa.int32()),
            pa.array(self.magnitude),
        ]
        with replacing(_firings_file(folder, shard)) as temporary:
            table = pa.Table.from_arrays(arrays, schema=FIRINGS_SCHEMA)
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def load(cls, folder: Path, shard: int) -> Firings:
        """Read the firings of a shard. Raise `RunError` if the file is missing or damaged."""
        table = _read(_firings_file(folder, shard), FIRINGS_SCHEMA)
        row, feature, magnitude = (table[name].to_numpy() for name in FIRINGS_SCHEMA.names)
        return cls(row, feature.astype(np.int64), magnitude)


def _firings_file(folder: Path, shard: int) -> Path:
    return folder / FIRINGS / f"{shard:06d}.parquet"


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a table of the ground truth. Raise `RunError` if it is missing, damaged or another."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise RunError(f"{path} is missing; {REMEDY}.") from None
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} is damaged ({first_line(error)}); {REMEDY}.") from None
    if not table.schema.equals(schema):
        raise RunError(f"{path} is not a table of ground truth of this version; {REMEDY}.")
    return table
