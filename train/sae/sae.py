"""A trained SAE: encode rows to a few latents, decode them, load and save.

x' = normalise(x);  c = x' - b_dec           a transcoder: c = x' - b_in
pi = W_enc c + b_enc                         pre-activations, one per latent
topk       v = ReLU(pi) for the k largest pi of a row
batchtopk  v = pi where pi > threshold       one threshold, the mean of training batches
jumprelu   v = pi where pi > threshold       a threshold per latent
relu       v = ReLU(pi)
gated      v = [pi > 0] ReLU(exp(r_mag) (pi - b_enc) + b_mag)
x_hat = restore(W_dec^T v + b_dec)
"""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from sae_harvest.common.atomic import new_folder, write_text
from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.parsing import first_line
from sae_harvest.train.config import ROW_NORMALIZATIONS, SAEConfig
from sae_harvest.train.run.files import read_json, read_tensors, require_finite, write_tensors
from sae_harvest.train.sae.kernels import Low, kernels_for
from sae_harvest.train.sae.normalization import normalise, restore

CONFIG_FILE, TENSORS_FILE = "config.json", "sae.safetensors"
REMEDY = "copy or train the SAE again"


class SAE:
    """A sparse autoencoder, or a transcoder.

    >>> import torch
    >>> sae = SAE.load("runs/demo/sae")
    >>> x = torch.ones(3, sae.config.d_in)
    >>> indices, values = sae.encode(x)
    >>> indices.dtype, values.dtype, sae.decode(indices, values).shape == x.shape
    (torch.int32, torch.float32, True)

    Args:
        config: shape, activation function, normalisation.
        W_enc: float32 [n_latents, d_in]; W_dec: float32 [n_latents, d_out]; a latent is a row.
        b_enc: float32 [n_latents]. b_dec: float32 [d_out].
        extra: further tensors: b_in [d_in] of a transcoder; threshold [n_latents], not negative,
            of batchtopk and jumprelu; r_mag and b_mag [n_latents] of gated.

    Raises:
        RunError: the tensors do not match the configuration.
    """

    def __init__(
        self,
        config: SAEConfig,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        **extra: Tensor,
    ) -> None:
        self.config = config
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = W_enc, W_dec, b_enc, b_dec
        self.extra = extra
        self.kernels = kernels_for(W_enc.device)
        self._low: Low | None = None
        self._stale = False
        shapes = self.shapes(config)
        if set(self.tensors()) != set(shapes):
            raise RunError(
                f"The SAE has tensors {sorted(self.tensors())}, its configuration "
                f"({config.activation}) says {sorted(shapes)}; use the files of one SAE."
            )
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32:
                raise RunError(
                    f"Tensor {name} of the SAE is {tensor.dtype} {list(tensor.shape)}, its "
                    f"configuration says torch.float32 {list(shapes[name])}; use the files of one "
                    "SAE."
                )
        if "threshold" in extra and bool((extra["threshold"] < 0).any()):
            raise RunError("The SAE has negative thresholds, expected 0 or more; train it again.")

    @staticmethod
    def shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, by name."""
        n, d_out = config.n_latents, config.width_out
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (n, config.d_in),
            "W_dec": (n, d_out),
            "b_enc": (n,),
            "b_dec": (d_out,),
        }
        if config.is_transcoder:
            shapes["b_in"] = (config.d_in,)
        if config.activation in ("batchtopk", "jumprelu"):
            shapes["threshold"] = (n,)
        if config.activation == "gated":
            shapes |= {"r_mag": (n,), "b_mag": (n,)}
        return shapes

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; the tensors themselves, not copies."""
        return {
            "W_enc": self.W_enc,
            "W_dec": self.W_dec,
            "b_enc": self.b_enc,
            "b_dec": self.b_dec,
            **self.extra,
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
    def low(self) -> Low:
        """W_enc in low precision, made when first needed."""
        if self._low is None:
            self._low = self.kernels.low_precision(self.W_enc)
        elif self._stale:
            self.kernels.refresh(self._low, self.W_enc)
        self._stale = False
        return self._low

    def weights_changed(self) -> None:
        """Mark the low-precision copy as outdated. Call this after changing W_enc in place."""
        self._stale = True

    def centre(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return c, float32 [batch, d_in] on the SAE's device, written to `out` if given.

        Raises:
            InputError: x is not [batch, d_in].
        """
        offset = self.extra["b_in"] if self.config.is_transcoder else self.b_dec
        return normalise(self.check_rows(x), self.config, out).sub_(offset)

    def check_rows(self, x: Tensor) -> Tensor:
        """Return rows as float32 on the SAE's device. Raise `InputError` unless [batch, d_in]."""
        if x.dim() != 2 or x.shape[1] != self.config.d_in:
            raise InputError(
                f"The SAE was trained on {self.config.site} with {self.config.d_in} dimensions, "
                f"got rows of shape {list(x.shape)}; use the store and site it was trained on."
            )
        return x.to(self.device, torch.float32)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the active latents of each row.

        A low-precision product finds candidates. Exact float32 dot products of the candidates
        decide and give the values.

        Args:
            x: [batch, d_in], floating point.

        Returns:
            indices: int32 [batch, w]; values: float32 [batch, w], >= 0 and decreasing. At a
            value of 0 and after it, a row has no more latents. With topk, w is k; otherwise it is
            the largest number of active latents of a row of this batch, at least 1.
        """
        return self.encode_centred(self.centre(x))

    def encode_centred(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Encode rows that `centre` has prepared; see `encode`."""
        config, kernels = self.config, self.kernels
        if config.activation == "topk":
            assert config.k is not None
            count = self.low.candidates(config.k)
            chosen = kernels.choose(centred, self.low, self.b_enc, count)  # [batch, count]
            return kernels.exact(centred, self.W_enc, self.b_enc, chosen, config.k, relu=True)
        floor = self.extra.get("threshold")
        if floor is None:
            floor = torch.zeros_like(self.b_enc)
        chosen = kernels.choose_above(centred, self.low, self.b_enc, floor)  # [batch, w]
        pi = kernels.preactivations(centred, self.W_enc, self.b_enc, chosen)  # [batch, w]
        return _packed(chosen, self.activate(chosen, pi))

    def activate(self, indices: Tensor, pi: Tensor) -> Tensor:
        """Return v of pre-activations of latents, float32 [batch, w]; 0 where a latent is inactive.

        Not for topk, where v depends on the rest of the row.
        """
        if self.config.activation == "relu":
            return pi.clamp(min=0)
        if self.config.activation == "gated":
            magnitude = self.of_latents("r_mag", indices).exp_()
            magnitude *= pi - self.b_enc[indices.clamp(min=0)]  # -inf without a pair
            magnitude += self.of_latents("b_mag", indices)
            return magnitude.clamp_(min=0).masked_fill_(pi <= 0, 0.0)
        return pi.masked_fill(pi <= self.of_latents("threshold", indices), 0.0)

    def of_latents(self, name: str, indices: Tensor) -> Tensor:
        """Return entries of a tensor [n_latents] at indices [batch, w]; entry 0 for index -1."""
        return self.extra[name][indices.clamp(min=0)]

    def decode(self, indices: Tensor, values: Tensor, x: Tensor | None = None) -> Tensor:
        """Return reconstructions, float32 [batch, d_out], of indices and values [batch, any w].

        Args:
            x: the rows that were encoded, [batch, d_in]; needed if each row is normalised by its
                own norm or moments.

        Raises:
            InputError: x is needed and missing, or has another shape.
        """
        if self.config.normalization in ROW_NORMALIZATIONS:
            if x is None:
                raise InputError(
                    f"The SAE normalises each row ({self.config.normalization}), so decoding needs "
                    "the rows as well; give them as x."
                )
            x = self.check_rows(x)
        out = self.b_dec.repeat(len(indices), 1)  # [batch, d_out]
        self.kernels.decode(indices.int().contiguous(), values.contiguous(), self.W_dec, out)
        return restore(out, x, self.config)

    def encode_dense(self, x: Tensor) -> Tensor:
        """Return the activation of every latent on each row, 0 where it does not fire.

        >>> import torch
        >>> sae = SAE.load("runs/demo/sae")
        >>> sae.encode_dense(torch.zeros(2, sae.config.d_in)).shape[1] == sae.config.n_latents
        True

        Args:
            x: [batch, d_in], floating point.

        Returns:
            float32 [batch, n_latents] on the SAE's device.

        Raises:
            InputError: x is not [batch, d_in].
        """
        indices, values = self.encode(x)
        dense = torch.zeros(len(indices), self.config.n_latents, device=self.device)
        return dense.scatter_add_(1, indices.long(), values)  # places without a latent add 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of each row; for a transcoder, the prediction.

        Args:
            x: floating point, [..., d_in]: rows, or contexts of rows.

        Returns:
            float32 [..., d_out] on the SAE's device, without gradients.

        Raises:
            InputError: the last dimension of x is not d_in.
        """
        rows = self.check_rows(x.reshape(-1, x.shape[-1]) if x.dim() > 2 else x)
        with torch.no_grad():
            out = self.decode(*self.encode(rows), rows)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    __call__ = forward

    def to(self, device: str | torch.device) -> SAE:
        """Return a copy of the SAE with its tensors on a device; this SAE stays unchanged.

        >>> SAE.load("runs/demo/sae").to("cpu").device
        device(type='cpu')
        """
        return SAE(self.config, **{name: t.to(device) for name, t in self.tensors().items()})

    def save(self, path: str | Path) -> None:
        """Write `sae.safetensors`, then `config.json`, into the folder (made if missing)."""
        folder = Path(path)
        new_folder(folder)
        write_tensors(folder / TENSORS_FILE, self.tensors())
        write_text(folder / CONFIG_FILE, self.config.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> SAE:
        """Return the SAE saved in a folder.

        Raises:
            InputError: the folder holds no SAE.
            RunError: its files are damaged.
        """
        folder = Path(path)
        config = cls.read_config(folder)
        tensors = read_tensors(folder / TENSORS_FILE, "The SAE", REMEDY, str(device))
        if set(tensors) != set(cls.shapes(config)):
            raise RunError(
                f"{folder / TENSORS_FILE} has tensors {sorted(tensors)}, expected "
                f"{sorted(cls.shapes(config))}; {REMEDY}."
            )
        sae = cls(config, **tensors)
        require_finite(tensors, folder / TENSORS_FILE, REMEDY)
        return sae

    @staticmethod
    def read_config(folder: Path) -> SAEConfig:
        """Return the configuration of the SAE saved in a folder.

        Raises:
            InputError: the folder holds no SAE.
            RunError: the file is damaged.
        """
        try:
            there = (folder / CONFIG_FILE).is_file()
        except OSError:  # a name that is too long, or a folder that may not be entered
            there = False
        if not there:
            raise InputError(
                f"{folder} holds no trained SAE (no {CONFIG_FILE}); give the --out folder of a "
                "finished `train-sae run`."
            )
        try:
            return SAEConfig.model_validate(read_json(folder / CONFIG_FILE, "The SAE", REMEDY))
        except ValidationError as error:
            raise RunError(
                f"{folder / CONFIG_FILE} is not the configuration of an SAE "
                f"({first_line(error)}); {REMEDY}."
            ) from None


def _packed(indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row's pairs by decreasing value, and cut at the widest row's positive pairs."""
    width = max(1, int((values > 0).sum(1).max())) if values.numel() else 1
    if values.shape[1] == 0:
        return indices.new_zeros(len(indices), 1), values.new_zeros(len(values), 1)
    values, order = values.sort(dim=1, descending=True, stable=True)  # ties: the lower latent
    values, order = values[:, :width], order[:, :width]  # [batch, width]
    return indices.gather(1, order).clamp_(min=0), values.contiguous()
