"""Put another adapter's values into layers that are there already, without taking the model apart. Built in lesson 09.

Nothing is wrapped or replaced: the same parameters hold new numbers. So a compiled model need not be compiled again,
and memory does not grow, however many adapters pass through.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from lora_edu.core.adapter import AdapterLayer, adapter_layers
from lora_edu.core.config import AdapterConfig
from lora_edu.core.methods import method_of
from lora_edu.core.peft_io import check_tensors, fill, read_config, read_tensors, tensors_of
from lora_edu.core.refusals import check_unsharded
from lora_edu.core.state import adapter_state, injected_model
from lora_edu.core.vocabulary import check_rows, grown_embeddings


def hotswap_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Replace the values of an adapter by those of a saved one with the same layers and ranks, in place.

    The scale is replaced too: a file with another lora_alpha needs another one. Whether the adapter is active, and
    whether it trains, stays as it was. Everything is checked first; on any error the model is as it was, bit for bit.

    Args:
        directory: what ``save_adapter`` or PEFT wrote.
        adapter_name: the adapter whose values go.

    Raises:
        KeyError: if the model has no adapter of that name.
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: the adapter is merged; the file is damaged, or its layers, ranks, method or (unless the method's
            layers can take them over) settings are other ones.

    Source: PEFT's ``hotswap_adapter``, which fills what a file lacks with zeros; here that is an error.
    """
    model = injected_model(model)
    check_unsharded(model)
    state = adapter_state(model)
    state.check_name(adapter_name)
    layers, parts = adapter_layers(model, adapter_name), state.parts.get(adapter_name, [])
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge(model) before its values are replaced")
    old = state.configs[adapter_name]
    if old is None:
        raise ValueError(f"adapter {adapter_name!r} was put in by hand, without a config; use inject(model, config)")
    folder = Path(directory)
    config, tensors = read_config(folder), read_tensors(folder)
    if type(config) is not type(old) or method_of(config) is not method_of(old):
        raise ValueError(
            f"{folder} is an adapter of method {method_of(config).name}, and the one to be replaced is of "
            f"{method_of(old).name}; use load_adapter with a new adapter_name"
        )
    if other := next((layer for layer in layers.values() if not layer.additive), None):
        raise ValueError(
            f"{folder}: a {type(other).__name__} depends on more than its tensors, so it is not swapped in place; use "
            "load_adapter with a new adapter_name"
        )
    check_taken_over(old, config, layers.values(), folder)
    shared = old.shared_to_file(state.contexts[adapter_name])
    check_rows(tensors, model)
    unknown = tensors.keys() - (tensors_of(layers, parts) | shared).keys()
    parts = [*parts, *grown_embeddings({key: tensors[key] for key in unknown}, model)]
    check_tensors(tensors, old, layers, parts, shared, model, folder)
    fill(layers, parts, tensors)
    with torch.no_grad():
        for key, tensor in shared.items():
            tensor.copy_(tensors[key])
    state.parts[adapter_name], config.layers = parts, layers
    state.use_parts(state.active)
    for name, layer in layers.items():
        layer.reconfigure(config, name)
    state.configs[adapter_name] = config


def check_taken_over(old: AdapterConfig, new: AdapterConfig, layers: Iterable[AdapterLayer], folder: Path) -> None:
    """Raise if a setting of the method differs, and a layer does not say how to take it over once it is built."""
    common = {each.name for each in dataclasses.fields(AdapterConfig)}
    said = {name: value for name, value in old.to_file().items() if name not in common}
    changed = {name: getattr(new, name) for name, value in said.items() if getattr(new, name) != value}
    fixed = next((layer for layer in layers if type(layer).reconfigure is AdapterLayer.reconfigure), None)
    if changed and fixed is not None:
        raise ValueError(
            f"{folder} has other settings than the adapter to be replaced ({changed}), and a {type(fixed).__name__} "
            "keeps those that it was built with: use load_adapter with a new adapter_name"
        )
