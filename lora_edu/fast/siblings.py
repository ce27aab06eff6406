"""Fast layers that read the same input, such as q, k and v, compute together. Built in lesson 24.

A model calls its layers one after another. The first of a group that is asked computes the outputs of all, in one node
for autograd: x is read once, and its gradient is summed in place. The others collect what is waiting for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Names of layers that models call one after another with the same input: Llama, BERT, T5.
SIBLING_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"))
PATIENCE = 3  # inputs in a row of which somebody did not collect


@dataclass
class Pending:
    """What one input gave: the outputs that have not been asked for yet."""

    x: Tensor
    stamp: tuple[int, ...]
    outputs: dict[nn.Module, Tensor]


@dataclass
class Siblings:
    """Layers that read the same input.

    An output is handed out only for the very tensor it was computed from, and only if neither that tensor nor a weight
    of the group has changed in between. Layers that turn out to read different inputs stop working together.
    """

    compute: Callable[[Tensor, list[Any]], tuple[Tensor, ...]]
    members: list[Any] = field(default_factory=list)
    pending: Pending | None = None
    uncollected: int = 0

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """The layer's output for x."""
        stamp = self.stamp(x)
        if self.pending is not None and self.pending.x is x and self.pending.stamp == stamp:
            outputs = self.pending.outputs
            if layer in outputs:
                found = outputs.pop(layer)
                if not outputs:
                    self.pending, self.uncollected = None, 0
                return found
        elif self.pending is not None:
            self.pending, self.uncollected = None, self.uncollected + 1
        group = [layer]
        if self.uncollected < PATIENCE:
            group += [member for member in self.members if member is not layer and alike(member, layer)]
        own, *rest = self.compute(x, group)
        if rest:
            self.pending = Pending(x, stamp, dict(zip(group[1:], rest, strict=True)))
        return own

    def stamp(self, x: Tensor) -> tuple[int, ...]:
        """Changes with every write into x or into a weight. Traced code has no such counts: it is one pass."""
        if torch.compiler.is_compiling():
            return ()
        weights = (parameter for member in self.members for parameter in member.parameters())
        return x._version, *(weight._version for weight in weights)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what waits belongs to a forward pass of this model, not of another."""
        return self.__dict__ | {"pending": None}


def alike(one: Any, other: Any) -> bool:
    """Whether the two can be computed together."""
    a, b = one.oriented(one.weight), other.oriented(other.weight)  # (out, in)
    return one.is_covered() and (a.device, a.dtype, a.shape[1]) == (b.device, b.dtype, b.shape[1])


def introduce(layers: Mapping[str, Any], compute: Callable[[Tensor, list[Any]], tuple[Tensor, ...]]) -> None:
    """Make siblings of the layers that one parent calls with one input, by their names."""
    groups: dict[tuple[str, tuple[str, ...]], Siblings] = {}
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        for names in SIBLING_NAMES:
            if leaf in names:
                layer.siblings = groups.setdefault((parent, names), Siblings(compute))
                layer.siblings.members.append(layer)
