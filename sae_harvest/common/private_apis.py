"""Every use of another package's private API, each with the reason for it.

An API is private if its name begins with an underscore, or if its package does not document its
module. Any release may remove such a name: `tests/test_private_apis.py` reports removed ones, and
`tests/test_rooms.py` refuses private APIs elsewhere. The only exception is
`pipelines/viewer/connections.py`, which derives a class from one of uvicorn's.

Packages are imported inside the functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

RAY_ON_THIS_MACHINE = {"_node_ip_address": "127.0.0.1"}
"""Option of `ray.init` that keeps every port of a local Ray off the network.

Ray documents it as hidden and unstable. Read in Ray 2.60. Once gone, `ray.init` refuses it with a
RuntimeError.
"""


def silence_ray_workers() -> None:
    """Stop Ray from printing the output and the deaths of its workers in this process.

    Ray prints deaths to standard output, `log_to_driver` or not, unless its debugger has set this
    flag; our own log reports them. Read in Ray 2.60. Once the flag is gone, the
    lines are printed; once the module is gone, this raises AttributeError.
    """
    import ray

    ray._private.worker._worker_logs_enabled = False


def multiplies_int8() -> bool:
    """True if the CPU has AVX-512 VNNI. Without it, torch emulates products of 8-bit integers.

    The documented `torch.cpu.get_capabilities` is not in torch 2.6, the oldest that we allow. Read
    in torch 2.13. Once gone, this raises AttributeError: take `get_capabilities` then.
    """
    import torch

    supported: bool = torch.cpu._is_vnni_supported()
    return supported


def int8_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return the exact product of int8 [m, k] and [k, n] as int32 [m, n]; `torch.mm` cannot.

    Read in torch 2.13. Once gone, this raises AttributeError, and the encoder of processors
    with AVX-512 VNNI has to use float32.
    """
    import torch

    return torch._int_mm(a, b, out=out)


def n_changes(tensor: Tensor) -> int:
    """Return the number of times a tensor, or one that shares its memory, was changed in place.

    Autograd counts changes, but has no documented way to read the count. Inference tensors have no
    count. Read in torch 2.13. Once gone, this raises AttributeError: copy every captured tensor
    then.
    """
    return tensor._version


def gguf_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the decoded weights of a GGUF file, under their names in a model.

    Transformers documents only `from_pretrained(gguf_file=…)`. That requires accelerate and marks
    the model as quantised, which `save_pretrained` then refuses. Read in transformers 5.23.
    Once gone, this raises ImportError, and GGUF models cannot be converted.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    found: dict[str, Any] = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=model
    )
    tensors: dict[str, Tensor] = found["tensors"]
    return tensors
