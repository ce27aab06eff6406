"""Put adapters into a model: find the layers, wrap them, freeze the rest, report what trains. Built in lesson 04."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, adapter_layers, innermost, named_places
from lora_edu.core.config import AdapterConfig, InjectionContext, LoraConfig
from lora_edu.core.matching import expand_targets, is_target, matches_names, near_names
from lora_edu.core.parts import (
    AdapterState,
    PlannedCopy,
    TrainedBias,
    TrainedCopy,
    adapter_state,
    biases_to_train,
    extra_parameters,
    planned_copies,
    use_parts,
    with_task_head,
)


@dataclass(frozen=True)
class InjectionReport:
    """What ``inject`` did: the adapted modules by name, and the model's parameter counts afterwards."""

    replaced: list[str]
    trainable: int
    total: int

    def __str__(self) -> str:
        return (
            f"adapted {len(self.replaced)} layers; trainable {self.trainable:,} of {self.total:,} parameters "
            f"({100 * self.trainable / self.total:.4f} %)"
        )


@dataclass
class Plan:
    """An injection that is worked out but not carried out: the model is still as it was."""

    adapter_name: str
    config: LoraConfig
    layers: dict[str, AdapterLayer]  # by original name, a shared module once
    places: list[tuple[nn.Module, str, AdapterLayer]]  # (parent, attribute, layer), a shared module at each place
    copies: list[PlannedCopy]
    biases: list[TrainedBias]


def inject(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    fast: bool = False,
) -> InjectionReport:
    """Wrap every layer that the config means in an adapter, in place, and freeze everything else.

    The first adapter of a model becomes active and trainable; later ones wait for ``set_adapter``.

    Args:
        model: any model; its linear, Conv1D and embedding layers can be adapted.
        config: which layers, which rank, which scale.
        adapter_name: a name without dots, new to this model.
        autocast_adapter_dtype: keep A and B in float32 where the base is in half precision.
        fast: use the fused layers of lesson 21 where there are some: the same numbers up to rounding, in less time.

    Raises:
        ValueError: no module fits (near names are listed), the name is taken, the model is a bare layer, an adapter
            is merged, or a layer cannot be adapted. The model is then as it was before.
        TypeError: the config is no adapter config, or a target's weight is packed into integers.

    Built in lesson 04.
    """
    with trainability_kept_on_failure(model):
        plan = plan_injection(model, config, adapter_name, autocast_adapter_dtype, fast)
    carry_out(model, plan)
    trainable, total = count_parameters(model)
    return InjectionReport(list(plan.layers), trainable, total)


def plan_injection(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    fast: bool = False,
) -> Plan:
    """Find the targets and build their layers without putting them into the model."""
    check_injection(model, config, adapter_name)
    config = with_task_head(config, model)
    if config.modules_to_save and hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} is a word that PyTorch's ModuleDict uses itself: choose another"
        )
    places = list(named_places(model))
    modules: dict[str, nn.Module] = {name: module for name, _, _, module in places}
    names = target_names(model, config, modules)

    context = InjectionContext(adapter_name, autocast_adapter_dtype, fast)
    layers = {name: config.build(modules[name], name, context) for name in names}
    # A module with two names is one module: wherever it is registered, the same adapted layer takes its place.
    wrapped = {id(modules[name]): layer for name, layer in layers.items()}
    spots = [(parent, attr, wrapped[id(module)]) for _, parent, attr, module in places if id(module) in wrapped]
    copies = planned_copies(model, config)
    if both := [planned.name for planned in copies if planned.name in layers]:
        raise ValueError(
            f"modules_to_save={config.modules_to_save}: {both[0]!r} is a target too; a module is adapted or saved whole"
        )
    biases = biases_to_train(model, config, names)
    if config.target_modules is None:  # remember what None meant, so that a saved file does not depend on a table
        config = replace(config, target_modules=expand_targets(None, model, modules))
    return Plan(adapter_name, config, layers, spots, copies, biases)


def check_injection(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """Raise if this adapter cannot be injected into this model, whatever its targets."""
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
    if "adapter_state" not in model.__dict__:
        if adapter_layers(model, adapter_name):
            raise ValueError(
                f"layers of this model already have an adapter named {adapter_name!r}, put in by hand or into a part "
                "of the model; choose another adapter_name"
            )
        return
    state = adapter_state(model)
    if adapter_name in state.configs:
        raise ValueError(
            f"the model already has an adapter named {adapter_name!r} (it has: {', '.join(state.configs)}); choose "
            "another adapter_name"
        )
    if any(layer.merge_state.layers for layer in adapter_layers(model).values()):
        raise ValueError(f"an adapter is merged: call unmerge(model) before adding adapter {adapter_name!r}")
    if config.bias != "none" and state.biases:
        raise ValueError(
            f"bias={config.bias!r}: adapter {next(iter(state.biases))!r} trains biases already, and one model can "
            "hold one such adapter; use bias='none'"
        )


def target_names(model: nn.Module, config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    """Original names of the modules to adapt, each module once.

    A module with several names is a target if one of them fits, and goes by its first.

    Raises:
        ValueError: if there is none. A part of ``target_modules`` that fits nothing is only warned about, as a list
            of targets may serve several families of models.
    """
    frozen = {name: innermost(module) for name, module in modules.items()}
    targets = expand_targets(config.target_modules, model, frozen, config.task_type)
    narrowed = (config.exclude_modules, config.modules_to_save, config.layers_to_transform, config.layers_pattern)
    first_names: dict[int, str] = {}
    for name, module in modules.items():
        first_names.setdefault(id(module), name)
    hits = [first_names[id(module)] for name, module in modules.items() if is_target(name, targets, *narrowed)]
    names = list(dict.fromkeys(hits))
    if not names:
        anywhere = [name for name in modules if is_target(name, targets)]
        reason = (
            f"{len(anywhere)} modules fit, but exclude_modules, modules_to_save or layers_to_transform rule them out"
            if anywhere
            else f"no module of the {type(model).__name__} has such a name; near names: {near_names(targets, modules)}"
        )
        raise ValueError(f"target_modules={config.target_modules!r}: {reason}")
    if not isinstance(targets, str):
        for target in targets:
            if not any(matches_names([target], name) for name in modules):
                near = near_names(target, modules)
                warnings.warn(f"target_modules: {target!r} fits no module; near names: {near}", stacklevel=4)
    config.warn_unused_patterns(names)
    return names


def carry_out(model: nn.Module, plan: Plan, trainable: bool = True) -> None:
    """Put a plan's layers into the model, and make its adapter the active one if it is the first."""
    first = "adapter_state" not in model.__dict__
    if first:
        model.__dict__["adapter_state"] = AdapterState()
        model.requires_grad_(False)
    state = adapter_state(model)
    for parent, attribute, layer in plan.places:
        setattr(parent, attribute, layer)
    for planned in plan.copies:
        setattr(planned.parent, planned.attribute, planned.wrapper)
        planned.wrapper.copies[plan.adapter_name] = planned.copy
    state.configs[plan.adapter_name] = plan.config
    if plan.biases:
        state.biases[plan.adapter_name] = plan.biases
    if first:
        activate(model, [plan.adapter_name])
    else:  # the new adapter waits for set_adapter; the others keep what trains
        for layer in plan.layers.values():
            layer.active = False
        for parameter in new_parameters(plan):
            parameter.requires_grad_(False)
    if first and not trainable:
        model.requires_grad_(False)


def new_parameters(plan: Plan) -> Iterator[nn.Parameter]:
    """What a plan adds: the layers' adapters, the copies' parameters and the trained biases."""
    for layer in plan.layers.values():
        yield from layer.adapter_parameters()
    for planned in plan.copies:
        yield from planned.copy.parameters()
    for bias in plan.biases:
        yield bias.trained


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Make one adapter (or several, whose updates then add up) the active and the only trainable one.

    Raises:
        KeyError: if the model has no adapter of that name.
        ValueError: if an adapter is merged into the weights.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    known = adapter_state(model).configs
    for name in names:
        if name not in known:
            raise KeyError(f"no adapter named {name!r}; this model has: {', '.join(known)}")
    if any(layer.merge_state.layers for layer in adapter_layers(model).values()):
        raise ValueError(f"an adapter is merged into the weights: call unmerge(model) before set_adapter({names})")
    for place, _, _, module in named_places(model):
        if isinstance(module, TrainedCopy) and len(both := [n for n in names if n in module.copies]) > 1:
            raise ValueError(f"{place!r} has a trained copy in each of {both}, and only one can be in use: name one")
    activate(model, names)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Switch to these adapters, without checks."""
    state = adapter_state(model)
    state.active = list(names)
    for adapter_name in state.configs:
        chosen = adapter_name in names
        for layer in adapter_layers(model, adapter_name).values():
            layer.active = chosen
            for parameter in layer.adapter_parameters():
                parameter.requires_grad_(chosen)
        for parameter in extra_parameters(model, adapter_name):
            parameter.requires_grad_(chosen)
    use_parts(model, names)


def list_adapters(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order in which they came; empty for a plain model."""
    state = model.__dict__.get("adapter_state")
    return [] if state is None else list(state.configs)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, total)`` of a model, as PEFT's ``get_nb_trainable_parameters`` counts them. Lessons 04 and 05.

    Each parameter counts once, tied weights included. A copy kept for training (``modules_to_save``) is a parameter
    of its own. 4-bit parameters (bitsandbytes' ``Params4bit``) store two weights in a byte: counted are the weights.
    """
    trainable = total = 0
    for parameter in model.parameters():
        number = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            number *= 2 * parameter.element_size()
        total += number
        trainable += number if parameter.requires_grad else 0
    return trainable, total


@contextmanager
def trainability_kept_on_failure(model: nn.Module) -> Iterator[None]:
    """Give every parameter its requires_grad back if the block raises: building a layer freezes its base."""
    before = [(parameter, parameter.requires_grad) for parameter in getattr(model, "parameters", tuple)()]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise
