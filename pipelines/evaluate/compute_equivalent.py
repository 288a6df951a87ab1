"""Compute-equivalent: the pretraining compute of a model whose loss is that of the spliced model.

Gao et al. (2024), section 4.1: a dictionary loses as much as if the model had been trained with a
share of its compute. A table gives the loss that pretraining reaches with each compute. Its text
need not be the text of the evaluation: the increase of the loss is added to the table's last loss,
and the compute of that loss is found on the line through log(compute) and loss.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import InputError

PACKAGED = {"gpt2-124m": "gpt2_124m.csv"}
COLUMNS = ["compute", "loss"]


@dataclass(frozen=True, eq=False)
class ComputeTable:
    """Losses of one model during pretraining.

    >>> table = ComputeTable.read("gpt2-124m")
    >>> round(table.share(0.1), 3)
    0.558
    """

    name: str
    """Where the table comes from."""

    compute: npt.NDArray[np.float64]
    """Floating-point operations, rising [rows]."""

    loss: npt.NDArray[np.float64]
    """Nats per token, falling [rows]; the last one is that of the finished model."""

    @classmethod
    def read(cls, source: str | Path) -> ComputeTable:
        """Read a table.

        Args:
            source: `gpt2-124m`, or a CSV file with the columns compute and loss; lines that begin
                with # are left out.

        Raises:
            InputError: there is no such file, or it is not such a table.
        """
        name = str(source)
        try:
            if name in PACKAGED:
                text = files(__package__).joinpath(PACKAGED[name]).read_text()
            else:
                text = Path(source).read_text()
            lines = [line for line in text.splitlines() if line and not line.startswith("#")]
            rows = list(csv.reader(lines))
            if [cell.strip() for cell in rows[0]] != COLUMNS or len(rows) < 3:
                raise ValueError("expected the columns compute,loss and two rows or more")
            compute, loss = np.array(rows[1:], np.float64).T
        except OSError as error:
            raise InputError(
                f"{name} cannot be read ({error.strerror}); give {', '.join(PACKAGED)} or a CSV "
                "file with the columns compute and loss."
            ) from None
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{name} is no table of compute and loss ({error}); its first line must be "
                "compute,loss and every other line two numbers."
            ) from None
        if not np.isfinite([compute, loss]).all() or (compute <= 0).any():
            raise InputError(f"{name} has a number that is not finite, or a compute of 0 or less.")
        if (np.diff(compute) <= 0).any() or (np.diff(loss) >= 0).any():
            raise InputError(
                f"{name} must list rising compute and falling loss; leave out rows in which the "
                "loss rises again."
            )
        return cls(name, compute, loss)

    def share(self, delta_ce: float) -> float | None:
        """Return the share of the compute whose model has a loss that is higher by `delta_ce`.

        Returns:
            1 for no increase or a decrease; None for a loss above the table's first.
        """
        loss = self.loss[-1] + max(delta_ce, 0.0)
        if loss > self.loss[0]:
            return None
        return float(np.exp(np.interp(-loss, -self.loss, np.log(self.compute / self.compute[-1]))))
