"""Feature tables in Python: data frames of latents, SQL, live text and steering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.features.reading.query import asked, connect, reading
from sae_harvest.pipelines.features.tables.folder import require_run

if TYPE_CHECKING:
    from sae_harvest.pipelines.live import LiveModel, LiveText
    from sae_harvest.pipelines.steer import Generated

__all__ = ["Features", "Latent", "open_features"]


@dataclass(frozen=True)
class Latent:
    """One latent in the tables; docs/tables.md describes every column.

    >>> latent = open_features("runs/demo/features").latent(3)
    >>> latent.number, "density" in latent.statistics
    (3, True)
    """

    number: int
    """Number of the latent, from 0."""
    statistics: dict[str, Any]
    """Its row of the table `latents`: density, maximum, most frequent tokens, logit lens, ..."""
    contexts: pd.DataFrame
    """Its contexts with their documents, by stratum and rank; `activations` is float32 [tokens]."""
    neighbours: pd.DataFrame
    """Its nearest latents by decoder cosine and by firing together."""
    histogram: pd.DataFrame
    """Bounds and counts of the bins of its activations."""
    tokens: pd.DataFrame
    """The tokens that it fires on most, with counts."""


class Features:
    """The feature tables in a folder.

    >>> features = open_features("runs/demo/features")
    >>> features.sql("SELECT latent, density FROM latents ORDER BY latent LIMIT 2").shape
    (2, 2)

    Args:
        path: folder that `build_features` or `sae-features build` has written.

    Raises:
        RunError: the folder holds no finished tables.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.run: dict[str, Any] = require_run(self.path)
        """The origin of the tables: store, SAE, model, settings; the contents of `run.json`."""
        connection = connect(self.path)
        with reading(self.path):
            [(self._n_latents,)] = connection.execute("SELECT count(*) FROM latents").fetchall()
        connection.close()

    def __len__(self) -> int:
        """Return the number of latents."""
        return int(self._n_latents)

    def __repr__(self) -> str:
        return f"Features({str(self.path)!r}, {len(self):,} latents)"

    def sql(self, query: str) -> pd.DataFrame:
        """Return the answer to one SELECT over the tables.

        The tables are latents, contexts, histograms, neighbours, tokens, documents and firings, and
        explanations where there are any. A query reads no other file.

        >>> open_features("runs/demo/features").sql("SELECT count(*) AS n FROM latents").columns[0]
        'n'

        Raises:
            InputError: the query is not one SELECT, or DuckDB cannot run it.
            RunError: a table is damaged.
        """
        with asked(self.path, query) as question:
            return question.arrow().read_all().to_pandas()

    def latent(self, number: int) -> Latent:
        """Everything about one latent.

        >>> open_features("runs/demo/features").latent(3).contexts.columns[0]
        'stratum'

        Raises:
            InputError: there is no such latent.
            RunError: a table is damaged.
        """
        if not 0 <= number < len(self):
            raise InputError(
                f"There is no latent {number}; these tables hold 0 to {len(self) - 1}."
            )
        mine = f"WHERE latent = {int(number)}"
        statistics = self.sql(f"SELECT * EXCLUDE latent FROM latents {mine}")
        return Latent(
            number=int(number),
            statistics=statistics.iloc[0].to_dict(),
            contexts=self.sql(
                "SELECT c.* EXCLUDE latent, d.source, d.title, d.url FROM contexts c "
                f"LEFT JOIN documents d USING (document) {mine} ORDER BY stratum, rank"
            ),
            neighbours=self.sql(f"SELECT * EXCLUDE latent FROM neighbours {mine}"),
            histogram=self.sql(f"SELECT * EXCLUDE latent FROM histograms {mine} ORDER BY bin"),
            tokens=self.sql(f"SELECT * EXCLUDE latent FROM tokens {mine} ORDER BY count DESC"),
        )

    @cached_property
    def live(self) -> LiveModel:
        """The model and the SAE behind the tables, loaded at first use.

        Raises:
            RunError: the store or the SAE no longer exists.
            InputError: the model no longer exists, or has other weights.
        """
        from sae_harvest.pipelines.live import LiveModel

        return LiveModel.open(self.path)

    def activations(self, text: str) -> LiveText:
        """Return the latents that fire on each token of a text.

        >>> open_features("runs/demo/features").activations("the cat sees").token_texts[0]
        'the'

        Returns:
            Token texts, and `indices` int32 [tokens, w] and `values` float32 [tokens, w] of the
            active latents, by decreasing value; a value of 0 means no latent.

        Raises:
            InputError: the text has no tokens, or more than fit in a context.
        """
        return self.live.activations(text)

    def steer(
        self,
        prompt: str,
        clamps: Mapping[int, float],
        *,
        n_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generated:
        """Continue a prompt while latents are held at given activations.

        >>> features = open_features("runs/demo/features")
        >>> features.steer("the cat sees", {3: 0.0}, n_tokens=2).token_texts != []
        True

        Args:
            prompt: text before the continuation.
            clamps: latent → activation, in the units of the tables; 0 removes the latent.
            n_tokens: number of tokens to generate, at most.
            temperature: 0 takes the likeliest token; above 0, tokens are drawn.
            seed: seed of the draws.

        Raises:
            InputError: a latent or a number is out of range, or the prompt is empty or too long.
        """
        from sae_harvest.pipelines.steer import Clamp, generate

        wanted = [Clamp(latent, value) for latent, value in clamps.items()]
        return generate(self.live, prompt, wanted, n_tokens, temperature, seed)


def open_features(path: str | Path) -> Features:
    """Open the feature tables in a folder.

    >>> open_features("runs/demo/features")  # doctest: +ELLIPSIS
    Features('runs/demo/features', ... latents)

    Args:
        path: folder that `build_features` or `sae-features build` has written.

    Raises:
        RunError: the folder holds no finished tables.
    """
    return Features(path)
