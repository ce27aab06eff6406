"""What to adapt and how: what every method's config can do, and ``LoraConfig``, field for field as PEFT's. Lesson 04.

``AdapterConfig`` is what a method's own config derives from. LoRA's stands below it, as the example of one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer, innermost
from lora_edu.core.layer import LoRAConv1D, LoRAEmbedding, LoRALinear, check_alpha, check_dropout, check_rank
from lora_edu.core.matching import check_regex, check_targets, expand_targets, fits
from lora_edu.core.methods import Build, InjectionContext, method_of, register
from lora_edu.core.parts import Part, biases_to_train, copies_to_train
from lora_edu.core.vocabulary import tie_copies, tied_embeddings

# Fields of PEFT's files that describe a run, a machine or a start, and change no number of a trained adapter.
NEUTRAL_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "peft_type",
    "fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip


@dataclass(kw_only=True)
class AdapterConfig:
    """What every method's config has and can do: the fields that injection reads, each with a neutral default.

    A subclass is a dataclass with further fields, all of which go into its file. It may override the methods below,
    and may define:

    - ``prepare(model, batches) -> dict``: for a start that needs data. ``inject(..., batches=...)`` calls it before
      anything is built, with other adapters switched off, and puts what it returns into ``context.shared``. It may
      set fields of ``self``, such as ranks, and leaves the model as it found it.
    - ``extra_loss()``, ``after_backward(step)``, ``after_step(step)``: called by the training loop while the adapter
      is active, as on its layers. ``after_step`` comes after the optimizer's step and before gradients are cleared.

    ``inject`` works on a copy, which stays with the model and knows its ``targets`` (before ``prepare`` and ``build``)
    and ``layers`` (afterwards).

    Attributes:
        peft_type: the method's name in PEFT's files.
        replaces_layers: False for a method that brings parts only, such as a prefix: it needs no targets.
        lacks: fields that the method does not have in PEFT: those of this class keep their defaults, and they (and
            ``fan_in_fan_out``, which others have) are in no file.
        targets: the pretrained layers that are adapted, by name.
        layers: the layers that stand around them, by name.
    """

    peft_type: ClassVar[str]
    replaces_layers: ClassVar[bool] = True
    lacks: ClassVar[tuple[str, ...]] = ()

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    bias: str = "none"
    task_type: str | None = None
    targets: dict[str, nn.Module] = field(default_factory=dict, init=False, repr=False, compare=False)
    layers: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_targets(self)
        for each in dataclasses.fields(self):
            if each.name in self.lacks and getattr(self, each.name) != each.default:
                raise ValueError(f"{each.name}={getattr(self, each.name)!r}: {type(self).__name__} has no such setting")

    def default_targets(self, model: nn.Module, modules: dict[str, nn.Module]) -> Sequence[str]:
        """What ``target_modules=None`` means for this model: by default PEFT's table for LoRA."""
        return expand_targets(None, model, modules)

    def complete(self, model: nn.Module) -> None:
        """Fill in what fields of the method's own mean for this model where they are None. Called before all else."""

    def build(self, base_layer: nn.Module, name: str, context: InjectionContext) -> AdapterLayer:
        """The adapted layer for the module called ``name``.

        Raises:
            ValueError: if no registered method serves this config, or none adapts this kind of layer.
        """
        return self.builder(innermost(base_layer), name)(base_layer, name, self, context)

    def builder(self, pretrained: nn.Module, name: str) -> Build:
        """What builds the layer for this kind of pretrained layer; errors as in ``build``."""
        method = method_of(self)
        for kind, builder in method.builders.items():
            if isinstance(pretrained, kind):
                return builder
        raise ValueError(
            f"module {name!r} is a {type(pretrained).__name__}, which {method.name} cannot adapt (it adapts "
            f"{', '.join(kind.__name__ for kind in method.builders)}); narrow target_modules or use exclude_modules"
        )

    def parts(self, model: nn.Module, names: Sequence[str], context: InjectionContext) -> list[Part]:
        """What the adapter brings beside its layers: copies of ``modules_to_save``, trained biases.

        Args:
            names: the modules that its layers replace.
        """
        copies = copies_to_train(model, self.modules_to_save, context.adapter_name)
        return [*copies, *biases_to_train(model, self.bias, names, copies)]

    def to_file(self) -> dict[str, Any]:
        """The fields of ``adapter_config.json``, besides those that every file has. By default all that it has."""
        names = [each.name for each in dataclasses.fields(self) if each.init and each.name not in self.lacks]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_file(cls, fields: Mapping[str, Any]) -> Any:
        """The config that a file describes; what it holds and we lack must be neutral or unset.

        Raises:
            ValueError: if a field changes numbers and is not supported.
        """
        own = {each.name for each in dataclasses.fields(cls) if each.init}
        if unsupported := {key: value for key, value in fields.items() if value and key not in own | NEUTRAL_FIELDS}:
            raise ValueError(f"lora_edu does not support {unsupported}, and these settings change the numbers")
        return cls(**{key: value for key, value in fields.items() if key in own and value is not None})

    def shared_to_file(self, context: InjectionContext) -> dict[str, Tensor]:
        """Tensors that the method stores once for the whole model, under their full keys in the file.

        They are those of ``context.shared`` themselves: ``hotswap_adapter`` writes into them.
        """
        return {}

    def shared_from_file(self, tensors: Mapping[str, Tensor], context: InjectionContext) -> None:
        """Put what the file holds of them into ``context.shared``. Called before the layers are built.

        Raises:
            KeyError: if the file lacks one.
        """

    def warn_unused_patterns(self, names: Sequence[str]) -> None:
        """Warn about patterns among the fields that no adapted module fits: most often a typing error."""


# Initialisations that leave the base's weights alone: once the adapter's tensors are loaded, they make no difference.
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
STARTS_WITH_SETTINGS = ("loftq", "eva", "lora_ga")  # those of loftq_config, eva_config and lora_ga_config


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
        use_dora: train the length of each row of a weight by itself, and its direction by LoRA (lesson 17).
        init_lora_weights: True, False or ``"gaussian"``; of lesson 16 ``"pissa"``, ``"pissa_niter_4"`` (with any number
            of iterations), ``"olora"`` and ``"loftq"``; and ``"eva"`` and ``"lora_ga"``, which start from data:
            ``inject(..., batches=[...])``.
        loftq_config: for ``"loftq"``: {"loftq_bits": 4, "loftq_iter": how often it alternates}.
        eva_config, lora_ga_config: for ``"eva"`` an ``EvaConfig``, for ``"lora_ga"`` a ``LoraGAConfig``; None means
            their defaults.
        modules_to_save: name endings of modules of which the adapter trains and saves a full copy.
        ensure_weight_tying: where head and embedding share a weight and one of them is in ``modules_to_save``, train
            one copy for both. Without it each has its own. For LoRA on such a layer it is refused.
        rank_pattern, alpha_pattern: {regular expression for the end of a name: value}; the first that fits counts.
        layers_to_transform: adapt only layers with these indices.
        layers_pattern: the name before the index, where a model has several numbered lists.
        task_type: passed on to PEFT's file. With ``"SEQ_CLS"``, ``"TOKEN_CLS"`` or ``"QUESTION_ANS"`` the model's new
            head joins ``modules_to_save``; the first also keeps it out of ``"all-linear"``.

    Raises:
        ValueError: for a rank below 1 or not whole, a dropout outside [0, 1], an unknown word for ``bias``.
        TypeError: for target_modules, a pattern or loftq_config of another type.
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, int] = field(default_factory=dict)
    eva_config: Any = None
    lora_ga_config: Any = None
    ensure_weight_tying: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.r = check_rank(self.r)
        check_dropout(self.lora_dropout)
        check_alpha(self.lora_alpha)
        check_patterns(self)
        if not isinstance(self.loftq_config, Mapping):
            raise TypeError(f"loftq_config={self.loftq_config!r}: expected a dictionary such as {{'loftq_iter': 5}}")
        for start in STARTS_WITH_SETTINGS:
            if getattr(self, f"{start}_config") and self.init_lora_weights != start:
                ignored = f"{start}_config is ignored with init_lora_weights={self.init_lora_weights!r}"
                warnings.warn(ignored, stacklevel=4)
                setattr(self, f"{start}_config", {} if start == "loftq" else None)
        super().__post_init__()

    def rank_of(self, name: str) -> int:
        """The rank for the module called ``name``."""
        return first_match(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """lora_alpha for the module called ``name``."""
        return first_match(self.alpha_pattern, name, self.lora_alpha)

    def settings_of(self, name: str) -> dict[str, Any]:
        """What the layer for the module called ``name`` is built with, whatever its start."""
        return {
            "r": self.rank_of(name),
            "lora_alpha": self.alpha_of(name),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
        }

    def to_file(self) -> dict[str, Any]:
        unset = {f"{start}_config" for start in STARTS_WITH_SETTINGS if not getattr(self, f"{start}_config")}
        return {name: value for name, value in super().to_file().items() if name not in unset}

    @classmethod
    def from_file(cls, fields: Mapping[str, Any]) -> Any:
        if fields.get("init_lora_weights", True) in INITS_THAT_KEEP_THE_BASE:
            fields = {**fields, "init_lora_weights": True}
            fields |= {f"{start}_config": None for start in STARTS_WITH_SETTINGS}
        return super().from_file(fields)

    def parts(self, model: nn.Module, names: Sequence[str], context: InjectionContext) -> list[Part]:
        tied = tied_embeddings(model) if self.ensure_weight_tying else []
        if any(name in names for name in tied):
            raise ValueError(
                f"ensure_weight_tying=True: {' and '.join(tied)} share a weight, and one LoRA for both is not "
                "supported here; put them into modules_to_save, or train each on its own without this setting"
            )
        saved = list(self.modules_to_save or ())
        if not any(name.endswith(end) for name in tied for end in saved):
            return super().parts(model, names, context)
        both = dataclasses.replace(self, modules_to_save=[*saved, *tied])
        return tie_copies(AdapterConfig.parts(both, model, names, context), tied)

    def warn_unused_patterns(self, names: Sequence[str]) -> None:
        warn_unused_patterns(self, names)


def check_patterns(config: Any) -> None:
    """Raise unless ``rank_pattern`` and ``alpha_pattern`` are dictionaries of values for patterns; keep copies."""
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(patterns := getattr(config, name) or {}, Mapping):
            raise TypeError(f"{name}={patterns!r}: expected a dictionary {{part of a name: value}}")
        setattr(config, name, dict(patterns))
        for pattern in patterns:
            check_regex(name, pattern)
    config.rank_pattern = {pattern: check_rank(rank) for pattern, rank in config.rank_pattern.items()}
    for alpha in config.alpha_pattern.values():
        check_alpha(alpha)


def warn_unused_patterns(config: Any, names: Sequence[str]) -> None:
    """Warn about patterns in ``rank_pattern`` and ``alpha_pattern`` that fit none of these modules."""
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name):
            if not any(fits(pattern, name) for name in names):
                warnings.warn(f"{field_name}: {pattern!r} fits none of the adapted modules", stacklevel=5)


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that fits ``name``."""
    return next((value for pattern, value in patterns.items() if fits(pattern, name)), default)


def lora_builder(layer_class: type[LoRALinear]) -> Build:
    """A builder of plain LoRA layers of one class."""

    def build(base: nn.Module, name: str, config: LoraConfig, context: InjectionContext) -> AdapterLayer:
        start = config.init_lora_weights
        return layer_class(base, **config.settings_of(name), init_lora_weights=start, **context.settings)

    return build


register(
    "LoRA",
    LoraConfig,
    {layer.kind: lora_builder(layer) for layer in (LoRALinear, LoRAConv1D, LoRAEmbedding)},
    applies=lambda config: not config.use_dora and config.init_lora_weights in (True, False, "gaussian"),
)
