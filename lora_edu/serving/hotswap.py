"""Put another adapter's values into layers that are there already, without taking the model apart. Built in lesson 09.

Nothing is wrapped or replaced: the same parameters hold new numbers. So a compiled model need not be compiled again,
and memory does not grow, however many adapters pass through.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_edu.core.adapter import adapter_layers, named_places
from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import Plan
from lora_edu.core.layer import LoRALinear
from lora_edu.core.parts import PlannedCopy, TrainedCopy, adapter_state
from lora_edu.core.peft_io import check_tensors, expected_tensors, read_config, read_tensors


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
    state = adapter_state(model)
    if adapter_name not in state.configs:
        raise KeyError(f"no adapter named {adapter_name!r}; this model has: {', '.join(state.configs)}")
    layers: dict[str, Any] = dict(adapter_layers(model, adapter_name))
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge(model) before its values are replaced")
    if state.configs[adapter_name] is None:
        raise ValueError(f"adapter {adapter_name!r} was put in by hand, without a config; use inject(model, config)")
    folder = Path(directory)
    config, tensors = read_config(folder), read_tensors(folder)
    plain = type(config) is LoraConfig and not config.use_dora and config.init_lora_weights is True
    if not plain or not all(isinstance(layer, LoRALinear) for layer in layers.values()):
        raise ValueError(f"{folder}: only plain LoRA is swapped in place; use load_adapter with a new adapter_name")
    copies = [
        PlannedCopy(name, parent, attribute, module, module.copies[adapter_name])
        for name, parent, attribute, module in named_places(model)
        if isinstance(module, TrainedCopy) and adapter_name in module.copies
    ]
    plan = Plan(adapter_name, state.configs[adapter_name], layers, [], copies, state.biases.get(adapter_name, []))
    expected = expected_tensors(plan)
    check_tensors(tensors, expected, plan, model, folder)
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])
    for name, layer in layers.items():
        layer.lora_alpha, layer.use_rslora = config.alpha_of(name), config.use_rslora
        layer.scaling = layer.lora_alpha / (math.sqrt(layer.r) if config.use_rslora else layer.r)
    state.configs[adapter_name] = config
