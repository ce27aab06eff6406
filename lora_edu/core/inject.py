"""Put adapters into a model: find the layers, wrap them, freeze the rest, report what trains. Built in lesson 04."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_edu.core.adapter import AdapterLayer, innermost
from lora_edu.core.config import AdapterConfig
from lora_edu.core.experts import LeftOutWarning, experts_left_out
from lora_edu.core.matching import (
    expand_targets,
    is_target,
    named_places,
    warn_caller,
    warn_unused_targets,
    why_none,
)
from lora_edu.core.merging import disable_adapter
from lora_edu.core.methods import InjectionContext, make_fast, method_of
from lora_edu.core.parts import ModuleCopy, Part, with_task_head
from lora_edu.core.refusals import check_is_called, check_is_here
from lora_edu.core.state import (
    AdapterState,
    activate,
    adapter_state,
    injected_models,
    model_to_inject,
    trained_parameters,
    warn_if_not_averaged,
)
from lora_edu.nf4 import PackedParameter


@dataclass(frozen=True)
class InjectionReport:
    """What ``inject`` did: the adapted modules by name, and the model's parameter counts afterwards.

    ``fast`` says how many of the layers have the fused form of lesson 24.
    """

    replaced: list[str]
    trainable: int
    total: int
    fast: int = 0

    def __str__(self) -> str:
        fused = f", {self.fast} of them fused" if self.fast else ""
        return (
            f"adapted {len(self.replaced)} layers{fused}; trainable {self.trainable:,} of {self.total:,} parameters "
            f"({100 * self.trainable / self.total:.4f} %)"
        )


@dataclass
class Plan:
    """An injection that is worked out but not carried out: the model is still as it was."""

    config: Any
    context: InjectionContext
    layers: dict[str, AdapterLayer]  # by original name, a shared module once
    spots: list[tuple[nn.Module, str, AdapterLayer]]  # (parent, attribute, layer), a shared module at each place
    parts: list[Part]


def inject(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    fast: bool = False,
    batches: Iterable[Any] | None = None,
) -> InjectionReport:
    """Wrap every layer that the config means in an adapter, in place, and freeze everything else.

    The first adapter of a model becomes active and trainable; later ones wait for ``set_adapter``.

    Args:
        model: any model; its linear, Conv1D and embedding layers can be adapted.
        config: which layers, which rank, which scale. The model keeps a copy.
        adapter_name: a name without dots, new to this model.
        autocast_adapter_dtype: keep A and B in float32 where the base is in half precision.
        fast: use the fused layers of lesson 24 where there are some: the same numbers up to rounding, in less time.
        batches: for a method whose start is computed from data; what the model is called with, as dictionaries.

    Raises:
        ValueError: no module fits (near names are listed), the name is taken, the model is a bare layer, an adapter
            is merged, or a layer cannot be adapted. The model is then as it was before.
        TypeError: the config is no adapter config, or a target's weight is packed into integers.

    Built in lesson 04.
    """
    wrapper, model = model, model_to_inject(model, config, adapter_name)
    context = InjectionContext(adapter_name, autocast_adapter_dtype)
    with trainability_kept_on_failure(model):
        config = aimed(model, config, adapter_name)
        context.shared |= learned(model, config, batches)
        plan = plan_injection(model, config, context)
    if plan.layers and (left_out := experts_left_out(model, plan.config, plan.layers)):
        warn_caller(str(left_out), LeftOutWarning)
    fused = make_fast(plan.layers) if fast else 0
    carry_out(model, plan)
    warn_if_not_averaged(wrapper)
    trainable, total = count_parameters(model)
    return InjectionReport(list(plan.layers), trainable, total, fused)


def aimed(model: nn.Module, config: Any, adapter_name: str) -> Any:
    """A copy of the config that knows its targets in this model."""
    config = with_task_head(copy.deepcopy(config, {id(config.layers): {}, id(config.targets): {}}), model)
    if config.modules_to_save and hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} is a word that PyTorch's ModuleDict uses itself: choose another"
        )
    method_of(config)  # says so if there is none, before anything else is looked at
    config.complete(model)
    if not config.replaces_layers:
        return config
    places = list(named_places(model))
    modules: dict[str, nn.Module] = {name: module for name, _, _, module in places}
    if config.target_modules is None:
        # Remember what None meant, so that a saved file does not depend on a table.
        config.target_modules = list(config.default_targets(model, modules))
    for name in target_names(model, config, modules):
        check_is_called(name, [(parent, attr) for _, parent, attr, module in places if module is modules[name]])
        check_is_here(name, innermost(modules[name]), model)
        config.targets[name] = innermost(modules[name])
        config.builder(config.targets[name], name)  # says so if the method cannot adapt this kind of layer
    return config


def learned(model: nn.Module, config: Any, batches: Iterable[Any] | None) -> dict[str, Any]:
    """What the method's ``prepare`` finds in the batches, with the model's other adapters switched off."""
    method = method_of(config)
    prepare = method.prepare or getattr(type(config), "prepare", None)
    if prepare is None:
        return {}
    if batches is None:
        raise ValueError(f"{method.name} starts from data: pass batches=[...], what the model is called with")
    with disable_adapter(model) if injected_models(model) else nullcontext():
        return prepare(config, model, batches)


def plan_injection(model: nn.Module, config: Any, context: InjectionContext) -> Plan:
    """Build the layers of a config that knows its targets, without putting them into the model."""
    places = list(named_places(model))
    modules = {name: module for name, _, _, module in places}
    layers = {name: config.build(modules[name], name, context) for name in config.targets}
    # A module with two names is one module: wherever it is registered, the same adapted layer takes its place.
    wrapped = {id(modules[name]): layer for name, layer in layers.items()}
    spots = [(parent, attr, wrapped[id(module)]) for _, parent, attr, module in places if id(module) in wrapped]
    parts = config.parts(model, list(layers), context)
    if both := [part.place for part in parts if isinstance(part, ModuleCopy) and part.place in layers]:
        raise ValueError(
            f"modules_to_save={config.modules_to_save}: {both[0]!r} is a target too; a module is adapted or saved whole"
        )
    config.layers = layers
    return Plan(config, context, layers, spots, parts)


def target_names(model: nn.Module, config: Any, modules: dict[str, nn.Module]) -> list[str]:
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
    left_out = experts_left_out(model, config, names)
    if not names:
        reason = f"no layer has such a name; {left_out}" if left_out else why_none(targets, model, frozen)
        raise ValueError(f"target_modules={config.target_modules!r}: {reason}")
    warn_unused_targets(targets, frozen, left_out.means if left_out else lambda target: False)
    config.warn_unused_patterns(names)
    return names


def carry_out(model: nn.Module, plan: Plan, trainable: bool = True) -> None:
    """Put a plan's layers into the model, and make its adapter the active one if it is the first."""
    name = plan.context.adapter_name
    first = "adapter_state" not in model.__dict__
    if first:
        model.__dict__["adapter_state"] = AdapterState()
        model.requires_grad_(False)
    state = adapter_state(model)
    for parent, attribute, layer in plan.spots:
        setattr(parent, attribute, layer)
        layer.injected = True
    for part in plan.parts:
        part.install()
    state.configs[name], state.contexts[name], state.parts[name] = plan.config, plan.context, plan.parts
    if first:
        activate(model, [name])
    else:  # the new adapter waits for set_adapter; the others keep what trains
        for layer in plan.layers.values():
            layer.active = False
        for parameter in trained_parameters(plan.layers.values(), plan.parts):
            parameter.requires_grad_(False)
    if first and not trainable:
        model.requires_grad_(False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, total)`` of a model, as PEFT's ``get_nb_trainable_parameters`` counts them. Lessons 04 and 05.

    Each parameter counts once, tied weights included. A copy kept for training (``modules_to_save``) is a parameter
    of its own. 4-bit parameters (lesson 14's, or bitsandbytes' ``Params4bit``) store two weights in a byte: counted are
    the weights.
    """
    trainable = total = 0
    for parameter in model.parameters():
        number = parameter.numel()
        if isinstance(parameter, PackedParameter) or type(parameter).__name__ == "Params4bit":
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
