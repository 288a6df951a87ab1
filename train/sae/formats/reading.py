"""Helpers for reading all formats: checked tensors and fields, and the origin of an SAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.parsing import first_line
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.run.files import read_json
from sae_harvest.train.sae.sae import SAE

NOTE = "sae_harvest"  # the key under which an exported JSON file says where the SAE comes from
NOTED = ("site", "target_site", "model", "model_weights", "rule")
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REMEDY = "copy or export the SAE again"


@dataclass(frozen=True)
class Origin:
    """The origin of an SAE, as far as known."""

    site: str | None = None
    """Site that the SAE reads."""
    target_site: str | None = None
    """Site that a transcoder predicts."""
    model: str | None = None
    """Name of the model that it was trained on."""


def note(sae: SAE) -> dict[str, Any]:
    """Return the SAE's digest and origin, for formats that can hold further fields."""
    config = sae.config.model_dump(mode="json")
    return {"digest": sae.digest} | {name: config[name] for name in NOTED}


def origin_fields(
    path: Path, given: Origin, found: Mapping[str, Any], transcoder: bool
) -> dict[str, Any]:
    """Return the origin fields of `SAEConfig`: given values, else those of the file.

    Args:
        given: values given by the user.
        found: values in the file, under the names of `SAEConfig`.

    Raises:
        InputError: the site is neither given nor known.
    """
    fields = {name: value for name, value in found.items() if name in NOTED and value is not None}
    if given.model is not None and given.model != fields.get("model"):
        fields.pop("model_weights", None)
    stated = {"site": given.site, "target_site": given.target_site, "model": given.model}
    fields |= {name: value for name, value in stated.items() if value is not None}
    if "site" not in fields:
        raise InputError(
            f"{path} does not say which activations the SAE reads; give --site, resid_post.12 say."
        )
    if transcoder and "target_site" not in fields:
        raise InputError(
            f"{path} holds a transcoder and does not say which activations it predicts; give "
            "--target-site, mlp_out.12 say."
        )
    if not transcoder:
        if given.target_site is not None:
            raise InputError(
                f"{path} holds an SAE that reconstructs what it reads; leave out --target-site."
            )
        fields.pop("target_site", None)
    return fields


class Fields:
    """A JSON object of a file, read by name and type."""

    def __init__(self, path: Path, title: str) -> None:
        self.path = path
        values = read_json(path, title, REMEDY)
        if not isinstance(values, dict):
            raise RunError(f"{path} is not a JSON object, as {title} has; {REMEDY}.")
        self.values: dict[str, Any] = values

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return the value, or the default if it is missing or null.

        Raises:
            RunError: the value has another type, or is not finite.
        """
        value = self.values.get(name)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(each.__name__ for each in kinds)
            raise RunError(f"{self.path} has {name} {value!r:.60}, expected {names}; {REMEDY}.")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise RunError(f"{self.path} has a {name} of too many digits; {REMEDY}.")
        return value

    def need(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Return the value. Raise `RunError` if it is missing, null, or of another type."""
        value = self.get(name, kind)
        if value is None:
            raise RunError(f"{self.path} lacks {name}; {REMEDY}.")
        return value


def settings(folder: Path, name: str, package: str) -> Fields:
    """Return the JSON object beside the weights. Raises InputError if the folder has none."""
    if not (folder / name).is_file():
        raise refusal(str(folder), f"holds no SAE of {package} (no {name})", "give such a folder")
    return Fields(folder / name, f"The SAE of {package}")


class Tensors:
    """The tensors of a file, taken by name until none is left."""

    def __init__(self, tensors: Mapping[str, Any], path: Path) -> None:
        self._left = dict(tensors)
        self._path = path

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return the tensor as float32, contiguous, of the given shape; None stands for any size.

        Raises:
            RunError: it is missing, has another shape, or has numbers that are not finite.
        """
        tensor = self._left.pop(name, None)
        if not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise RunError(f"{self._path} has no tensor {name}; {REMEDY}.")
        fits = tensor.dim() == len(shape) and all(
            size in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
        )
        if not fits or not tensor.is_floating_point():
            expected = [("any" if size is None else size) for size in shape]
            raise RunError(
                f"{self._path} has {name} {tensor.dtype} {list(tensor.shape)}, expected floating "
                f"point {expected}; {REMEDY}."
            )
        tensor = tensor.to(torch.float32).contiguous()
        if not bool(tensor.isfinite().all()):
            raise RunError(f"{self._path} has numbers in {name} that are not finite; {REMEDY}.")
        return tensor

    def count(self, name: str) -> int:
        """Return an integer tensor of one element as int. Raise `RunError` for anything else."""
        tensor = self._left.pop(name, None)
        if (
            not isinstance(tensor, Tensor)
            or not _is_plain(tensor)
            or tensor.numel() != 1
            or tensor.dtype not in WHOLE
        ):
            raise RunError(f"{self._path} has no whole number {name}; {REMEDY}.")
        return int(tensor)

    def has(self, name: str) -> bool:
        """True if a tensor of that name is left."""
        return name in self._left

    def drop(self, *names: str) -> None:
        """Drop tensors that do not affect the SAE's computation."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raise InputError if a tensor is left: the SAE would compute something else."""
        if self._left:
            names = sorted(str(name) for name in self._left)
            shown = ", ".join(f"{name!a:.60}".strip("'") for name in names[:5])
            raise InputError(
                f"{self._path} has {shown}, which this SAE cannot take over; import an SAE "
                "without it."
            )


def _is_plain(tensor: Tensor) -> bool:
    """True if a tensor stores each of its numbers once.

    A file may describe a view that repeats a few stored numbers many times; a copy would be huge.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def build(path: Path, fields: Mapping[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """Return the SAE, sized by its tensors. Raise InputError if the fields are inconsistent."""
    n_latents, d_in = tensors["W_enc"].shape
    try:
        config = SAEConfig.model_validate({"d_in": d_in, "n_latents": n_latents, **fields})
    except ValidationError as error:
        raise InputError(
            f"{path} describes an SAE that cannot be ({first_line(error)}); {REMEDY}."
        ) from None
    return SAE(config, **tensors)


def refusal(subject: str, what: str, remedy: str) -> InputError:
    """Return the error for an SAE that a format cannot hold or that we cannot read."""
    return InputError(f"{subject} {what}; {remedy}.")
