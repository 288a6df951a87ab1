"""SAEs in the formats of other packages: one module each, with `read` and `write`.

    openai               a .pt file of OpenAI's sparse_autoencoder
    saelens              a folder of SAELens, version 6
    sparsify             a folder of EleutherAI's sparsify (eai-sparsify)
    dictionary_learning  a folder of dictionary_learning, ae.pt and config.json

Fields that a format lacks are folded into the weights if that is exact, and refused otherwise.
Latents keep their activations, so results about a latent hold for the exported file.
`docs/formats.md` has the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from sae_harvest.common.atomic import making, new_folder, writing
from sae_harvest.common.errors import InputError

if TYPE_CHECKING:
    import torch

    from sae_harvest.train.sae.formats.reading import Origin
    from sae_harvest.train.sae.sae import SAE

FORMATS = ("openai", "saelens", "sparsify", "dictionary_learning")


class Format(Protocol):
    """The functions that each module of this package offers."""

    def read(self, path: Path, given: Origin) -> SAE:
        """Return the SAE at the path. Raise `InputError` if there is none that we support."""

    def write(self, sae: SAE, path: Path) -> None:
        """Write the file or folder. Raises InputError if the format cannot hold the SAE."""


def format_named(name: str) -> Format:
    """Return the module of a format. Raise `InputError`, naming the formats, for another name."""
    if name not in FORMATS:
        raise InputError(f"There is no format {name!r}; choose one of {', '.join(FORMATS)}.")
    return cast(Format, import_module(f"sae_harvest.train.sae.formats.{name}"))


def detect_format(path: Path) -> str | None:
    """Return the format's name of a file or folder, from its file names; None for ours.

    Raises:
        InputError: the format is unknown.
    """
    names = {item.name for item in path.iterdir()} if path.is_dir() else set()
    if "config.json" in names and "sae.safetensors" in names:
        return None
    if "ae.pt" in names:
        return "dictionary_learning"
    if "cfg.json" in names:
        return "saelens" if "sae_weights.safetensors" in names else "sparsify"
    if path.is_file() and path.suffix == ".pt":
        return "openai"
    raise InputError(
        f"{path} holds no SAE that can be recognised; give a folder of sae-harvest, SAELens, "
        "sparsify or dictionary_learning, or a .pt file of OpenAI's sparse_autoencoder."
    )


def load_sae(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    site: str | None = None,
    target_site: str | None = None,
) -> SAE:
    """Load an SAE of sae-harvest or of another package.

    >>> load_sae("runs/demo/sae").config.activation
    'topk'

    Args:
        path: folder of sae-harvest, SAELens 6, sparsify or dictionary_learning, or a `.pt` file of
            OpenAI's sparse_autoencoder.
        device: device of its tensors, "cpu" or "cuda".
        site: site that it reads, such as "resid_post.12", if its files do not say.
        target_site: site that a transcoder predicts, if its files do not say.

    Raises:
        InputError: the path holds no SAE, the SAE is not supported, or the site is not known.
        RunError: a file is damaged.
    """
    from sae_harvest.train.sae.formats.reading import Origin
    from sae_harvest.train.sae.sae import SAE

    path = Path(path)
    name = detect_format(path)
    if name is None:
        return SAE.load(path, device)
    return format_named(name).read(path, Origin(site, target_site)).to(device)


def export_sae(folder: Path, name: str, out: Path) -> SAE:
    """Write the SAE of a folder in another package's format. `out` must not exist.

    Raises:
        InputError: the folder holds no SAE, the format cannot hold it, or `out` exists.
    """
    from sae_harvest.train.sae.sae import SAE

    peer = format_named(name)
    sae = SAE.load(folder)
    _must_be_free(out)
    with _whole(out) as temporary:
        peer.write(sae, temporary)
    return sae


def import_sae(name: str, path: Path, out: Path, given: Origin) -> SAE:
    """Save an SAE of another package in our own format. `out` must not exist.

    Raises:
        InputError: the path holds no SAE of the format, the SAE is not supported, or `out` exists.
        RunError: a file is missing or damaged.
    """
    peer = format_named(name)
    _must_be_free(out)
    sae = peer.read(path, given)
    with _whole(out) as temporary:
        sae.save(temporary)
    return sae


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a temporary file or folder that gets the name `out` when the block ends."""
    new_folder(out.parent)
    with writing(out), making(out) as temporary:
        yield temporary


def _must_be_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise InputError(f"{out} exists and would be overwritten; give another --out.")
