"""Read and write adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``. Lesson 08.

Tensors are stored under ``base_model.model.`` + module name + ``.lora_A.weight`` and so on, without the adapter's
name. Nothing is ever unpickled, and a file that does not fit is refused before the model is touched.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, adapter_layers, named_places
from lora_edu.core.config import LoraConfig, registered_methods
from lora_edu.core.inject import Plan, carry_out, plan_injection, trainability_kept_on_failure
from lora_edu.core.parts import TASK_HEADS, TrainedCopy, adapter_state
from lora_edu.files import write_atomically

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields of PEFT's file that describe a run or a machine and change no number.
NEUTRAL_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "peft_type",
    "fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Initialisations that leave the base's weights alone: once the adapter's tensors are loaded, they make no difference.
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def save_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Write one adapter as PEFT would: two files in ``directory``, each put in place atomically.

    Returns:
        The directory.

    Raises:
        KeyError: if the model has no adapter of that name.
        ValueError: if nothing was injected into this model, or its layers were wrapped by hand, without a config.
    """
    state = adapter_state(model)
    if adapter_name not in state.configs:
        raise KeyError(f"no adapter named {adapter_name!r}; this model has: {', '.join(state.configs)}")
    if state.configs[adapter_name] is None:
        raise ValueError(
            f"adapter {adapter_name!r} was put in by hand, so there is no config to save; use inject(model, config)"
        )
    layers = adapter_layers(model, adapter_name)
    tensors = {f"{PREFIX}{name}.{key}": t for name, layer in layers.items() for key, t in layer.saved_tensors().items()}
    copies = {
        name: module.copies[adapter_name]
        for name, _, _, module in named_places(model)
        if isinstance(module, TrainedCopy) and adapter_name in module.copies
    }
    for name, copy in copies.items():
        tensors |= copy_tensors(name, copy)
    for bias in state.biases.get(adapter_name, []):
        for name in bias_names(bias.names, layers, state.configs[adapter_name]):
            tensors[bias_key(name, layers)] = bias.trained
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    fields = config_to_peft(state.configs[adapter_name], model)
    fields["fan_in_fan_out"] = any(isinstance(layer.frozen, Conv1D) for layer in layers.values())
    if fields["task_type"] in TASK_HEADS and not copies:
        # With it, PEFT looks for a head that is not in this file; without it, "all-linear" would mean the head as well.
        fields["task_type"] = None
        if fields["target_modules"] == "all-linear":
            fields["target_modules"] = list(layers)
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
    tensors = read_tensors(folder)
    with trainability_kept_on_failure(model), torch.no_grad():
        plan = plan_injection(model, config, adapter_name)
        expected = expected_tensors(plan)
        check_tensors(tensors, expected, plan, model, folder)
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])
    carry_out(model, plan, trainable=is_trainable)


def read_config(folder: Path) -> LoraConfig:
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
    try:
        fields = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write the adapter again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; expected an object with peft_type, r, …")
    known: dict[str, Any] = {method.config_type.peft_type: method.config_type for method in registered_methods()}
    if fields.get("peft_type") not in known:
        raise ValueError(f"{path}: peft_type={fields.get('peft_type')!r}; lora_edu reads {', '.join(known)}")
    return config_from_peft(fields, known[fields["peft_type"]], path)


def config_from_peft(fields: dict[str, Any], config_type: type[LoraConfig], path: Path) -> LoraConfig:
    """Our config from PEFT's fields; those that we lack must be neutral or unset."""
    ours = {field.name for field in dataclasses.fields(config_type)}
    unsupported = {key: value for key, value in fields.items() if value and key not in ours | NEUTRAL_FIELDS}
    if unsupported:
        raise ValueError(f"{path}: lora_edu does not support {unsupported}, and these settings change the numbers")
    settings = {key: value for key, value in fields.items() if key in ours and value is not None}
    if settings.get("init_lora_weights", True) in INITS_THAT_KEEP_THE_BASE:
        settings["init_lora_weights"] = True
    try:
        return config_type(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def config_to_peft(config: LoraConfig, model: nn.Module) -> dict[str, Any]:
    """PEFT's fields for our config."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return fields | {"peft_type": config.peft_type, "base_model_name_or_path": name, "inference_mode": True}


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
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated, or a pickle under another name"
        ) from None
    if strangers := [key for key in tensors if not key.startswith(PREFIX)]:
        raise ValueError(
            f"{path}: {len(strangers)} of {len(tensors)} keys lack PEFT's prefix {PREFIX!r}, for example "
            f"{strangers[0]!r}; this is no PEFT adapter, or its keys were renamed"
        )
    return tensors


def expected_tensors(plan: Plan) -> dict[str, Tensor]:
    """{key in the file: tensor that it fills} for everything that a plan trains."""
    expected = {f"{PREFIX}{n}.{key}": t for n, layer in plan.layers.items() for key, t in layer.saved_tensors().items()}
    for planned in plan.copies:
        expected |= copy_tensors(planned.name, planned.copy)
    for bias in plan.biases:
        names = bias_names(bias.names, plan.layers, plan.config)
        expected |= {bias_key(name, plan.layers): bias.trained for name in names}
    return expected


def bias_names(names: list[str], adapted: Iterable[str], config: LoraConfig) -> list[str]:
    """Under which of a tied bias's names PEFT writes it: all of them, or with "lora_only" those of adapted layers."""
    return names if config.bias == "all" else [name for name in names if name in adapted]


def copy_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Keys and tensors of a module of ``modules_to_save``."""
    return {f"{PREFIX}{name}.{key}": tensor for key, tensor in module.state_dict().items()}


def bias_key(name: str, adapted: Iterable[str]) -> str:
    """The key of a trained bias; PEFT calls the plain layer inside an adapted one ``base_layer``."""
    return f"{PREFIX}{name}.base_layer.bias" if name in adapted else f"{PREFIX}{name}.bias"


def check_tensors(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], plan: Plan, model: nn.Module, folder: Path
) -> None:
    """Raise unless the file holds exactly the expected tensors in the expected shapes."""
    path = folder / WEIGHTS_FILE
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(
            f"{path}: {len(missing)} of {len(expected)} tensors are missing, for example {missing[0]!r}; the adapter "
            "was made for another model or other target_modules, or the file is incomplete"
        )
    if foreign := sorted(key for key in tensors.keys() - expected.keys() if not repeats(key, tensors, plan, model)):
        raise ValueError(
            f"{path}: {len(foreign)} tensors have no place in this model, for example {foreign[0]!r}; the adapter was "
            "made for another model, or its config was changed"
        )
    for key, parameter in expected.items():
        if tensors[key].shape != parameter.shape:
            raise ValueError(
                f"{path}: {key!r} has shape {tuple(tensors[key].shape)}, but this model and r={plan.config.r} need "
                f"{tuple(parameter.shape)}; check r and rank_pattern in {CONFIG_FILE}, and that this is the right base"
            )
        if tensors[key].is_floating_point() != parameter.is_floating_point():
            raise ValueError(f"{path}: {key!r} holds {tensors[key].dtype} numbers, expected {parameter.dtype}")


def repeats(key: str, tensors: dict[str, Tensor], plan: Plan, model: nn.Module) -> bool:
    """Whether PEFT wrote something twice: an embedding's weight, or with bias="all" the biases of a copied module."""
    for planned in plan.copies:
        for prefix, other in (("modules_to_save.", None), ("original_module.", planned.wrapper.base.state_dict())):
            tail = key.removeprefix(f"{PREFIX}{planned.name}.")
            if tail != key and tail.startswith(prefix):
                inner = tail.removeprefix(prefix)
                same = tensors.get(f"{PREFIX}{planned.name}.{inner}") if other is None else other.get(inner)
                if same is not None and same.shape == tensors[key].shape:
                    return torch.equal(tensors[key].to(same), same)
                return False
    return repeats_base(key, tensors[key], model)


def repeats_base(key: str, tensor: Tensor, model: nn.Module) -> bool:
    """Whether this is the unchanged weight of an embedding or a head, which PEFT writes into the file as well.

    It does so if any adapter stands around that layer, not only the one that is saved.
    """
    if not key.endswith(".weight"):
        return False
    name = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    module = next((module for place, _, _, module in named_places(model) if place == name), None)
    merged_into = module.merge_state.pretrained if isinstance(module, AdapterLayer) else None
    weight = getattr(module, "weight", None) if merged_into is None else merged_into
    return weight is not None and tensor.shape == weight.shape and torch.equal(tensor.to(weight), weight)
