"""Which adapters a model has and which are in use: one state a model, found through any wrapper. Lesson 04."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, adapter_layers, adapters_around, check_combination, innermost
from lora_edu.core.config import AdapterConfig
from lora_edu.core.matching import named_places, warn_caller
from lora_edu.core.parts import Part, TrainedBias
from lora_edu.core.refusals import check_unsharded


@dataclass
class AdapterState:
    """What a model remembers of its adapters.

    Attributes:
        configs, contexts, parts: of each adapter; no config for layers that were wrapped by hand.
        active: the names of those in use.
    """

    configs: dict[str, Any] = field(default_factory=dict)
    contexts: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)

    def check_name(self, adapter_name: str) -> None:
        """Raise KeyError unless there is an adapter of that name."""
        if adapter_name not in self.configs:
            raise KeyError(f"no adapter named {adapter_name!r}; this model has: {', '.join(self.configs)}")

    def use_parts(self, names: Sequence[str]) -> None:
        """Put the parts of these adapters in use, and no others."""
        for adapter_name in sorted(self.parts, key=lambda name: name in names):  # first off, then on
            for part in self.parts[adapter_name]:
                part.use(adapter_name in names)


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def injected_models(model: nn.Module) -> dict[str, nn.Module]:
    """The injected models that are this one or lie inside it, outermost first: {name: model}."""
    model = unwrapped_model(model)
    if "adapter_state" in model.__dict__:
        return {"": model}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if "adapter_state" in module.__dict__ and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def injected_model(model: nn.Module) -> nn.Module:
    """The one injected model that this one is or holds; else this one, if layers in it were wrapped by hand.

    Raises:
        ValueError: if there is none, or more than one, or if this is only a part of an injected model.
    """
    found = injected_models(model)
    check_one(model, found)
    if found:
        return next(iter(found.values()))
    model = unwrapped_model(model)
    if not layers_in(model):
        raise ValueError(
            f"this {type(model).__name__} has no adapters: call inject(model, LoraConfig(...)) or "
            "load_adapter(model, directory) first, with the same model object"
        )
    check_whole(model)
    return model


def check_one(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Raise if several parts of a model were injected, each on its own."""
    if len(found) > 1:
        raise ValueError(
            f"adapters were injected into {len(found)} parts of this {type(model).__name__}, each on its own: "
            f"{', '.join(found)}; give one of them, for example model.get_submodule({next(iter(found))!r})"
        )


def check_whole(model: nn.Module) -> None:
    """Raise if a model without a state of its own has layers that were adapted together with a larger one."""
    if any(layer.injected for layer in layers_in(model)):
        raise ValueError(
            f"the adapters in this {type(model).__name__} were injected into a larger model, of which it is a part: "
            "give that model"
        )


def layers_in(model: nn.Module) -> list[AdapterLayer]:
    """Every adapted layer that this is or holds."""
    places = [model, *(module for _, _, _, module in named_places(model))]
    return [layer for module in places for layer in adapters_around(module)]


def adapter_state(model: nn.Module) -> AdapterState:
    """The adapter state of the one injected model that this one is or holds; errors as in ``injected_model``.

    Layers that were wrapped by hand have no state but what they say themselves.
    """
    model = injected_model(model)
    if "adapter_state" in model.__dict__:
        return model.__dict__["adapter_state"]
    layers = layers_in(model)
    names = list(dict.fromkeys(layer.adapter_name for layer in layers))
    active = [name for name in names if any(la.active for la in layers if la.adapter_name == name)]
    return AdapterState(configs=dict.fromkeys(names), active=active)


def warn_if_not_averaged(model: nn.Module) -> None:
    """Warn if something is to train that DistributedDataParallel, built before, does not know."""
    if any(isinstance(each, nn.parallel.DistributedDataParallel) and each.training for each in model.modules()):
        warn_caller(
            "DistributedDataParallel averages the gradients only of what trained when it was built: before training, "
            "build it anew around the model"
        )


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Make one adapter (or several, whose updates then add up) the active and the only trainable one.

    Raises:
        KeyError: if the model has no adapter of that name.
        ValueError: if an adapter is merged into the weights, or several cannot be in use together.
    """
    wrapper, model = model, injected_model(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
    state = adapter_state(model)
    for name in names:
        state.check_name(name)
    places = adapter_layers(model)
    if any(layer.merge_state.layers for layer in places.values()):
        raise ValueError(f"an adapter is merged into the weights: call unmerge(model) before set_adapter({names})")
    for outermost in places.values():
        check_combination([layer for layer in adapters_around(outermost) if layer.adapter_name in names])
    taken: dict[str, str] = {}
    for name in names:
        for part in state.parts.get(name, []):
            if other := taken.get(part.place):
                raise ValueError(
                    f"{part.place!r} is trained by each of {[other, name]}, and only one can be in use: name one"
                )
            taken[part.place] = name
    if any(name not in state.active for name in names):
        warn_if_not_averaged(wrapper)
    activate(model, names)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Switch to these adapters, without checks."""
    state = adapter_state(model)
    state.active = list(names)
    for adapter_name in state.configs:
        chosen = adapter_name in names
        layers = list(adapter_layers(model, adapter_name).values())
        for layer in layers:
            layer.active = chosen
        for parameter in trained_parameters(layers, state.parts.get(adapter_name, [])):
            parameter.requires_grad_(chosen)
    state.use_parts(names)


def list_adapters(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order in which they came; empty for a plain model."""
    return list(adapter_state(model).configs) if injected_models(model) else []


def trained_parameters(layers: Iterable[AdapterLayer], parts: Iterable[Part]) -> Iterator[nn.Parameter]:
    """What an adapter trains, in its layers and its parts."""
    for layer in layers:
        yield from layer.adapter_parameters()
    for part in parts:
        yield from part.parameters()


def model_to_inject(model: nn.Module, config: Any, adapter_name: str) -> nn.Module:
    """The model that an adapter goes into: the one injected before, inside whatever is around it, or this one.

    Raises:
        ValueError, TypeError: if this adapter cannot be injected into this model, whatever its targets.
    """
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected LoraConfig(...) from lora_edu")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, AdapterLayer | nn.Linear | Conv1D | nn.Embedding):
        wrapper = {"Conv1D": "LoRAConv1D", "Embedding": "LoRAEmbedding"}.get(
            type(innermost(model)).__name__, "LoRALinear"
        )
        raise ValueError(
            f"the model is a bare {type(model).__name__}, and a layer cannot replace itself in place; "
            f"use layer = {wrapper}(layer), or put the layer into a model"
        )
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r}: expected a non-empty name without dots")
    check_unsharded(model)
    found = injected_models(model)
    check_one(model, found)
    model = next(iter(found.values()), unwrapped_model(model))
    if "adapter_state" not in model.__dict__:
        check_whole(model)
        if adapter_layers(model, adapter_name):
            raise ValueError(
                f"layers of this model already have an adapter named {adapter_name!r}, put in by hand; "
                "choose another adapter_name"
            )
        return model
    state = adapter_state(model)
    if adapter_name in state.configs:
        raise ValueError(
            f"the model already has an adapter named {adapter_name!r} (it has: {', '.join(state.configs)}); choose "
            "another adapter_name"
        )
    if any(layer.merge_state.layers for layer in adapter_layers(model).values()):
        raise ValueError(f"an adapter is merged: call unmerge(model) before adding adapter {adapter_name!r}")
    training = [name for name, parts in state.parts.items() if any(isinstance(part, TrainedBias) for part in parts)]
    if config.bias != "none" and training:
        raise ValueError(
            f"bias={config.bias!r}: adapter {training[0]!r} trains biases already, and one model can "
            "hold one such adapter; use bias='none'"
        )
    return model
