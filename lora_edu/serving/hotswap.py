"""Put another adapter's values into layers that are there already, without taking the model apart. Built in lesson 09.

Nothing is wrapped or replaced: the same parameters hold new numbers. So a compiled model need not be compiled again,
and memory does not grow, however many adapters pass through.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from lora_edu.core.adapter import adapter_layers
from lora_edu.core.config import method_of
from lora_edu.core.peft_io import check_tensors, fill, read_config, read_tensors
from lora_edu.core.state import adapter_state, injected_model


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
        ValueError: the adapter is merged; the file is damaged, or its layers, ranks or method are other ones.

    Source: PEFT's ``hotswap_adapter``, which fills what a file lacks with zeros; here that is an error.
    """
    model = injected_model(model)
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
    check_tensors(tensors, old, layers, parts, old.shared_to_file(state.contexts[adapter_name]), model, folder)
    fill(layers, parts, tensors)
    config.layers = layers
    for name, layer in layers.items():
        layer.reconfigure(config, name)
    state.configs[adapter_name] = config
