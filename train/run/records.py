"""The records in a run's folder, with the types that are checked when they are read.

A folder may be damaged or malicious. Each class describes the fields of a record that are used;
`train.run.files.read_record` checks a file against it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sae_harvest.common.parsing import safe_name

Name = Annotated[str, AfterValidator(safe_name)]  # name of a folder beside the record
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """Base of records: JSON types without conversion; unknown fields are allowed."""

    model_config = ConfigDict(strict=True, extra="allow")


class Figures(Record):
    """Figures of one choice of held-out rows; None if there are no rows."""

    rows: int = Field(ge=0)
    fvu: Finite | None
    l0: Finite | None
    dead_share: Finite | None


class Evaluation(Record):
    """The content of evaluation.json."""

    without_outliers: Figures
    with_outliers: Figures
    sae_digest: str


class Failure(Record):
    """The content of failed.json."""

    sentence: str


class Run(Record):
    """The content of run.json."""

    format: int
    site: str
    store_digest: str
    config: dict[str, Any]


class Sweep(Record):
    """The content of sweep.json."""

    members: dict[Name, dict[str, Any]] = Field(min_length=1)
    passes: list[list[str]] | None = None
    """Names of the members that are trained together, pass by pass."""


class Line(Record):
    """A line of metrics.jsonl: the values that `train-sae status` shows."""

    step: int = Field(ge=0, lt=2**63)
    tokens: int = Field(0, ge=0, lt=2**63)
    fvu: Finite | None = None
    l0: Finite | None = None
    dead_share: Finite | None = None


class Loader(Record):
    """The position in the stream of batches; `ShuffledLoader.load_state` compares the rest."""

    epoch: int = Field(ge=0, lt=2**63)
    step: int = Field(ge=0, lt=2**63)


class State(Record):
    """The content of a checkpoint's state.json."""

    step: int = Field(ge=1, lt=2**63)
    total_variance: Finite = Field(gt=0)
    loader: Loader
    xxh3: dict[str, str]
    """File name → xxh3-128 of the checkpoint's other files, in hex."""
