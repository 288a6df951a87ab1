"""A trained dictionary: encode rows to a few latents, decode them back, load and save.

x' = x / input_scale
latents = TopK(ReLU(W_enc (x' - b_dec) + b_enc))
x_hat = (W_dec^T latents + b_dec) * input_scale
"""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from store.errors import InputError, RunError
from train.config import SAEConfig
from train.files import read_json, read_tensors, write_tensors, write_text
from train.kernels import kernels_for

CONFIG_FILE, TENSORS_FILE = "config.json", "sae.safetensors"
LEAST_MARGIN = 8  # candidates beyond k: the low-precision order is wrong by about two places


def candidates(k: int, n_latents: int) -> int:
    """How many latents to choose in low precision, so that the exact k largest are among them.

    bfloat16 inputs put an error of about 0.004 standard deviations on a pre-activation. Among
    24,576 latents about one lies that close to the 32nd largest; the margin is eight.
    """
    return min(n_latents, k + max(LEAST_MARGIN, k // 8))


class SAE:
    """A TopK sparse autoencoder.

    Args:
        config: shape, k, normalisation.
        W_enc, W_dec: float32 [n_latents, d_in], a latent is a row; decoder rows have unit norm.
        b_enc: float32 [n_latents]. b_dec: float32 [d_in].
    """

    def __init__(
        self, config: SAEConfig, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor
    ) -> None:
        self.config = config
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = W_enc, W_dec, b_enc, b_dec
        self.kernels = kernels_for(W_enc.device)
        self._low: Tensor | None = None
        self._stale = False
        for name, tensor in self.tensors().items():
            expected = self.shapes(config)[name]
            if tuple(tensor.shape) != expected or tensor.dtype != torch.float32:
                raise RunError(
                    f"Tensor {name} of the SAE is {tensor.dtype} {list(tensor.shape)}, its "
                    f"configuration says torch.float32 {list(expected)}; use the files of one SAE."
                )

    @staticmethod
    def shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        n, d = config.n_latents, config.d_in
        return {"W_enc": (n, d), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by name; the tensors themselves, not copies."""
        return {
            "W_enc": self.W_enc,
            "W_dec": self.W_dec,
            "b_enc": self.b_enc,
            "b_dec": self.b_dec,
        }

    @property
    def digest(self) -> str:
        """Identity of the dictionary: xxh3-128 of the configuration and the tensors, in hex."""
        state = xxhash.xxh3_128(self.config.model_dump_json().encode())
        for name, tensor in sorted(self.tensors().items()):
            state.update(name.encode())
            state.update(tensor.cpu().contiguous().numpy().data)
        return state.hexdigest()

    @property
    def low(self) -> Tensor:
        """W_enc in low precision, [n_latents, d_in], made when first needed."""
        if self._low is None:
            self._low = self.kernels.low_precision(self.W_enc)
        elif self._stale:
            self.kernels.refresh(self._low, self.W_enc)
        self._stale = False
        return self._low

    def weights_changed(self) -> None:
        """To be called when W_enc was changed in place: the low-precision copy is made anew."""
        self._stale = True

    def centre(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x / input_scale - b_dec, float32 [batch, d_in] on the SAE's device, into `out` if given.

        Raises:
            InputError: x is not [batch, d_in].
        """
        if x.dim() != 2 or x.shape[1] != self.config.d_in:
            raise InputError(
                f"The SAE was trained on {self.config.site} with {self.config.d_in} dimensions, "
                f"got rows of shape {list(x.shape)}; use the store and site it was trained on."
            )
        x = x.to(self.device, torch.float32)
        return torch.div(x, self.config.input_scale, out=out).sub_(self.b_dec)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The k latents of each row.

        A low-precision product chooses a few more than k candidates; exact float32 dot products
        of those order them and are the values.

        Args:
            x: [batch, d_in], floating point.

        Returns:
            indices: int32 [batch, k], distinct within a row; values: float32 [batch, k], >= 0 and
            decreasing. A value of 0 means that fewer than k latents are active.
        """
        return self.encode_centred(self.centre(x))

    def encode_centred(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` of rows that `centre` has prepared."""
        config = self.config
        count = candidates(config.k, config.n_latents)
        chosen = self.kernels.choose(centred, self.low, self.b_enc, count)  # [batch, count]
        return self.kernels.exact(centred, self.W_enc, self.b_enc, chosen, config.k, relu=True)

    def decode(self, indices: Tensor, values: Tensor) -> Tensor:
        """Reconstructions, float32 [batch, d_in], from indices and values [batch, any k]."""
        out = self.b_dec.repeat(len(indices), 1)  # [batch, d_in]
        self.kernels.decode(indices.int().contiguous(), values.contiguous(), self.W_dec, out)
        return out.mul_(self.config.input_scale)

    def save(self, path: str | Path) -> None:
        """Writes `sae.safetensors`, then `config.json`, into the folder (made if missing)."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS_FILE, self.tensors())
        write_text(folder / CONFIG_FILE, self.config.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> SAE:
        """The SAE saved in a folder.

        Raises:
            InputError: the folder holds no SAE. RunError: its files are damaged.
        """
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file():
            raise InputError(
                f"{folder} holds no trained SAE (no {CONFIG_FILE}); give the --out folder of a "
                "finished `train-sae run`."
            )
        remedy = "copy or train the SAE again"
        try:
            config = SAEConfig.model_validate(read_json(folder / CONFIG_FILE, "The SAE", remedy))
        except ValidationError as error:
            first = error.errors()[0]
            raise RunError(
                f"{folder / CONFIG_FILE} is not the configuration of an SAE "
                f"({'.'.join(map(str, first['loc']))}: {first['msg']}); {remedy}."
            ) from None
        tensors = read_tensors(folder / TENSORS_FILE, "The SAE", remedy, str(device))
        if set(tensors) != set(cls.shapes(config)):
            raise RunError(
                f"{folder / TENSORS_FILE} has tensors {sorted(tensors)}, expected "
                f"{sorted(cls.shapes(config))}; {remedy}."
            )
        return cls(config, **tensors)
