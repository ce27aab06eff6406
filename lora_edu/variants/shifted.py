"""Starts away from zero that leave the base as it came: y = W x + s · (B A − B₀ A₀) x. Lesson 16.

PiSSA, OLoRA and LoRA-GA begin training with a product s · B₀ A₀ that is not zero. Their papers, and PEFT, take it out
of the frozen weight, so that the sum is the pretrained weight again. Here the weight is never changed; the start is
subtracted beside it, in the same pair of products: W x + s · [B, −B₀] [A; A₀] x. So disabling is exact, several such
adapters and plain ones can be in one model, and a file is what PEFT's own conversion writes: a plain LoRA of rank 2r
for the pretrained base. With dropout, A and A₀ read the same dropped x, so that at the start nothing is lost; in PEFT
only A does, and what it drops is missing.

A method of this kind is a function ``start(W, r, s) -> (A₀, B₀)`` and one registration::

    def halves(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
        ...  # W is (out, in) for every kind of layer, at least float32; A₀ is (r, in), B₀ is (out, r)

    register(
        "Halves", LoraConfig, shifted_builders(lambda name, config, context: halves),
        applies=lambda config: config.init_lora_weights == "halves" and not config.use_dora, file_fields=as_plain_lora,
    )

The function that makes the start knows the module's name, the config and ``context.shared``, where what ``prepare``
learned from data is; one for each kind of layer is built by ``shifted_builder``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.config import LoraConfig
from lora_edu.core.layer import Factors, LoRAConv1D, LoRAEmbedding, LoRALinear
from lora_edu.core.methods import Build, InjectionContext
from lora_edu.variants.qlora import QLoRALinear

Start = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
StartOf = Callable[[str, LoraConfig, InjectionContext], Start]


class ShiftedLinear(LoRALinear):
    """LoRA that starts at factors A₀ and B₀ of the caller's choice, and at the base: y = W x + b + s · (B A − B₀ A₀) x.

    Only A and B train; A₀ and B₀ are buffers of their sizes.

    Args:
        base: the layer to adapt; its weight (out, in) and bias are frozen, and never changed.
        start: from the pretrained weight as (out, in), at least float32, r and s to A₀ and B₀.
        settings: r, lora_alpha, lora_dropout and use_rslora, as for ``LoRALinear``.

    Shapes:
        x: (..., in) → (..., out). ``lora_A``, ``start_A``: (r, in). ``lora_B``, ``start_B``: (out, r).

    Raises:
        ValueError: if r is above min(in, out), lora_alpha is not above zero, the start is not finite, or the
            weight is on the meta device.

    Source: Meng et al. 2024 (PiSSA), section 3; the subtraction beside W is PEFT's conversion to LoRA. Built in
    lesson 16.
    """

    start_A: Tensor
    start_B: Tensor

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the output for x: s · (dropout(x) [A; A₀]ᵀ) [B, −B₀]ᵀ."""
        # x (..., in) → h (..., 2r) → update (..., out): two products, as in plain LoRA of twice the rank.
        A, B = self.both()
        return F.linear(F.linear(self.dropout(x.to(A.dtype)), A), B) * self.scaling

    def both(self) -> tuple[Tensor, Tensor]:
        """[A; A₀], (2r, in), and [B, −B₀], (out, 2r): the factors of the plain LoRA that this layer amounts to."""
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def delta_weight(self) -> Tensor:
        """ΔW = s · (B A − B₀ A₀), shape (out, in), at least float32."""
        A, B = self.both()
        return self.scaling * (at_least_float32(B) @ at_least_float32(A))

    def __init__(self, base: nn.Module, start: Start, **settings: Any):
        super().__init__(base, **settings)
        most = min(self.in_features, self.out_features)
        if self.r > most:
            raise ValueError(
                f"r={self.r}: this layer of {self.in_features} inputs and {self.out_features} outputs has only {most} "
                "directions to start from; lower r, or give this layer its own in rank_pattern"
            )
        check_scale(self)
        if self.weight.is_meta:
            raise ValueError(
                "the pretrained weight is on the meta device, where there is nothing to start from: load it"
            )
        with torch.no_grad():
            A, B = start(at_least_float32(self.oriented(self.weight)), self.r, self.scaling)
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        if not (self.lora_A.isfinite().all() and self.lora_B.isfinite().all()):
            raise ValueError("the start holds NaN or infinite numbers; look for them in the pretrained weight")
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())

    def factors(self) -> Factors:
        return *self.both(), *super().factors()[2:]

    def to_file(self) -> dict[str, Tensor]:
        return dict(zip(super().to_file(), self.both(), strict=True))


class ShiftedConv1D(ShiftedLinear, LoRAConv1D):
    """The same for GPT-2's ``Conv1D``, whose weight is stored as (in, out). Built in lesson 16."""


class ShiftedQLoRA(ShiftedLinear, QLoRALinear):
    """The same around a layer that stores four bits: it starts from, and at, the numbers that these stand for."""


class ShiftedEmbedding(ShiftedLinear, LoRAEmbedding):
    """The same for ``nn.Embedding``: row x of the table becomes W[x] + s · (B A − B₀ A₀)[:, x]. No dropout.

    Shapes:
        x: (...) whole numbers → (..., dim). ``lora_A``: (r, rows). ``lora_B``: (dim, r).

    Built in lesson 16.
    """

    factors = None  # type: ignore[assignment]  # rows are looked up, not multiplied

    def update(self, x: Tensor) -> Tensor:
        table, B = self.frozen, self.both()[1]
        # Looked up in each table, for to concatenate them would copy all their rows.
        h = [
            F.embedding(x, A.T, table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq)
            for A in (self.lora_A, self.start_A)
        ]
        return F.linear(torch.cat(h, dim=-1), B) * self.scaling * getattr(table, "embed_scale", 1)


def shifted_builders(start_of: StartOf) -> dict[type[nn.Module], Build]:
    """What ``register`` asks for: builders for every kind of layer that can start away from zero.

    Args:
        start_of: from the module's name, the config and what the injection shares to the start of this layer.
    """
    layers = (ShiftedQLoRA, ShiftedLinear, ShiftedConv1D, ShiftedEmbedding)  # four bits first: they are linear too
    return {layer.kind: shifted_builder(layer, start_of) for layer in layers}


def shifted_builder(layer_class: type[ShiftedLinear], start_of: StartOf) -> Build:
    """A builder of shifted layers of one class."""

    def build(base: nn.Module, name: str, config: LoraConfig, context: InjectionContext) -> AdapterLayer:
        return layer_class(base, start_of(name, config, context), **config.settings_of(name), **context.settings)

    return build


def check_scale(layer: LoRALinear) -> None:
    """Raise unless the scale is above zero, so that the start can be divided by it."""
    if layer.scaling <= 0:
        raise ValueError(
            f"lora_alpha={layer.lora_alpha}: a start away from zero needs a scale above zero, for example {layer.r}"
        )


def as_plain_lora(fields: dict[str, Any]) -> dict[str, Any]:
    """A shifted config's fields as those of the plain LoRA in its file: twice the rank, at the same scale.

    As PEFT converts them; with rsLoRA, s = lora_alpha / √r needs √2 times lora_alpha, and so do the patterns of alpha
    (there PEFT refuses).
    """
    alpha = math.sqrt(2) if fields["use_rslora"] else 2
    return fields | {
        "init_lora_weights": True,
        "r": 2 * fields["r"],
        "lora_alpha": alpha * fields["lora_alpha"],
        "rank_pattern": {name: 2 * r for name, r in fields["rank_pattern"].items()},
        "alpha_pattern": {name: alpha * a for name, a in fields["alpha_pattern"].items()},
    }
