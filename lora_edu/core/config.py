"""``LoraConfig``: what to adapt and how, field for field as in PEFT. Built in lesson 04.

No code here or in ``inject`` knows a method by name. A method registers its layers for a type of config (and, if it
is switched on by a field, for a predicate on it); ``config.build`` looks them up.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from lora_edu.core.adapter import AdapterLayer, innermost
from lora_edu.core.layer import LoRAConv1D, LoRAEmbedding, LoRALinear, check_alpha, check_dropout, check_rank
from lora_edu.core.matching import check_regex, fits

BIASES = ("none", "all", "lora_only")


@dataclass
class InjectionContext:
    """What the layers of one injection share: name, precision, speed, and room for a method's common tensors."""

    adapter_name: str = "default"
    autocast_adapter_dtype: bool = True
    fast: bool = False
    shared: dict[str, Any] = field(default_factory=dict)


Build = Callable[[nn.Module, str, Any, InjectionContext], AdapterLayer]


@dataclass(frozen=True)
class Method:
    """One way to adapt: for which configs, and how to build its layer for each kind of base layer."""

    name: str
    config_type: type[AdapterConfig]
    applies: Callable[[Any], bool]
    builders: Mapping[type[nn.Module], Build]
    fast: bool  # only for injections that ask for it; kinds of layers without a fast form get the plain one


_METHODS: list[Method] = []


def registered_methods() -> list[Method]:
    """All methods, the latest registration first. The package's own register when this is first called."""
    importlib.import_module("lora_edu").register_methods()
    return _METHODS


def register(
    name: str,
    config_type: type[AdapterConfig],
    builders: Mapping[type[nn.Module], Build],
    applies: Callable[[Any], bool] = lambda config: True,
    fast: bool = False,
) -> None:
    """Make a method known. Later registrations are asked first, so that a special case precedes the general one.

    Args:
        name: for messages, for example ``"DoRA"``.
        config_type: the config class that asks for this method.
        builders: kind of base layer → function (base, module name, config, context) → AdapterLayer.
        applies: a further condition on the config, for example ``lambda config: config.use_dora``.
        fast: the method is a faster form of another, used by ``inject(..., fast=True)`` alone.
    """
    _METHODS.insert(0, Method(name, config_type, applies, builders, fast))


class AdapterConfig:
    """What every method's config can do: build the layer that stands around one base layer."""

    peft_type: ClassVar[str]  # the method's name in PEFT's files
    target_modules: str | Sequence[str] | None

    def build(self, base_layer: nn.Module, name: str, context: InjectionContext) -> AdapterLayer:
        """The adapted layer for the module called ``name``.

        Raises:
            ValueError: if no registered method serves this config, or none adapts this kind of layer.
        """
        pretrained = innermost(base_layer)
        methods = [
            method
            for method in registered_methods()
            if type(self) is method.config_type and method.applies(self) and (context.fast or not method.fast)
        ]
        if not methods:
            raise ValueError(f"no method of lora_edu serves {self!r}; known: {[m.name for m in registered_methods()]}")
        # The first serves; a fast one leaves the kinds of layers that it does not know to the next.
        for method in methods:
            for kind, builder in method.builders.items():
                if isinstance(pretrained, kind):
                    return builder(base_layer, name, self, context)
            if not method.fast:
                break
        raise ValueError(
            f"module {name!r} is a {type(pretrained).__name__}, which {method.name} cannot adapt (it adapts "
            f"{', '.join(kind.__name__ for kind in method.builders)}); narrow target_modules or use exclude_modules"
        )


@dataclass
class LoraConfig(AdapterConfig):
    """Settings of LoRA. Names, defaults and meaning are PEFT's.

    Args:
        r: rank of every update, unless ``rank_pattern`` says otherwise.
        lora_alpha: updates are scaled by lora_alpha / r.
        target_modules: list of name endings, or a regular expression for whole names, or ``"all-linear"`` (every
            linear layer but the output head), or None (the family's default, for example q_proj and v_proj).
        exclude_modules: list of name endings or a regular expression; these are never adapted.
        lora_dropout: probability of dropping an input entry on its way into A, in training.
        bias: which biases train: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        use_rslora: scale by lora_alpha / √r.
        use_dora: weight-decomposed LoRA (lesson 12).
        init_lora_weights: True, False, ``"gaussian"``; ``"pissa"`` and others arrive with lesson 12.
        modules_to_save: name endings of modules of which the adapter trains and saves a full copy.
        rank_pattern, alpha_pattern: {regular expression for the end of a name: value}; the first that fits counts.
        layers_to_transform: adapt only layers with these indices.
        layers_pattern: the name before the index, where a model has several numbered lists.
        task_type: passed on to PEFT's file. With ``"SEQ_CLS"``, ``"TOKEN_CLS"`` or ``"QUESTION_ANS"`` the model's new
            head joins ``modules_to_save``; the first also keeps it out of ``"all-linear"``.

    Raises:
        ValueError: for a rank below 1 or not whole, a dropout outside [0, 1], an unknown word for ``bias``.
        TypeError: for target_modules of another type.
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: Sequence[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        self.r = check_rank(self.r)
        check_dropout(self.lora_dropout)
        check_alpha(self.lora_alpha)
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(patterns := getattr(self, name) or {}, Mapping):
                raise TypeError(f"{name}={patterns!r}: expected a dictionary {{part of a name: value}}")
            setattr(self, name, dict(patterns))
            for pattern in patterns:
                check_regex(name, pattern)
        self.rank_pattern = {pattern: check_rank(rank) for pattern, rank in self.rank_pattern.items()}
        for alpha in self.alpha_pattern.values():
            check_alpha(alpha)
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r}: expected one of {', '.join(map(repr, BIASES))}")
        targets = self.target_modules
        if targets is not None and not isinstance(targets, str):
            if not isinstance(targets, Iterable) or not all(isinstance(target, str) for target in targets):
                raise TypeError(f"target_modules={targets!r}: expected a list of names, a regular expression or None")
            self.target_modules = sorted(targets) if isinstance(targets, set | frozenset) else list(targets)
            if not self.target_modules:
                raise ValueError("target_modules is empty: name at least one layer, for example ['q_proj', 'v_proj']")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                check_regex(name, pattern)
        if isinstance(targets, str) and (self.layers_to_transform is not None or self.layers_pattern is not None):
            raise ValueError(
                f"layers_to_transform and layers_pattern narrow a list of names, but target_modules={targets!r} is a "
                "string: name the layers in a list, or write their numbers into the regular expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform: which numbers?")
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if isinstance(value := getattr(self, name), set | frozenset | range):
                setattr(self, name, sorted(value) if isinstance(value, set | frozenset) else list(value))
        if isinstance(self.modules_to_save, set | frozenset | tuple):
            self.modules_to_save = sorted(self.modules_to_save)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save={self.modules_to_save!r}: expected a list, [{self.modules_to_save!r}]")

    def rank_of(self, name: str) -> int:
        """The rank for the module called ``name``."""
        return first_match(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """lora_alpha for the module called ``name``."""
        return first_match(self.alpha_pattern, name, self.lora_alpha)

    def warn_unused_patterns(self, names: Sequence[str]) -> None:
        """Warn about patterns that no adapted module fits: most often a typing error."""
        for field_name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field_name):
                if not any(fits(pattern, name) for name in names):
                    warnings.warn(f"{field_name}: {pattern!r} fits none of the adapted modules", stacklevel=4)


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that fits ``name``."""
    return next((value for pattern, value in patterns.items() if fits(pattern, name)), default)


def lora_builder(layer_class: type[LoRALinear]) -> Build:
    """A builder of plain LoRA layers of one class."""

    def build(base: nn.Module, name: str, config: LoraConfig, context: InjectionContext) -> AdapterLayer:
        return layer_class(
            base,
            r=config.rank_of(name),
            lora_alpha=config.alpha_of(name),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights,
            adapter_name=context.adapter_name,
            autocast_adapter_dtype=context.autocast_adapter_dtype,
        )

    return build


register(
    "LoRA",
    LoraConfig,
    {layer.kind: lora_builder(layer) for layer in (LoRALinear, LoRAConv1D, LoRAEmbedding)},
    applies=lambda config: not config.use_dora and config.init_lora_weights in (True, False, "gaussian"),
)
