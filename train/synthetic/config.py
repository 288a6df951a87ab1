"""The settings of a synthetic store, and the frequency of each feature that follows from them."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_harvest.common.numbers import Count
from sae_harvest.common.options import LocalPath
from sae_harvest.common.settings import CommandSettings, Option
from sae_harvest.store.layout import MAX_WIDTH

MAX_FEATURES = 1 << 16
MAX_FREQUENCY = 0.2  # of a feature that is no child
MAX_CHILDREN = 256
CONTEXT_LENGTH = 128  # rows of a context; each context is a document of its own
BISECTIONS = 100


class SyntheticConfig(BaseModel):
    """What the rows of a synthetic store are made of.

    >>> config = SyntheticConfig(features=64, width=32, l0=4, parents=4)
    >>> round(float(config.frequencies().sum()), 6)
    4.0

    A row is the sum of the directions of the features that fire on it, each times the magnitude
    of its firing, and Gaussian noise. docs/synthetic.md has the formulas.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: Annotated[Count, Option("Features")] = Field(
        512, ge=1, le=MAX_FEATURES, description="number of true features; children are among them"
    )
    width: Annotated[Count, Option("Features")] = Field(
        128, ge=1, le=MAX_WIDTH, description="numbers per row; fewer than features: superposition"
    )
    l0: Annotated[float, Option("Features")] = Field(
        8.0, gt=0, le=MAX_FEATURES, description="mean number of features that fire on a row"
    )
    exponent: Annotated[float, Option("Features")] = Field(
        1.0,
        ge=0,
        le=10,
        description="exponent of the power law of frequencies: the feature of rank i fires on a "
        "share of rows proportional to i^-exponent, at most 0.2",
    )
    parents: Annotated[Count, Option("Features")] = Field(
        32, ge=0, le=MAX_FEATURES, description="features that have children"
    )
    children: Annotated[Count, Option("Features")] = Field(
        3,
        ge=1,
        le=MAX_CHILDREN,
        description="children of each parent; a child fires only on rows of its parent, and at "
        "most one of them at a time",
    )
    child_share: Annotated[float, Option("Features", "SHARE")] = Field(
        0.5, ge=0, le=1, description="share of a parent's rows on which one of its children fires"
    )
    correlation: Annotated[float, Option("Features")] = Field(
        0.3,
        ge=0,
        lt=1,
        description="correlation, before the threshold, of features of the same group of 8; half "
        "of it comes from the document",
    )
    spread: Annotated[float, Option("Rows")] = Field(
        0.25, ge=0, le=1, description="standard deviation of the logarithm of magnitudes; mean is 1"
    )
    noise: Annotated[float, Option("Rows")] = Field(
        0.2, ge=0, le=1e3, description="length of a row's noise, in mean magnitudes"
    )
    rows: Annotated[Count, Option("Rows", "ROWS")] = Field(
        262_144, ge=1, le=1 << 40, description="rows of the store, in whole contexts of 128"
    )
    seed: Annotated[Count, Option("Rows")] = Field(0, ge=0, description="seed of all choices")

    @model_validator(mode="after")
    def _is_possible(self) -> SyntheticConfig:
        if self.parents * (self.children + 2) > self.features:
            raise ValueError(
                f"parents must be at most features / (children + 2), got {self.parents} > "
                f"{self.features} / {self.children + 2}"
            )
        most = self._frequencies_of(MAX_FREQUENCY * self.features**self.exponent).sum()
        if self.l0 > most:
            raise ValueError(
                f"l0 must be at most {most:.4g} here, since no frequency is above "
                f"{MAX_FREQUENCY:g}, got {self.l0:g}"
            )
        return self

    @property
    def n_roots(self) -> int:
        """Number of features that are no children; they come first, by decreasing frequency."""
        return self.features - self.parents * self.children

    @property
    def n_contexts(self) -> int:
        """Number of contexts, each a document."""
        return -(-self.rows // CONTEXT_LENGTH)

    def parent(self) -> npt.NDArray[np.int64]:
        """Return the parent of each feature, int64 [features]; -1 for a feature without one.

        Parents are spread evenly over the more frequent half of the features without a parent.
        """
        found = np.full(self.features, -1, np.int64)
        if self.parents:
            parents = np.arange(self.parents) * (self.n_roots // 2) // self.parents
            found[self.n_roots :] = np.repeat(parents, self.children)
        return found

    def frequencies(self) -> npt.NDArray[np.float64]:
        """Return the share of rows on which each feature fires, float64 [features]; sum is l0."""
        low, high = 0.0, MAX_FREQUENCY * self.features**self.exponent
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self._frequencies_of(middle).sum() < self.l0:
                low = middle
            else:
                high = middle
        return self._frequencies_of(high)

    def _frequencies_of(self, first: float) -> npt.NDArray[np.float64]:
        """Return the frequencies if the power law gave the most frequent feature `first`."""
        rank = np.arange(1, self.n_roots + 1, dtype=np.float64)
        found = np.empty(self.features)
        found[: self.n_roots] = np.minimum(MAX_FREQUENCY, first * rank**-self.exponent)
        parent = self.parent()[self.n_roots :]
        found[self.n_roots :] = found[parent] * self.child_share / self.children
        return found


class SyntheticPlaces(BaseModel):
    """Where a synthetic store is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Annotated[LocalPath, Option("Places", "FOLDER")] = Field(
        description="folder to write: the store in store/, what is true of it in ground_truth/"
    )


class SyntheticSettings(CommandSettings):
    """The settings of `train-sae synthetic`."""

    models = (SyntheticPlaces, SyntheticConfig)

    def places(self) -> SyntheticPlaces:
        """Return where to write. Raise `click.UsageError` for a bad value."""
        return self.read(SyntheticPlaces)

    def config(self, **defaults: Any) -> SyntheticConfig:
        """Return the configuration. Raise `click.UsageError` for a bad value."""
        return self.read(SyntheticConfig, defaults)
