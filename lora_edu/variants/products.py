"""What LoHa and LoKr share: their settings, the scale, and two kinds of dropout. Cards in the book; lesson 17.

Both come from LyCORIS, where ΔW is another product of small matrices than LoRA's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, Pair, innermost
from lora_edu.core.config import AdapterConfig, check_patterns, first_match, warn_unused_patterns
from lora_edu.core.layer import check_alpha, check_rank

KINDS = (nn.Linear, Conv1D, nn.Embedding)


class ProductLayer(AdapterLayer):
    """A frozen layer plus an update made of small matrices: y = x Wᵀ + b + s · drop(x ΔWᵀ), with s = alpha / r.

    A subclass makes its parameters, calls ``start``, and gives ``delta_weight()``, which has the scale in it. One that
    need not form ΔW overrides ``product(x)`` too.

    Args:
        base: the layer to adapt, an ``nn.Linear``, ``Conv1D`` or ``nn.Embedding``; its weight and bias are frozen.
        r: the rank of the matrices that are products of two.
        alpha: the update is scaled by alpha / r.
        rank_dropout: probability of zeroing an output of the update, for all rows of a batch alike, in training. As in
            PEFT it drops rows of ΔW, in spite of its name.
        module_dropout: probability of leaving the whole update out of a forward pass, in training.

    Shapes:
        x: (..., in) → (..., out); of an embedding, (...) whole numbers → (..., dim).

    Raises:
        TypeError: if the base is of another kind, or its weight is packed by a quantisation library.
        ValueError: if r is not a whole number of at least 1, alpha no finite number, or a dropout not in [0, 1].
    """

    additive = True
    rank_dropout_scale: bool = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.applies_in_forward() or self.is_left_out():
            return y
        return (y + self.update(x)).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the output for x, in the adapter's precision."""
        y = self.product(x)
        return y * self.kept_outputs(y) if self.training and self.rank_dropout else y

    def product(self, x: Tensor) -> Tensor:
        """x ΔWᵀ, here by forming ΔW."""
        return super().update(x)

    def delta_weight(self) -> Tensor:
        """ΔW with its scale, shape (out, in), at least float32."""
        raise NotImplementedError

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        alpha: float = 8,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        **settings: Any,
    ):
        if not isinstance(pretrained := innermost(base), KINDS):
            raise TypeError(
                f"{type(self).__name__} adapts nn.Linear, Conv1D and nn.Embedding, not a {type(pretrained).__name__}"
            )
        super().__init__(base, **settings)
        self.in_features, self.out_features = self.features()
        self.r, self.alpha = check_rank(r), alpha
        check_alpha(alpha, "alpha")
        self.rank_dropout = check_probability("rank_dropout", rank_dropout)
        self.module_dropout = check_probability("module_dropout", module_dropout)
        self.keys: list[str] = []  # the names of its parameters, which are those in a file

    def start(self, at_zero: Sequence[str]) -> None:
        """Fresh values: the parameters called so stay zero, the others are uniform, as ``nn.Linear`` starts."""
        for key in self.keys:
            if key not in at_zero:
                nn.init.kaiming_uniform_(getattr(self, key), a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / self.r

    def is_left_out(self) -> bool:
        """Whether ``module_dropout`` leaves the update out of this forward pass."""
        return bool(self.training and self.module_dropout and torch.rand(1) <= self.module_dropout)

    def kept_outputs(self, y: Tensor) -> Tensor:
        """For each output 0 if ``rank_dropout`` drops it, else 1, or what makes up for those that are dropped."""
        kept = (torch.rand(y.shape[-1], device=y.device) > self.rank_dropout).to(y.dtype)
        # If none is kept, PEFT's LoHa divides by zero.
        return kept / kept.mean().clamp_min(1 / len(kept)) if self.rank_dropout_scale else kept

    def adapted(self, weight: Tensor, bias: Tensor | None) -> Pair:
        return weight + self.oriented(self.delta_weight()), bias

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [getattr(self, key) for key in self.keys]

    def to_file(self) -> dict[str, Tensor]:
        return {key: getattr(self, key) for key in self.keys}

    def reconfigure(self, config: Any, name: str) -> None:
        """Take over scale and dropout. Where no matrix is a product of two, r makes a difference to the scale alone."""
        self.r, self.alpha = config.rank_of(name), config.alpha_of(name)
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout

    def extra_repr(self) -> str:
        return f"adapter_name={self.adapter_name!r}, r={self.r}, alpha={self.alpha}, merged={self.merged}"


@dataclass
class ProductConfig(AdapterConfig):
    """Settings that LoHa and LoKr have in common. Names, defaults and meaning are PEFT's.

    Args:
        r: the rank of the small matrices, unless ``rank_pattern`` says otherwise.
        alpha: updates are scaled by alpha / r.
        rank_dropout, module_dropout: see ``ProductLayer``.
        use_effective_conv2d: for convolutions, which are not adapted here; in PEFT's files.
        rank_pattern, alpha_pattern: {regular expression for the end of a name: value}; the first that fits counts.

    Raises:
        ValueError: for a rank below 1 or not whole, an alpha that is not finite, a dropout outside [0, 1].
    """

    lacks: ClassVar[tuple[str, ...]] = ("bias", "fan_in_fan_out")

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.r = check_rank(self.r)
        check_alpha(self.alpha, "alpha")
        for name in ("rank_dropout", "module_dropout"):
            check_probability(name, getattr(self, name))
        check_patterns(self)
        super().__post_init__()

    def rank_of(self, name: str) -> int:
        """The rank for the module called ``name``."""
        return first_match(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """alpha for the module called ``name``."""
        return first_match(self.alpha_pattern, name, self.alpha)

    def warn_unused_patterns(self, names: Sequence[str]) -> None:
        warn_unused_patterns(self, names)

    def settings_of(self, name: str) -> dict[str, Any]:
        """What a ``ProductLayer`` called ``name`` is told."""
        return {
            "r": self.rank_of(name),
            "alpha": self.alpha_of(name),
            "rank_dropout": self.rank_dropout,
            "module_dropout": self.module_dropout,
        }


def check_probability(name: str, value: float) -> float:
    """Return the value if it is a probability; raise ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected a probability between 0 and 1, for example 0.1")
    return value
