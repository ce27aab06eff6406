"""What else an adapter brings: trained copies of modules (``modules_to_save``), trained biases. Built in lesson 08."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_edu.core.adapter import adapter_layers
from lora_edu.core.matching import Wrapper, named_places, near_names
from lora_edu.core.refusals import check_is_here

PREFIX = "base_model.model."  # of every key in PEFT's files that names a module

# What the new heads of these tasks are called in transformers' models; PEFT trains and saves them without being asked.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Part:
    """Something that an adapter brings beside its layers: a trained copy, a bias, a prefix. Made, then installed.

    Attributes:
        place: what it is about, for messages; two parts of one place cannot be in use at the same time.
        unloadable: ``merge_and_unload`` can leave its effect in a plain model.
        by_row: a mixed batch can answer each row with another: ``serving.mixed`` does so for copies of modules.
    """

    place: str
    unloadable: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    def parameters(self) -> Iterable[nn.Parameter]:
        """What trains."""
        raise NotImplementedError

    def install(self) -> None:
        """Take the place in the model, switched off. Nothing before this changes the model."""

    def use(self, on: bool) -> None:
        """Switch on or off; what is off leaves no trace in the outputs."""
        raise NotImplementedError

    def to_file(self) -> dict[str, Tensor]:
        """What a file holds of it: {full key: tensor}."""
        raise NotImplementedError

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a file holds; keys and shapes are those of ``to_file``."""
        with torch.no_grad():
            for key, tensor in self.to_file().items():
                tensor.copy_(tensors[key])

    def repeats(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a key that ``to_file`` does not have is known to repeat, in PEFT's files, what the others say."""
        return False

    def unload(self) -> None:
        """Leave the model for good: what is on by now leaves its effect, what is off leaves nothing."""


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
class ModuleCopy(Part):
    """One adapter's copy of a module of ``modules_to_save``, and the places at which its wrapper goes."""

    by_row = True

    place: str  # the module's first original name
    adapter_name: str
    spots: list[tuple[nn.Module, str]]  # (parent, attribute): more than one where the module is registered twice
    wrapper: TrainedCopy
    copy: nn.Module

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.copy.parameters()

    def install(self) -> None:
        for parent, attribute in self.spots:
            setattr(parent, attribute, self.wrapper)
        self.wrapper.copies[self.adapter_name] = self.copy

    def use(self, on: bool) -> None:
        if on:
            self.wrapper.active = self.adapter_name
        elif self.wrapper.active == self.adapter_name:
            self.wrapper.active = None

    def to_file(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{self.place}.{key}": tensor for key, tensor in self.copy.state_dict().items()}

    def repeats(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """PEFT writes an embedding's copy twice, and the pretrained module that the copy replaces."""
        tail = key.removeprefix(f"{PREFIX}{self.place}.")
        for prefix in ("modules_to_save.", "original_module."):
            if tail != key and tail.startswith(prefix):
                inner = tail.removeprefix(prefix)
                copied = self.to_file().get(f"{PREFIX}{self.place}.{inner}")
                if prefix == "original_module.":  # the copy stands for it, whatever its values were
                    return copied is not None
                same = tensors.get(f"{PREFIX}{self.place}.{inner}")
                return (
                    same is not None and same.shape == tensors[key].shape and torch.equal(tensors[key].to(same), same)
                )
        return False


@dataclass
class TrainedBias(Part):
    """One bias with its pretrained and its trained value; the one in use is registered in its modules."""

    names: list[str]  # original names of the modules that hold it: more than one where it is tied
    modules: list[Any]
    pretrained: nn.Parameter
    trained: nn.Parameter
    in_file: list[str]  # the names that PEFT's file has of these: those of adapted layers, or all
    adapted: frozenset[str]  # PEFT calls the plain layer inside an adapted one ``base_layer``

    @property
    def place(self) -> str:  # type: ignore[override]
        """The bias's first name."""
        return f"{self.names[0]}.bias"

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self.trained]

    def use(self, on: bool) -> None:
        parameter = self.trained if on else self.pretrained
        parameter.data = parameter.data.to(self.modules[0].bias)  # moved to where the bias now in use is
        for module in self.modules:
            module.bias = parameter

    def to_file(self) -> dict[str, Tensor]:
        return {
            f"{PREFIX}{name}.base_layer.bias" if name in self.adapted else f"{PREFIX}{name}.bias": self.trained
            for name in self.in_file
        }


def copies_to_train(model: nn.Module, wanted: Sequence[str] | None, adapter_name: str) -> list[Part]:
    """One copy for each module that ``modules_to_save`` means, outermost first, none inside another.

    Raises:
        ValueError: if no module fits any of the names, or one of them holds adapters already.
    """
    if not wanted:
        return []
    made: dict[int, ModuleCopy] = {}
    names: list[str] = []
    for name, parent, attribute, module in named_places(model):
        inside = any(f"{name}.".startswith(f"{outer}.") for outer in names) and id(module) not in made
        if any(name.endswith(end) for end in wanted) and not inside:
            if adapter_layers(module.base if isinstance(module, TrainedCopy) else module):
                raise ValueError(
                    f"modules_to_save: {name!r} is adapted by another adapter already; a module is either adapted or "
                    "saved as a whole"
                )
            check_is_here(name, module, model)
            names.append(name)
            if id(module) not in made:
                wrapper = module if isinstance(module, TrainedCopy) else TrainedCopy(module)
                trained = copy.deepcopy(wrapper.base).requires_grad_(True)
                made[id(module)] = ModuleCopy(name, adapter_name, [], wrapper, trained)
            made[id(module)].spots.append((parent, attribute))
    if not made:
        modules = {name: module for name, _, _, module in named_places(model)}
        raise ValueError(
            f"modules_to_save={list(wanted)}: no module has such a name; near names: {near_names(wanted, modules)}"
        )
    return list(made.values())


def biases_to_train(model: nn.Module, bias: str, replaced: Sequence[str], copies: Sequence[Part]) -> list[Part]:
    """The biases that ``bias`` lets train ("none", "all", "lora_only" for those of adapted layers), a shared one once.

    Modules of ``modules_to_save`` are left out: there the copy trains, biases and all.
    """
    if bias == "none":
        return []
    copied = [each.wrapper.base for each in copies if isinstance(each, ModuleCopy)]
    left_out = {id(parameter) for module in copied for parameter in module.parameters()}
    holders: dict[int, TrainedBias] = {}
    wanted: set[int] = set()
    for name, _, _, module in [("", None, "", model), *named_places(model)]:
        while isinstance(module, Wrapper):
            module = module.base
        found = module._parameters.get("bias")
        if found is None or id(found) in left_out:
            continue
        if id(found) not in holders:
            trained = nn.Parameter(found.detach().clone())
            holders[id(found)] = TrainedBias([], [], found, trained, [], frozenset(replaced))
        holder = holders[id(found)]
        if not any(known is module for known in holder.modules):
            holder.names.append(name)
            holder.modules.append(module)
            if bias == "all" or name in replaced:
                holder.in_file.append(name)
        if bias == "all" or name in replaced:
            check_is_here(name, module, model)
            wanted.add(id(found))
    return [holder for key, holder in holders.items() if key in wanted]


def with_task_head(config: Any, model: nn.Module) -> Any:
    """The config with the model's new head for its ``task_type`` among ``modules_to_save``, as PEFT adds it."""
    heads = TASK_HEADS.get(config.task_type or "", ())
    given = list(config.modules_to_save or ())
    names = [name for name, _, _, _ in named_places(model)]
    new = [head for head in heads if head not in given and any(name.endswith(head) for name in names)]
    return replace(config, modules_to_save=[*given, *new]) if new else config
