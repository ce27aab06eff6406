"""Read and write adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``. Lesson 08.

Tensors are stored under ``base_model.model.`` + module name + ``.lora_A.weight`` and so on, without the adapter's
name. Nothing is ever unpickled, and a file that does not fit is refused before the model is touched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, adapter_layers
from lora_edu.core.config import AdapterConfig
from lora_edu.core.experts import means_more_in_peft, warn_of_losses
from lora_edu.core.inject import aimed, carry_out, plan_injection, trainability_kept_on_failure
from lora_edu.core.matching import named_places
from lora_edu.core.methods import InjectionContext, method_of, registered_methods
from lora_edu.core.parts import PREFIX, TASK_HEADS, ModuleCopy, Part
from lora_edu.core.state import adapter_state, injected_model, model_to_inject, warn_if_not_averaged
from lora_edu.core.vocabulary import check_rows, grown_embeddings, grown_rows, own_weight
from lora_edu.files import write_atomically

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def save_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Write one adapter as PEFT would: two files in ``directory``, each put in place atomically.

    Where the model's vocabulary has grown since the base was saved, the file also holds the embedding's rows. Sharded
    tensors (FSDP) are gathered, so that every process must make this call.

    Returns:
        The directory.

    Raises:
        KeyError: if the model has no adapter of that name.
        ValueError: if nothing was injected into this model, or its layers were wrapped by hand, without a config.
    """
    model = injected_model(model)
    state = adapter_state(model)
    state.check_name(adapter_name)
    config, parts = state.configs[adapter_name], state.parts.get(adapter_name, [])
    if config is None:
        raise ValueError(
            f"adapter {adapter_name!r} was put in by hand, so there is no config to save; use inject(model, config)"
        )
    layers = adapter_layers(model, adapter_name)
    tensors = tensors_of(layers, parts) | config.shared_to_file(state.contexts[adapter_name])
    tensors = grown_rows(model, tensors) | tensors
    stored = {key: gathered(tensor).to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    common = {
        "peft_type": config.peft_type,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "fan_in_fan_out": any(isinstance(layer.frozen, Conv1D) for layer in layers.values()),
    }
    fields = method_of(config).file_fields(config.to_file())
    fields |= {name: value for name, value in common.items() if name not in config.lacks}
    if fields.get("task_type") in TASK_HEADS and not any(isinstance(part, ModuleCopy) for part in parts):
        # With it, PEFT looks for a head that is not in this file; without it, "all-linear" would mean the head as well.
        fields["task_type"] = None
        if fields.get("target_modules") == "all-linear":
            fields["target_modules"] = list(layers)
    if config.peft_type == "LORA" and layers:
        if means_more_in_peft(model, fields.get("target_modules")):
            fields["target_modules"] = list(layers)
        warn_of_losses(model, layers)
    # Only the outer level is sorted: in rank_pattern and alpha_pattern the first key that fits counts.
    config_file = json.dumps(dict(sorted(fields.items())), indent=2).encode() + b"\n"
    folder = Path(directory)
    write_atomically(folder / WEIGHTS_FILE, save(stored, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, config_file)
    return folder


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
) -> None:
    """Add an adapter from a directory that ``save_adapter`` or PEFT wrote.

    The first adapter of a model becomes active, later ones wait for ``set_adapter``. Everything is checked before
    the model is changed; on any error it is as it was, bit for bit.

    Args:
        adapter_name: the name it gets in this model.
        is_trainable: let it train on; otherwise it is only used.

    Raises:
        FileNotFoundError: the directory or one of the two files is missing.
        ValueError: a file is damaged, is a pickle, or does not fit this model; or the config asks for something that
            changes numbers and that lora_edu does not do.
    """
    folder = Path(directory)
    config = read_config(folder)
    check_converted(config, folder)
    tensors = read_tensors(folder)
    wrapper, model = model, model_to_inject(model, config, adapter_name)
    check_rows(tensors, model)
    context = InjectionContext(adapter_name)
    with trainability_kept_on_failure(model), torch.no_grad():
        config = aimed(model, config, adapter_name)
        try:
            config.shared_from_file(tensors, context)
        except KeyError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE}: {error} is missing; the file is incomplete") from None
        plan = plan_injection(model, config, context)
        shared = plan.config.shared_to_file(context)
        unknown = tensors.keys() - (tensors_of(plan.layers, plan.parts) | shared).keys()
        plan.parts += grown_embeddings({key: tensors[key] for key in unknown}, model)
        check_tensors(tensors, plan.config, plan.layers, plan.parts, shared, model, folder)
        fill(plan.layers, plan.parts, tensors)
    carry_out(model, plan, trainable=is_trainable)
    if is_trainable:
        warn_if_not_averaged(wrapper)


def read_config(folder: Path) -> AdapterConfig:
    """The config of a saved adapter.

    Raises:
        FileNotFoundError: there is no such directory or no config in it.
        ValueError: broken JSON, an unknown method, or a field that changes numbers and is not supported.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}; expected a directory written by save_adapter or PEFT")
    fields, known = read_fields(path), config_types()
    if fields.get("peft_type") not in known:
        raise ValueError(f"{path}: peft_type={fields.get('peft_type')!r}; lora_edu reads {', '.join(known)}")
    try:
        return known[fields["peft_type"]].from_file(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def check_converted(config: AdapterConfig, folder: Path) -> None:
    """Raise if a method that writes its files as another's, as of plain LoRA, was saved as it is."""
    method = method_of(config)
    written = method.file_fields(config.to_file())
    if written != config.to_file() and method_of(type(config).from_file(written)) is not method:
        raise ValueError(
            f"{folder} holds {method.name} as it trained, for a base that its start has changed; save it from PEFT "
            "with path_initial_model_for_weight_conversion, which writes a plain LoRA for the untouched base"
        )


def config_types() -> dict[str, type[AdapterConfig]]:
    """Which class reads a config, by its ``peft_type``."""
    # A class that inherits its peft_type writes files that are its parent's to read.
    types = [method.config_type for method in reversed(registered_methods())]
    return {each.peft_type: each for each in types if "peft_type" in vars(each)}


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of an ``adapter_config.json``, as they stand there.

    Raises:
        ValueError: if it is no JSON, or no object.
    """
    try:
        fields = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write the adapter again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; expected an object with peft_type, r, …")
    return fields


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter.

    Raises:
        FileNotFoundError: there is no weights file.
        ValueError: it is damaged, a pickle, or not a PEFT adapter.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        if pickle.is_file():
            raise ValueError(
                f"{pickle} is a pickle, which can run code when opened, so lora_edu does not open it; let PEFT load "
                f"the adapter and save it again with safe_serialization=True, which writes {WEIGHTS_FILE}"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}; expected a directory written by save_adapter or PEFT")
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, under keys without the name of PEFT's default adapter.

    Raises:
        ValueError: if it is damaged, or a pickle under another name.
    """
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated, or a pickle under another name"
        ) from None
    # PEFT reads keys with its default adapter's name in them, and writes them without.
    # A module of the model may be called so too: the name counts only behind that of a tensor, as lora_A or hada_w1_a.
    return {re.sub(r"(_\w+)\.default(?=(\.weight)?$)", r"\1", key): tensor for key, tensor in tensors.items()}


def tensors_of(layers: Mapping[str, AdapterLayer], parts: Iterable[Part]) -> dict[str, Tensor]:
    """{key in the file: tensor} of an adapter's layers and parts."""
    tensors = {f"{PREFIX}{name}.{key}": t for name, layer in layers.items() for key, t in layer.to_file().items()}
    for part in parts:
        tensors |= part.to_file()
    return tensors


def fill(layers: Mapping[str, AdapterLayer], parts: Iterable[Part], tensors: Mapping[str, Tensor]) -> None:
    """Put a file's values into layers and parts; ``check_tensors`` has seen that they fit."""
    for name, layer in layers.items():
        layer.from_file({key: tensors[f"{PREFIX}{name}.{key}"] for key in layer.to_file()})
    for part in parts:
        part.from_file(tensors)


def gathered(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where this process holds a shard."""
    if tensor.is_meta:
        raise ValueError("the adapter is offloaded (on the meta device): call save_adapter before offloading the model")
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_tensors(
    tensors: Mapping[str, Tensor],
    config: Any,
    layers: Mapping[str, AdapterLayer],
    parts: list[Part],
    shared: Mapping[str, Tensor],
    model: nn.Module,
    folder: Path,
) -> None:
    """Raise unless the file holds exactly what layers, parts and the method's shared tensors need."""
    path, expected = folder / WEIGHTS_FILE, tensors_of(layers, parts) | dict(shared)
    unnamed = [key for key in tensors if not key.startswith("base_model.") and key not in expected]
    if unnamed:
        raise ValueError(
            f"{path}: {len(unnamed)} of {len(tensors)} keys lack PEFT's prefix {PREFIX!r}, for example "
            f"{unnamed[0]!r}; this is no PEFT adapter, or its keys were renamed"
        )
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(
            f"{path}: {len(missing)} of {len(expected)} tensors are missing, for example {missing[0]!r}; the adapter "
            "was made for another model or other target_modules, or the file is incomplete"
        )
    left = sorted(tensors.keys() - expected.keys())
    known = [key for key in left if any(part.repeats(key, tensors) for part in parts)]
    if foreign := [key for key in left if key not in known and not repeats_base(key, tensors[key], model)]:
        raise ValueError(
            f"{path}: {len(foreign)} tensors have no place in this model, for example {foreign[0]!r}; the adapter was "
            "made for another model, or its config was changed"
        )
    for key, parameter in expected.items():
        if tensors[key].shape != parameter.shape:
            rank = f" and r={config.r}" if hasattr(config, "r") else ""
            raise ValueError(
                f"{path}: {key!r} has shape {tuple(tensors[key].shape)}, but this model{rank} need "
                f"{tuple(parameter.shape)}; check r and rank_pattern in {CONFIG_FILE}, and that this is the right base"
            )
        if tensors[key].is_floating_point() != parameter.is_floating_point():
            raise ValueError(f"{path}: {key!r} holds {tensors[key].dtype} numbers, expected {parameter.dtype}")
    for name, layer in layers.items():
        try:
            layer.check_file({key: tensors[f"{PREFIX}{name}.{key}"] for key in layer.to_file()})
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None


def repeats_base(key: str, tensor: Tensor, model: nn.Module) -> bool:
    """Whether this is the unchanged weight of an embedding or a head, which PEFT writes into the file as well.

    It does so if any adapter stands around that layer, not only the one that is saved.
    """
    if not key.endswith(".weight"):
        return False
    name = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    module: Any = next((module for place, _, _, module in named_places(model) if place == name), None)
    weight = None if module is None else own_weight(model, module)
    return weight is not None and tensor.shape == weight.shape and torch.equal(tensor.to(weight), weight)
