"""Experts that are no layers: nothing here adapts them, PEFT often does, and so they are named. Lesson 05.

In transformers 5 a mixture of experts keeps each projection of all its experts in one parameter of shape
(experts, out, in), where it had one linear layer an expert. PEFT reads ``"all-linear"`` and the older names as before
and, in the families that it knows, puts A and B of every expert beside that parameter. In these families it takes
*every* layer with such a name for an expert's, the dense ones and shared experts too, and leaves them unadapted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import conversion_mapping
from transformers.pytorch_utils import Conv1D

from lora_edu.core.matching import expand_targets, fits, is_target, matches_names, named_places, warn_caller

# PEFT's tables: of which parameter an older name is now a part. The router, "gate", is a module of its own kind.
OLDER_NAMES = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
    },
}  # fmt: skip
FUSED = "gate_up_proj"  # two older layers, side by side; PEFT gives it twice the rank


class LeftOutWarning(UserWarning):
    """Some parameters that the targets mean are left as they are."""


@dataclass(frozen=True)
class LeftOut:
    """Expert parameters that some targets mean and that are not adapted; as text it is one line.

    Attributes:
        parameters: their sizes by name.
        peft: how many numbers PEFT would train there with the same targets.
        refusal: what PEFT refuses in combination with them; empty if nothing.
        passed_over: adapted layers that PEFT would leave out for bearing an expert's name.
        called: the names that layers had where these parameters are now.
    """

    parameters: Mapping[str, int]
    peft: int
    refusal: str = ""
    passed_over: Collection[str] = ()
    called: Collection[str] = ()

    def means(self, target: str) -> bool:
        """Whether a name in a list of targets is that of something left out."""
        return any(is_target(name, [_first_expert(target)]) for name in self.called)

    def __str__(self) -> str:
        where = ", ".join(collapsed(self.parameters))
        if self.refusal:
            peft = f"PEFT refuses {self.refusal} here"
        else:
            peft = f"PEFT would train {self.peft:,} numbers there" if self.peft else "PEFT leaves them out as well"
            if self.passed_over:
                peft += f", and none in {len(self.passed_over)} linear layers of these names"
        return (
            f"left out: {sum(self.parameters.values()):,} numbers in experts and routers that are no linear layers "
            f"({where}); {peft}"
        )


def collapsed(names: Iterable[str]) -> list[str]:
    """The names with * for each number, each once."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


def expert_parameters(model: nn.Module) -> dict[str, int]:
    """The sizes of all parameters that hold the weights of several experts, by name."""
    return {name: tensor.numel() for name, owner, tensor in _parameters(model) if _holds_experts(owner, tensor)}


def experts_left_out(model: nn.Module, config: Any, names: Collection[str]) -> LeftOut | None:
    """What the config's targets mean in a mixture of experts, and no layer stands for.

    Args:
        config: of any method; what PEFT would do is looked up for its ``peft_type``.
        names: the modules that are adapted.
    """
    older = _older_names(model) if config.peft_type == "LORA" else {}
    found = [(name, owner, tensor) for name, owner, tensor in _parameters(model)
             if _holds_experts(owner, tensor) or _is_router(name, owner, older)]  # fmt: skip
    if not found:
        return None
    targets = config.target_modules
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    targets = ".*" if everything else expand_targets(targets, model, {})
    wanted = targets if isinstance(targets, str) else [_first_expert(target) for target in targets]
    narrowed = (None, config.modules_to_save, config.layers_to_transform, config.layers_pattern)
    meant = {}
    for name, _, tensor in found:
        called = _called(name, older)
        excluded = any(matches_names(config.exclude_modules, each) for each in [*called, name.rpartition(".")[0]])
        if not excluded and any(is_target(each, wanted, *narrowed) for each in called):
            meant[name] = tensor.numel()
    if not meant:
        return None
    asked = set(older) if everything else _asked_of_peft(model, targets, older, config)
    parts = {old for old, new in older.items() if new == FUSED}
    refusal = ""
    if 0 < len(asked & parts) < len(parts):
        refusal = f"{min(asked & parts)!r} without {min(parts - asked)!r}"
    elif asked:
        options = ("lora_dropout", "use_dora")
        refusal = next((f"{each}={getattr(config, each)}" for each in options if getattr(config, each, False)), "")
    adapts = {older[old] for old in asked}
    peft = sum(_peft_numbers(name, tensor, config, asked >= parts) for name, _, tensor in found
               if any(name.endswith(f".{new}") for new in adapts))  # fmt: skip
    passed_over = [name for name in taken_for_experts(model, names) if _last(name) in asked]
    return LeftOut(meant, peft, refusal, passed_over, [each for name in meant for each in _called(name, older)])


def taken_for_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of some layers that PEFT takes for experts because of their names: it never adapts them. Lesson 08."""
    older = {old for old, new in _older_names(model).items() if not new.endswith(".weight")}
    return [name for name in names if _last(name) in older]


def means_more_in_peft(model: nn.Module, targets: Any) -> bool:
    """Whether PEFT adapts more than lora_edu with these targets, in a family whose names it reads in its own way.

    Of a string it keeps the last segments only, and an expert's name becomes that of all experts.
    """
    older = _older_names(model)
    return bool(older) and (isinstance(targets, str) or any(_last(target) in older for target in targets or ()))


def warn_of_losses(model: Any, names: Iterable[str]) -> None:
    """Warn of adapted layers whose tensors PEFT drops when it loads their file."""
    if lost := taken_for_experts(model, names):
        warn_caller(
            f"PEFT takes layers of these names for experts in a {model.config.model_type!r} model: it drops the "
            f"tensors of {len(lost)} of them from this file, or refuses it: {', '.join(collapsed(lost))}; lora_edu "
            "loads them"
        )


def _older_names(model: nn.Module) -> dict[str, str]:
    """PEFT's table for this family, if it has one."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    alike: dict[Any, str] = {"mixtral": "mixtral"} | getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return OLDER_NAMES.get(alike.get(family, ""), {})


def _parameters(model: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    """(original name, owner, tensor) of each parameter that has a module as its owner, once."""
    seen: set[int] = set()
    for place, _, _, module in named_places(model):
        for attribute, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{place}.{attribute}", module, tensor


def _holds_experts(owner: nn.Module, tensor: Tensor) -> bool:
    """Whether this is a projection of several experts: by convention the classes of their owners say so."""
    return tensor.ndim == 3 and "Experts" in type(owner).__name__


def _is_router(name: str, owner: nn.Module, older: Mapping[str, str]) -> bool:
    """Whether this is the weight of a router that is no linear layer."""
    return older.get("gate") == "gate.weight" and name.endswith(".gate.weight") and not _is_linear(owner)


def _is_linear(module: nn.Module) -> bool:
    inside = getattr(module, "frozen", module)
    return isinstance(inside, nn.Linear | Conv1D)


def _called(name: str, older: Mapping[str, str]) -> list[str]:
    """A parameter's names: its own, and the older ones of the layers that it holds now, with the first expert's number.

    PEFT looks for those without.
    """
    former = [(name.removesuffix(new), old) for old, new in older.items() if name.endswith(f".{new}")]
    return [name, *(f"{place}{number}{old}" for place, old in former for number in ("", "0."))]


def _first_expert(target: str) -> str:
    """``experts.5.w1`` becomes ``experts.0.w1``: all experts are in one parameter."""
    return re.sub(r"(^|\.)\d+(?=\.[^.]+$)", r"\g<1>0", target)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _asked_of_peft(model: nn.Module, targets: Any, older: Mapping[str, str], config: Any) -> set[str]:
    """The older names that PEFT finds in targets; of a regular expression it keeps the last segments only."""
    if not isinstance(targets, str):
        return {old for old in older if any(_last(target) == old for target in targets)}
    parameters = [name for name, _, _ in _parameters(model)]
    real = [*(name for name, _, _, _ in named_places(model)), *parameters]
    former = [each for name in parameters for each in _called(name, older)[1::2]]
    matched = {_last(name) for name in [*real, *former]
               if is_target(name, targets, config.exclude_modules, config.modules_to_save)}  # fmt: skip
    return matched & older.keys()


def _peft_numbers(name: str, tensor: Tensor, config: Any, whole: bool) -> int:
    """What PEFT trains beside one parameter: A and B for each expert."""
    patterns = dict(config.rank_pattern)
    if whole:
        patterns[rf".*\.{FUSED}"] = 2 * config.r
    rank = next((rank for pattern, rank in patterns.items() if fits(pattern, name)), config.r)
    *experts, rows, columns = tensor.shape
    return (experts or [1])[0] * rank * (rows + columns)
