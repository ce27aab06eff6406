"""The layers that ``inject(..., fast=True)`` puts in: LoRALinear's numbers by ``fast.lora_linear``. Built in lesson 21.

They differ from the plain layers in ``forward`` only. Whatever ``lora_linear`` does not cover (a merged adapter, one
around another, a base layer with hooks or a forward of its own) they leave to the plain forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.config import Build, InjectionContext, LoraConfig, lora_builder, register
from lora_edu.core.layer import LoRAConv1D, LoRALinear
from lora_edu.fast.function import Layer, lora_linears

# Siblings that models call one after another with the same input.
SIBLING_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FastLoRALinear(LoRALinear):
    """``LoRALinear`` with a faster forward and backward pass; everything else is inherited. Built in lesson 21."""

    siblings: Siblings | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_covered():
            return super().forward(x)
        if self.siblings is not None and self.lora_A.requires_grad and torch.is_grad_enabled():  # it trains
            return self.siblings.output(self, x)
        return lora_linears(x, [self.tensors()], [self.scaling], [self.dropout_p()])[0]

    def is_covered(self) -> bool:
        """Whether ``lora_linear`` computes what the plain forward would."""
        base: Any = self.base
        as_it_came = type(base).forward is self.kind.forward and not any(getattr(base, hooks) for hooks in HOOKS)
        return self.active and not self.merged and as_it_came

    def tensors(self) -> Layer:
        """Weight (out, in), bias, A and B."""
        return self.weight, self.bias, self.lora_A, self.lora_B

    def dropout_p(self) -> float:
        """The probability of dropping an entry now: none in eval mode."""
        return self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0


class FastLoRAConv1D(FastLoRALinear, LoRAConv1D):
    """``LoRAConv1D`` with a faster forward and backward pass: GPT-2's weight is (in, out) and read transposed."""

    kind = Conv1D

    def tensors(self) -> Layer:
        return self.weight.T, self.bias, self.lora_A, self.lora_B


@dataclass
class Pending:
    """What one input gave: the outputs that have not been asked for yet."""

    x: Tensor
    stamp: tuple[int, ...]
    outputs: dict[nn.Module, Tensor]


@dataclass
class Siblings:
    """Layers that read the same input. The first one asked computes for all of them; the others collect.

    An output is handed out only for the very tensor it was computed from, and only if neither that tensor nor an
    adapter has changed in between. Layers that turn out to read different inputs stop working together.
    """

    members: list[FastLoRALinear] = field(default_factory=list)
    pending: Pending | None = None
    uncollected: int = 0  # inputs in a row of which somebody did not collect

    def output(self, layer: FastLoRALinear, x: Tensor) -> Tensor:
        """The layer's output for x."""
        if self.pending is not None and self.pending.x is x and self.pending.stamp == self.stamp(x):
            outputs = self.pending.outputs
            if layer in outputs:
                found = outputs.pop(layer)
                if not outputs:
                    self.pending, self.uncollected = None, 0
                return found
        elif self.pending is not None:
            self.pending, self.uncollected = None, self.uncollected + 1
        group = [layer]
        if self.uncollected < 3:
            group += [member for member in self.members if member is not layer and alike(member, layer)]
        tensors = [member.tensors() for member in group]
        scalings, dropouts = [m.scaling for m in group], [m.dropout_p() for m in group]
        own, *rest = lora_linears(x, tensors, scalings, dropouts)
        if rest:
            self.pending = Pending(x, self.stamp(x), dict(zip(group[1:], rest, strict=True)))
        return own

    def stamp(self, x: Tensor) -> tuple[int, ...]:
        """Changes with every write into x or into an adapter. Traced code has no such counts: it is one pass."""
        if torch.compiler.is_compiling():
            return ()
        adapters = (tensor for member in self.members for tensor in (member.lora_A, member.lora_B))
        return x._version, *(tensor._version for tensor in adapters)


def alike(one: FastLoRALinear, other: FastLoRALinear) -> bool:
    """Whether the two can be computed together."""
    a, b = one.weight, other.weight
    return one.is_covered() and (a.device, a.dtype, one.in_features) == (b.device, b.dtype, other.in_features)


def fast_builder(layer_class: type[FastLoRALinear]) -> Build:
    """A builder of fast layers of one class; siblings of one parent get to know each other."""
    plain = lora_builder(layer_class)

    def build(base: nn.Module, name: str, config: LoraConfig, context: InjectionContext) -> AdapterLayer:
        layer = plain(base, name, config, context)
        assert isinstance(layer, FastLoRALinear)
        parent, _, leaf = name.rpartition(".")
        for names in SIBLING_NAMES:
            if leaf in names:
                layer.siblings = context.shared.setdefault(f"{parent}: {', '.join(names)}", Siblings())
                layer.siblings.members.append(layer)
        return layer

    return build


register(
    "fast LoRA",
    LoraConfig,
    {layer.kind: fast_builder(layer) for layer in (FastLoRALinear, FastLoRAConv1D)},
    applies=lambda config: not config.use_dora and config.init_lora_weights in (True, False, "gaussian"),
    fast=True,
)
