"""SAEs in the formats of other packages: one module each, with `read` and `write`.

    openai               a .pt file of OpenAI's sparse_autoencoder
    saelens              a folder of SAELens, version 6
    sparsify             a folder of EleutherAI's sparsify (eai-sparsify)
    dictionary_learning  a folder of dictionary_learning, ae.pt and config.json

What a format cannot hold is folded into the weights where that is exact, and refused otherwise.
Latents keep their values: what was said about a latent holds for the exported file.
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
        """The SAE at the path. Raises InputError if it is none, or one that SAE cannot be."""

    def write(self, sae: SAE, path: Path) -> None:
        """Write the file or folder. Raises InputError if the format cannot hold the SAE."""


def format_named(name: str) -> Format:
    """Return the module of a format. Raises InputError, naming the formats there are."""
    if name not in FORMATS:
        raise InputError(f"There is no format {name!r}; choose one of {', '.join(FORMATS)}.")
    return cast(Format, import_module(f"sae_harvest.train.sae.formats.{name}"))


def detect_format(path: Path) -> str | None:
    """Name of the format of a file or folder, by the files that are there; None for ours.

    Raises:
        InputError: it is none of them.
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
    """Load an SAE of ours or of another package, whichever the path holds.

    >>> load_sae("runs/demo/sae").config.activation
    'topk'

    Args:
        path: folder of sae-harvest, SAELens 6, sparsify or dictionary_learning, or a `.pt` file of
            OpenAI's sparse_autoencoder.
        device: where its tensors are wanted, "cpu" or "cuda".
        site: which activations it reads, such as "resid_post.12", if its files do not say.
        target_site: which activations a transcoder predicts, if its files do not say.

    Raises:
        InputError: the path holds no SAE, or one that ours cannot be, or the site is not known.
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
    """Write the SAE of a folder in another package's format, where nothing is yet.

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
    """Save the SAE that another package has written as ours, where nothing is yet.

    Raises:
        InputError: the path holds no SAE of the format, or one that ours cannot be, or `out`
            exists. RunError: a file is missing or damaged.
    """
    peer = format_named(name)
    _must_be_free(out)
    sae = peer.read(path, given)
    with _whole(out) as temporary:
        sae.save(temporary)
    return sae


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A file or folder to write, which is called `out` once all of it is there."""
    new_folder(out.parent)
    with writing(out), making(out) as temporary:
        yield temporary


def _must_be_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise InputError(f"{out} exists and would be overwritten; give another --out.")
