"""Find an adapter's two files and read them: safetensors and JSON only; a pickle is never opened. Lesson 08."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_edu.core.peft_io import CONFIG_FILE, WEIGHTS_FILE, read_fields, read_safetensors
from lora_edu.serving.inspection.findings import Finding, counted, some

# What PEFT, mlx-lm and diffusers call the file of an adapter's weights, in this order.
WEIGHTS_FILES = (WEIGHTS_FILE, "adapters.safetensors", "pytorch_lora_weights.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# A Trainer's own state, which it leaves beside the adapter; nobody needs it to use the adapter.
TRAINER_FILES = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state")


@dataclass
class Source:
    """What was read: the weights file's tensors and metadata, the config's fields, and what was found on the way.

    Attributes:
        folder: where the two files are.
        weights: the weights file; None if there is none that can be read.
        fields: those of ``adapter_config.json``; None if there is none, or none that can be read.
    """

    folder: Path
    weights: Path | None = None
    fields: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_peft_folder(self) -> bool:
        """Whether both files are there under the names that PEFT gives them."""
        return self.weights is not None and self.weights.name == WEIGHTS_FILE and self.fields is not None

    def add(self, level: str, code: str, sentence: str, way_out: str = "", names: tuple[str, ...] = ()) -> None:
        """Note a finding; files are the matter of lesson 08."""
        self.findings.append(Finding(level, code, sentence, "08", way_out, names))


def read_source(path: str | Path) -> Source:
    """Read an adapter from its folder, or from one file.

    Raises:
        FileNotFoundError: if there is nothing at this path. Whatever else is wrong becomes a finding.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; "
            "an adapter on a hub has to be downloaded first"
        )
    source = Source(path if path.is_dir() else path.parent)
    if path.is_dir() or path.name == CONFIG_FILE:
        choose(source)
    elif path.suffix == ".safetensors":
        source.weights = path
    elif path.suffix in PICKLES:
        refuse_pickles(source, [path.name])
    else:
        known = "a .safetensors file or a folder with one"
        source.add("wrong", "unknown-file", f"{path.name} is no file that can be inspected here.", f"Give {known}.")
    if source.weights is not None:
        read_weights(source)
    read_config_fields(source)
    return source


def choose(source: Source) -> None:
    """Find the weights file of a folder, or of the only adapter in a folder below it."""
    below = sorted(path.parent for path in source.folder.glob(f"*/{CONFIG_FILE}"))
    files = sorted(path.name for path in source.folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in source.folder.iterdir() if path.suffix in PICKLES)
    pickles = [name for name in pickles if not name.startswith(TRAINER_FILES)]
    named = [name for name in WEIGHTS_FILES if name in files]
    if len(named) > 1:
        source.add(
            "wrong",
            "two-adapters",
            f"The folder holds the weights of {len(named)} adapters: {', '.join(named)}. Programs pick different ones.",
            "Give each adapter a folder of its own.",
            tuple(named),
        )
    if named or (len(files) == 1 and not files[0].startswith("model")):
        source.weights = source.folder / (named or files)[0]
        if below:
            names = tuple(folder.name for folder in below)
            source.add(
                "note",
                "folders-below",
                f"There are further adapters in {some(names)}; they were not read.",
                names=names,
            )
        if pickles:
            source.add(
                "note", "pickle", f"Beside the weights lies {some(pickles)}: a pickle, which was not opened.",
                "Delete it, so that no program picks it.", tuple(pickles),
            )  # fmt: skip
    elif len(below) == 1:
        source.add(
            "note", "folder-below", f"The folder has no adapter; the one in its folder {below[0].name} was read."
        )
        source.folder = below[0]
        choose(source)
    elif below:
        names = tuple(folder.name for folder in below)
        source.add(
            "wrong", "several-folders", f"The folder has no adapter, but {len(below)} folders with one: {some(names)}.",
            "Give one of these folders.", names,
        )  # fmt: skip
    elif pickles:
        refuse_pickles(source, pickles)
    else:
        say_what_is_there(source, files)


def say_what_is_there(source: Source, files: list[str]) -> None:
    """The finding for a folder without an adapter."""
    if any(name.startswith("model") for name in files):
        source.add(
            "wrong", "whole-model", f"This is the folder of a whole model ({some(files)}), not of an adapter.",
            "Save the adapter with save_adapter(model, folder), or with PEFT's save_pretrained before merging.",
        )  # fmt: skip
    elif files:
        source.add(
            "wrong", "several-files", f"The folder has several safetensors files: {some(files, 5)}.", "Give one."
        )
    elif any(source.folder.iterdir()):
        found = some(sorted(path.name for path in source.folder.iterdir()), 5)
        source.add("wrong", "no-weights", f"There is no {WEIGHTS_FILE} in this folder, only {found}.", "Save it again.")
    else:
        source.add(
            "wrong", "empty-folder", "The folder is empty.", "Call save_adapter(model, folder), then look again."
        )


def refuse_pickles(source: Source, names: list[str]) -> None:
    """The finding for weights that are there as a pickle only."""
    source.add(
        "wrong",
        "pickle",
        f"{some(names)} is a pickle, which can run code when it is opened, so it was not opened.",
        f"Whoever trusts its origin loads it with PEFT and saves it with safe_serialization=True as {WEIGHTS_FILE}.",
        tuple(names),
    )


def read_weights(source: Source) -> None:
    """Read tensors and metadata, or find out why that is not possible."""
    assert source.weights is not None
    try:
        source.tensors = dict(sorted(read_safetensors(source.weights).items()))
        with safe_open(source.weights, "pt") as file:
            source.metadata = file.metadata() or {}
    except (ValueError, SafetensorError) as error:
        with source.weights.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        if pointer:
            said = f"{source.weights.name} is a pointer of Git LFS, a few lines of text in the place of the weights."
            source.add("wrong", "lfs-pointer", said, "Run git lfs pull where it was cloned.")
        else:
            source.add("wrong", "damaged", f"It cannot be read: {error}.", "Fetch or save the file again.")
        source.weights = None
        return
    small = {
        key: tensor for key, tensor in source.tensors.items() if tensor.is_floating_point() and tensor.itemsize == 1
    }
    if small:  # of which PyTorch can hardly compute anything
        source.tensors |= {key: tensor.float() for key, tensor in small.items()}
        said = f"{counted(len(small), 'tensor')} stored in float8: {some(tuple(small))}. Looked at in float32."
        source.add("note", "float8", said, "Store the factors in bfloat16 where a program does not read them.")
    if not source.tensors:
        source.add(
            "wrong", "no-tensors", f"{source.weights.name} holds no tensors.",
            "Save the adapter from the process that has its weights; under ZeRO-3 or FSDP all processes must save.",
        )  # fmt: skip


def read_config_fields(source: Source) -> None:
    """Read ``adapter_config.json`` if there is one; whether one is needed depends on the kind of file."""
    path = source.folder / CONFIG_FILE
    if path.is_file():
        try:
            source.fields = read_fields(path)
        except ValueError as error:
            source.add(
                "wrong",
                "config",
                f"It cannot be read: {error}.",
                "It needs at least peft_type, r, lora_alpha and target_modules.",
            )
