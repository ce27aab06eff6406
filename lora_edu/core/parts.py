"""What else an adapter may train: copies of whole modules (``modules_to_save``) and biases. Built in lesson 08."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lora_edu.core.adapter import Wrapper, adapter_layers, adapters_around, named_places
from lora_edu.core.config import LoraConfig
from lora_edu.core.matching import near_names

# What the new heads of these tasks are called in transformers' models; PEFT trains and saves them without being asked.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class TrainedCopy(Wrapper):
    """A frozen module and one trained copy of it per adapter; ``forward`` uses the active one.

    This is how a new classification head is trained beside LoRA: it has no pretrained weight to add to.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module()(*args, **kwargs)

    def module(self) -> nn.Module:
        """The module in use: the active adapter's copy, or the pretrained one."""
        return self.base if self.active is None else self.copies[self.active]

    def __getattr__(self, name: str) -> Any:
        # Model code asks heads for attributes such as .weight or .out_features: answer as the module in use.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "copies", "active"):
                raise
            return getattr(self.module(), name)


@dataclass
class TrainedBias:
    """One bias with its pretrained and its trained value; the one in use is registered in ``module``."""

    names: list[str]  # original names of the modules that hold it: more than one where it is tied
    modules: list[Any]
    pretrained: nn.Parameter
    trained: nn.Parameter

    def use(self, parameter: nn.Parameter) -> None:
        """Register ``parameter`` as the module's bias, moved to where the bias now in use is."""
        parameter.data = parameter.data.to(self.modules[0].bias)
        for module in self.modules:
            module.bias = parameter


@dataclass
class AdapterState:
    """What a model remembers of its adapters: the config of each, and the biases that one of them trains."""

    configs: dict[str, Any] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    biases: dict[str, list[TrainedBias]] = field(default_factory=dict)


def adapter_state(model: nn.Module) -> AdapterState:
    """The model's adapter state; for a model whose layers were wrapped by hand, one read off these layers.

    Raises:
        ValueError: if there is no adapter in this model.
    """
    state = model.__dict__.get("adapter_state")
    if state is None:
        places = [model, *(module for _, _, _, module in named_places(model))]
        layers = [layer for module in places for layer in adapters_around(module)]
        if layers:
            names = list(dict.fromkeys(layer.adapter_name for layer in layers))
            active = [name for name in names if any(la.active for la in layers if la.adapter_name == name)]
            return AdapterState(configs=dict.fromkeys(names), active=active)
        raise ValueError(
            f"this {type(model).__name__} has no adapters: call inject(model, LoraConfig(...)) or "
            "load_adapter(model, directory) first, with the same model object"
        )
    return state


def with_task_head(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The config with the model's new head for its ``task_type`` among ``modules_to_save``, as PEFT adds it."""
    heads = TASK_HEADS.get(config.task_type or "", ())
    given = list(config.modules_to_save or ())
    names = [name for name, _, _, _ in named_places(model)]
    new = [head for head in heads if head not in given and any(name.endswith(head) for name in names)]
    return replace(config, modules_to_save=[*given, *new]) if new else config


def saved_places(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """The places that ``config.modules_to_save`` means, outermost module first, none inside another.

    Raises:
        ValueError: if no module fits any of the names, or one of them holds adapters already.
    """
    wanted = config.modules_to_save
    if not wanted:
        return []
    found: list[tuple[str, nn.Module, str, nn.Module]] = []
    for place in named_places(model):
        name, module = place[0], place[3]
        if any(name.endswith(end) for end in wanted) and not any(name.startswith(outer[0] + ".") for outer in found):
            inner = module.base if isinstance(module, TrainedCopy) else module
            if adapter_layers(inner):
                raise ValueError(
                    f"modules_to_save: {name!r} is adapted by another adapter already; a module is either adapted or "
                    "saved as a whole"
                )
            found.append(place)
    if not found:
        modules = {name: module for name, _, _, module in named_places(model)}
        raise ValueError(
            f"modules_to_save={list(wanted)}: no module has such a name; near names: {near_names(wanted, modules)}"
        )
    return found


def biases_to_train(model: nn.Module, config: LoraConfig, replaced: Sequence[str]) -> list[TrainedBias]:
    """The biases that ``config.bias`` lets train, a shared one once; nothing is changed in the model yet.

    Modules of ``modules_to_save`` are left out: there the copy trains, biases and all.
    """
    if config.bias == "none":
        return []
    left_out: set[int] = {id(p) for _, _, _, module in saved_places(model, config) for p in module.parameters()}
    holders: dict[int, TrainedBias] = {}
    wanted: set[int] = set()
    for name, _, _, module in [("", None, "", model), *named_places(model)]:
        while isinstance(module, Wrapper):
            module = module.base
        bias = module._parameters.get("bias")
        if bias is None or id(bias) in left_out:
            continue
        found = holders.setdefault(id(bias), TrainedBias([], [], bias, nn.Parameter(bias.detach().clone())))
        if not any(known is module for known in found.modules):
            found.names.append(name)
            found.modules.append(module)
        if config.bias == "all" or name in replaced:
            wanted.add(id(bias))
    return [holder for key, holder in holders.items() if key in wanted]


@dataclass
class PlannedCopy:
    """A trained copy that is made but not in the model yet: where its wrapper goes, and the copy itself."""

    name: str
    parent: nn.Module
    attribute: str
    wrapper: TrainedCopy
    copy: nn.Module


def planned_copies(model: nn.Module, config: LoraConfig) -> list[PlannedCopy]:
    """One copy for each place of ``modules_to_save``; a module registered twice has one copy, under its first name."""
    made: dict[int, PlannedCopy] = {}
    plan = []
    for name, parent, attribute, module in saved_places(model, config):
        if id(module) not in made:
            wrapper = module if isinstance(module, TrainedCopy) else TrainedCopy(module)
            trained = copy.deepcopy(wrapper.base).requires_grad_(True)
            made[id(module)] = PlannedCopy(name, parent, attribute, wrapper, trained)
        first = made[id(module)]
        plan.append(PlannedCopy(first.name, parent, attribute, first.wrapper, first.copy))
    return plan


def use_parts(model: nn.Module, active: Sequence[str]) -> None:
    """Put the biases and module copies of the active adapters in use, and the pretrained ones elsewhere."""
    state = adapter_state(model)
    for adapter_name, biases in state.biases.items():
        for bias in biases:
            bias.use(bias.trained if adapter_name in active else bias.pretrained)
    for _, _, _, module in named_places(model):
        if isinstance(module, TrainedCopy):
            module.active = next((name for name in active if name in module.copies), None)


def extra_parameters(model: nn.Module, adapter_name: str) -> Iterator[nn.Parameter]:
    """The biases and copied modules' parameters that one adapter trains."""
    for bias in adapter_state(model).biases.get(adapter_name, []):
        yield bias.trained
    for _, _, _, module in named_places(model):
        if isinstance(module, TrainedCopy) and adapter_name in module.copies:
            yield from module.copies[adapter_name].parameters()
