"""The records in a run's folder as they are read back: values of the types that were written.

A folder may be damaged, or come from somebody who means harm. Each class is the part of a record
that is used; `train.run.files.read_record` checks a file against it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sae_harvest.common.parsing import safe_name

Name = Annotated[str, AfterValidator(safe_name)]  # of a folder inside the record's own
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """Types as in JSON, nothing converted; what a class does not name is let through."""

    model_config = ConfigDict(strict=True, extra="allow")


class Figures(Record):
    """Figures of one choice of held-out rows; None where there are no rows."""

    rows: int = Field(ge=0)
    fvu: Finite | None
    l0: Finite | None
    dead_share: Finite | None


class Evaluation(Record):
    """evaluation.json."""

    without_outliers: Figures
    with_outliers: Figures
    sae_digest: str


class Failure(Record):
    """failed.json."""

    sentence: str


class Run(Record):
    """run.json."""

    format: int
    site: str
    store_digest: str
    config: dict[str, Any]


class Sweep(Record):
    """sweep.json; passes: names of the members that are trained together."""

    members: dict[Name, dict[str, Any]] = Field(min_length=1)
    passes: list[list[str]] | None = None


class Line(Record):
    """A line of metrics.jsonl, of which `train-sae status` shows some."""

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
    """state.json of a checkpoint. xxh3: hashes of its other files, in hex."""

    step: int = Field(ge=1, lt=2**63)
    total_variance: Finite = Field(gt=0)
    loader: Loader
    xxh3: dict[str, str]
