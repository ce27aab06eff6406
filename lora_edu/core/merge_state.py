"""What one weight has had merged into it, and the pair (weight, bias) as it was before. Lesson 09."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Pair = tuple[Tensor, Tensor | None]  # a weight and its bias


@dataclass
class MergeState:
    """What one weight has had merged into it, shared by all adapters that stand around that weight."""

    pair: Pair | None = None  # as registered before the first merge
    layers: list[Any] = field(default_factory=list)  # adapters, in the order of merging

    def pair_like(self, frozen: Any) -> Pair | None:
        """The kept pair, on the device and in the dtype of the registered weight; None while nothing is merged.

        A model that was moved or cast while merged took only its registered parameters along.
        """
        for parameter in self.pair or ():
            if parameter is not None:
                parameter.data = parameter.data.to(frozen.weight)
        return self.pair


def register_pair(frozen: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Put weight and bias into a layer. One that had no bias gets one, or loses it again."""
    frozen.weight = weight
    if bias is not None or getattr(frozen, "bias", None) is not None:
        frozen.bias = bias
