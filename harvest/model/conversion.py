"""GGUF models, converted once into a folder that loads fast.

Transformers decodes a GGUF file at every load (15 s for 135 M weights, against 0.1 s for
safetensors). The converted copy is float32, the type that the quantised blocks decode to, so that
nothing is lost. Rounding to bfloat16 would change Q4_1 weights by up to 0.3 % of the largest one.

A folder is valid only with its record, which is written last: the size and hash of every other
file. The folder is prepared under another name and renamed under a lock, so that no process sees or
makes half a folder. A damaged folder is made again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae_harvest.common.atomic import making
from sae_harvest.common.cache import cache_dir
from sae_harvest.common.errors import InputError
from sae_harvest.common.locks import lock
from sae_harvest.common.parsing import parse_json, safe_name
from sae_harvest.common.pointers import refuse_pointer
from sae_harvest.common.private_apis import gguf_tensors
from sae_harvest.store.objects import file_hash

RECORD = "complete.json"

_one_at_a_time = threading.Lock()


def converted(source: Path) -> Path:
    """Return the folder with the float32 safetensors copy of a GGUF file and its tokenizer.

    The first call makes it, in `cache_dir()/models/<name>-<hash of the file>`. Raises InputError
    if the file is not GGUF, if transformers can't read its architecture, or if the copy can't be
    written.
    """
    refuse_pointer(source)
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{source} is not a GGUF file: it doesn't begin with the word GGUF.")
    folder = cache_dir() / "models" / f"{source.stem}-{file_hash(source)[:16]}"
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.with_name(f"{folder.name}.lock"), wait=True):
            if not _is_intact(folder):  # another process may have made it while we waited
                _make(source, folder)
    except OSError as error:
        raise InputError(
            f"The converted copy of {source.name} can't be written to {folder.parent}: {error}; "
            "free some space there, or set SAE_HARVEST_CACHE to another folder."
        ) from error
    return folder


def _make(source: Path, folder: Path) -> None:
    with making(folder) as aside:
        aside.mkdir()  # not by mkdtemp, whose folders only their owner can read
        _convert(source, aside)
        files = sorted(path for path in aside.iterdir())
        record = {p.name: {"bytes": p.stat().st_size, "xxh3": file_hash(p)} for p in files}
        (aside / RECORD).write_text(json.dumps(record, indent=1))
        mode = (aside / RECORD).stat().st_mode & 0o777
        for path in files:  # safetensors makes files that only the owner can read
            path.chmod(mode)
        if folder.exists():  # damaged, or made by hand
            shutil.rmtree(folder)


def _convert(file: Path, folder: Path) -> None:
    """Decode the weights into float32 and save model and tokenizer to `folder`."""
    try:
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        with _parsed_once():
            config = AutoConfig.from_pretrained(**source, local_files_only=True)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            weights = gguf_tensors(file, model)
            tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
        result = model.load_state_dict(weights, strict=False)
    except Exception as error:  # readers may raise anything for a damaged file
        raise InputError(
            f"{file.name} can't be read: {_first_line(error)}; it may be damaged, or of an "
            "architecture that transformers doesn't read from GGUF: use its safetensors release."
        ) from error
    # tied weights are not in the file and share memory with a weight that is
    state = model.state_dict()
    given = {state[name].data_ptr() for name in weights}
    missing = [name for name in result.missing_keys if state[name].data_ptr() not in given]
    if missing or result.unexpected_keys:
        raise InputError(
            f"{file.name} doesn't hold the weights of a {config.model_type} model: "
            f"{len(missing)} are missing and {len(result.unexpected_keys)} are too many, such as "
            f"{(missing + result.unexpected_keys)[0]}; use its safetensors release."
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Reuse objects that transformers makes repeatedly: 3 readers of the file, 397 maps of names.

    A reader parses the whole header, which takes several seconds for a vocabulary of 49,152 tokens.
    The map of the tensors' names is the same for every module of the model.
    """
    with _one_at_a_time:
        reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader = functools.cache(reader)
        gguf.get_tensor_name_map = functools.cache(names)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def _is_intact(folder: Path) -> bool:
    """Whether every file of the folder's record exists, with the recorded bytes."""
    try:
        record = parse_json((folder / RECORD).read_bytes())
        return all(
            (folder / safe_name(name)).stat().st_size == entry["bytes"]
            and file_hash(folder / name) == entry["xxh3"]
            for name, entry in record.items()
        )
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError):  # a record that isn't ours
        return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
