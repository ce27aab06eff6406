"""DoRA: each row of the weight has a length that trains by itself, and LoRA turns the row. Built in lesson 17.

Idea: A row of the weight, what makes one output, is a length times a direction. The paper finds that full fine-tuning
changes one without the other, and LoRA mostly both at once. Here the lengths train by themselves, and B A only turns.
Formula: W' = m ⊙ (W + s · B A) / ‖W + s · B A‖, with a norm and a number m for each output; m starts as the norms of W
Cost: LoRA's numbers and one more for each output. Every forward pass needs the norms of W + s · B A, multiplies each
output by its number, and keeps one more tensor of the output's size for the backward pass.
Merging: exact up to one rounding. What it does depends on the weight it finds, so it is no sum: two cannot be merged
into one weight, and the rows of a batch cannot each have their own.
Papers: [Liu et al. 2024](https://arxiv.org/abs/2402.09353) report better results than LoRA's on questions that need
common sense, on images and on video. [Lee et al. 2026](https://arxiv.org/abs/2602.04998) tune the learning rate of
each method anew, DoRA among them, and find the best results within one or two percent of each other.

``LoraConfig(use_dora=True)`` asks for it. The paper writes its weights as (in, out) and speaks of columns: they are the
rows of PyTorch's (out, in). ``inject(..., fast=True)`` gives the same numbers in less time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_edu.core.adapter import AdapterLayer, Pair, at_least_float32
from lora_edu.core.config import LoraConfig, lora_builder
from lora_edu.core.entrants import register_entrant
from lora_edu.core.layer import LoRAConv1D, LoRAEmbedding, LoRALinear, is_plain_product
from lora_edu.core.lora_entrants import RATES
from lora_edu.core.methods import register, register_fast_form
from lora_edu.variants.qlora import OverFourBits

STARTS = (True, False, "gaussian")


class DoRALinear(LoRALinear):
    """A frozen linear layer whose rows get a trained length, and a direction by LoRA: y = g ⊙ (W + ΔW) x + b.

    g = m / ‖W + ΔW‖, one number for each output. The norms are taken anew in each forward pass and count as constants
    in the backward pass, as the paper's section 4.3 proposes. With dropout, W x itself stays whole, as in PEFT, and
    what DoRA changes meets the dropped x̃: y = W x + b + (g - 1) ⊙ W x̃ + g ⊙ ΔW x̃.

    Args:
        base, r, lora_alpha, lora_dropout, use_rslora: as for ``LoRALinear``.
        init_lora_weights: True, ``"gaussian"`` or False, as for ``LoRALinear``. The lengths start as those of the
            rows of W + ΔW, so that the layer starts where LoRA would.

    Shapes:
        x: (..., in) → (..., out). ``lora_A``: (r, in). ``lora_B``: (out, r). ``lora_magnitude_vector``, m: (out,).

    Raises:
        ValueError: as for ``LoRALinear``; and for a start away from W, as PiSSA's.

    Source: Liu et al. 2024, eq. 5 and 11. Built in lesson 17.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.applies_in_forward():
            return y
        weight, bias = self.inner_pair()
        g = self.row_scales(weight)
        gB = (self.scaling * g)[:, None] * self.lora_B  # g ⊙ ΔW x = gB (A x): the small matrix is scaled, not outputs
        if (dropped := self.dropped(x)) is not None:
            update = F.linear(F.linear(dropped, self.lora_A).to(gB.dtype), gB)
            y_dropped = F.linear(dropped, self.oriented(weight).to(dropped.dtype))
            return torch.addcmul(y + update, y_dropped, g - 1).to(y.dtype)
        h = F.linear(x.to(self.lora_A.dtype), self.lora_A)
        update = F.linear(h.to(gB.dtype), gB, None if bias is None else (1 - g) * bias)
        return torch.addcmul(update, y, g).to(y.dtype)  # g ⊙ y + …, in one pass over the output

    def adapted(self, weight: Tensor, bias: Tensor | None) -> Pair:
        # A column of numbers, (out, 1), scales the rows of (out, in).
        turned = weight + self.oriented(self.delta_weight())
        return turned * self.oriented(self.row_scales(weight)[:, None]), bias

    def row_scales(self, weight: Tensor) -> Tensor:
        """g = m / ‖W + ΔW‖, (out,), at least float32.

        For a row of zeros, as some models have them, it is 0 and not 0 / 0: the row stays as it is (PEFT's issue 2049).
        """
        with torch.no_grad():
            norms = self.row_norms(weight)
        return at_least_float32(self.lora_magnitude_vector) / _not_zero(norms)

    def row_norms(self, weight: Tensor) -> Tensor:
        """‖W + ΔW‖ of each row, (out,), for a W in the base's orientation and in at least float32."""
        return torch.linalg.vector_norm(self.oriented(weight) + self.delta_weight(), dim=1)

    def inner_pair(self) -> Pair:
        """Weight, at least float32, and bias of what the adapter stands around."""
        if isinstance(self.base, AdapterLayer):
            return self.base.effective_pair()
        return at_least_float32(self.weight), self.bias

    def dropped(self, x: Tensor) -> Tensor | None:
        """x with dropout in the adapter's precision, or None where there is none now."""
        drops = self.training and isinstance(self.dropout, nn.Dropout)
        return self.dropout(x.to(self.lora_A.dtype)) if drops else None

    def __init__(self, base: nn.Module, *args: Any, **settings: Any):
        if (start := settings.get("init_lora_weights", True)) not in STARTS:
            raise ValueError(
                f"init_lora_weights={start!r} with use_dora=True: DoRA measures its lengths at the "
                f"pretrained weight and starts there, by {', '.join(map(repr, STARTS))}; take one of these, or "
                "use_dora=False"
            )
        super().__init__(base, *args, **settings)
        self.lora_magnitude_vector = self.new_parameter(self.out_features)
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self.row_norms(at_least_float32(self.weight)))

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [*super().adapter_parameters(), self.lora_magnitude_vector]

    def to_file(self) -> dict[str, Tensor]:
        return super().to_file() | {"lora_magnitude_vector": self.lora_magnitude_vector}


def _not_zero(norms: Tensor) -> Tensor:
    """Norms to divide by: the smallest number instead of 0."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


class DoRAConv1D(DoRALinear, LoRAConv1D):
    """DoRA for transformers' ``Conv1D``, whose weight (in, out) has one column for each output. Built in lesson 17."""


class DoRAEmbedding(DoRALinear, LoRAEmbedding):
    """DoRA for ``nn.Embedding``, as PEFT has it: one length for each of the dim columns of the table, not for each row.

    Shapes:
        x: (...) whole numbers → (..., dim). ``lora_magnitude_vector``: (dim,), norms over all rows of the table.

    A table is the layer x ↦ W x for one-hot x, with W of (dim, rows): its outputs are the columns. No dropout, as in
    ``LoRAEmbedding``. Built in lesson 17.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.applies_in_forward():
            return y
        return (self.row_scales(self.inner_pair()[0]) * (y + self.update(x))).to(y.dtype)


class QDoRALinear(OverFourBits, DoRALinear):
    """DoRA around a layer that stores its weight in four bits: lengths and norms are those of the rounded weight.

    It does not merge until ``dequantize_base(model)`` has made it ``DoRALinear`` around a plain layer.
    """

    dense_class = DoRALinear


register(
    "DoRA",
    LoraConfig,
    {layer.kind: lora_builder(layer) for layer in (QDoRALinear, DoRALinear, DoRAConv1D, DoRAEmbedding)},
    applies=lambda config: config.use_dora,
)


# The same, faster


def low_rank_row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s · B A‖ of each row without B A: the roots of ‖W‖² + 2 s (W Aᵀ) · B + s² (B A Aᵀ) · B, row by row.

    ‖W‖² depends on W alone and could be kept; A trains, so W Aᵀ could not. It takes as many multiplications as B A
    would, but nothing of the weight's size is written.

    The terms cancel where a row of W + s · B A is much shorter than that of W. Below a tenth of its length, float32
    would give five digits at best: then the rows are summed the long way, on a CPU, where asking costs nothing.

    Shapes:
        weight: (out, in), in the precision of A, (r, in), and B, (out, r). Returns (out,).

    Built in lesson 17.
    """
    alone = torch.linalg.vector_norm(weight, dim=1).square()
    mixed = ((weight @ lora_A.T) * lora_B).sum(1)
    update = ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(1)
    squares, size = alone + 2 * scaling * mixed + scaling**2 * update, alone + scaling**2 * update
    can_ask = squares.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_ask and (squares < 0.01 * size).any():
        return torch.linalg.vector_norm(weight + scaling * (lora_B @ lora_A), dim=1)
    return squares.clamp_min(torch.finfo(size.dtype).eps * size).sqrt()


class _DoRAProduct(torch.autograd.Function):
    """y = g ⊙ z + b, with z = x Vᵀ, V = W + s · B A and g = m / ‖V‖. x is (tokens, in) here, and y (tokens, out).

    V is made by one product and forgotten, and made again in the backward pass: it is as large as W, but where there
    are many tokens smaller than z, and with it x, z and their gradients are each read and written once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float, m: Tensor
    ) -> Tensor:
        V = torch.addmm(W, B, A, alpha=s)
        norms = _not_zero(torch.linalg.vector_norm(V, dim=1))
        z = x @ V.T
        ctx.save_for_backward(x, W, A, B, m, norms, z)
        ctx.s = s
        g = m / norms
        return z * g if bias is None else torch.addcmul(bias, z, g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, m, norms, z = ctx.saved_tensors
        g = (m / norms)[:, None]
        x_grad = grad @ torch.addmm(W, B, A, alpha=ctx.s).mul_(g) if ctx.needs_input_grad[0] else None
        bias_grad = grad.sum(0) if ctx.needs_input_grad[2] else None
        A_grad = ((ctx.s * g * B).T @ grad.T) @ x  # (r, tokens) (tokens, in): a CPU likes the short side first
        B_grad = g * ((ctx.s * A) @ x.T @ grad).T
        return x_grad, None, bias_grad, A_grad, B_grad, None, _summed_products(grad, z) / norms


def _summed_products(grad: Tensor, z: Tensor) -> Tensor:
    """(grad ⊙ z) summed over its rows. A CPU goes by pieces that stay in its cache."""
    if z.device.type != "cpu":
        return (grad * z).sum(0)
    pieces = zip(grad.split(256), z.split(256), strict=True)
    return torch.stack([(each * other).sum(0) for each, other in pieces]).sum(0)


class FastDoRA:
    """Put before a DoRA layer's class: ``_DoRAProduct`` where it is the same, elsewhere ``low_rank_row_norms``."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """The class's own forward, faster where it can be."""
        if not self.is_covered(x):
            return super().forward(x)  # type: ignore[misc]
        rows, weight = x.reshape(-1, x.shape[-1]), self.oriented(self.weight)
        adapter = self.lora_A, self.lora_B, self.scaling, self.lora_magnitude_vector
        y = _DoRAProduct.apply(rows, weight, self.bias, *adapter)
        return y.view(*x.shape[:-1], self.out_features)

    def row_norms(self: Any, weight: Tensor) -> Tensor:
        factors = at_least_float32(self.lora_A), at_least_float32(self.lora_B)
        return low_rank_row_norms(self.oriented(weight), *factors, self.scaling)

    def is_covered(self: Any, x: Tensor) -> bool:
        """Whether ``_DoRAProduct`` computes what the plain forward would: one precision, no dropout, a plain base."""
        dtypes = {x.dtype, self.weight.dtype, self.lora_A.dtype}
        return (
            is_plain_product(self.base)
            and self.adds_to_output()
            and dtypes in ({torch.float32}, {torch.float64})
            and not (x.is_meta or torch.is_autocast_enabled(x.device.type))
            and not self.weight.requires_grad
            and not (self.training and isinstance(self.dropout, nn.Dropout))
        )


class FastDoRALinear(FastDoRA, DoRALinear):
    """``DoRALinear`` in less time: what ``inject(..., fast=True)`` makes of it."""


class FastDoRAConv1D(FastDoRA, DoRAConv1D):
    """``DoRAConv1D`` in less time: what ``inject(..., fast=True)`` makes of it."""


class FastDoRAEmbedding(FastDoRA, DoRAEmbedding):
    """``DoRAEmbedding`` with the norms of its columns in less time: what ``inject(..., fast=True)`` makes of it."""


FAST: dict[Any, Any] = {
    DoRALinear: FastDoRALinear,
    DoRAConv1D: FastDoRAConv1D,
    DoRAEmbedding: FastDoRAEmbedding,
}


def quicken(layers: Mapping[str, AdapterLayer]) -> int:
    """Give the DoRA layers of an injection their fast class; returns how many there were. They stay the objects."""
    found = [layer for layer in layers.values() if type(layer) in FAST]
    for layer in found:
        layer.__class__ = FAST[type(layer)]
    return len(found)


register_fast_form(quicken)

register_entrant(
    "dora-r8",
    method="DoRA",
    config=lambda place: LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=place.targets),
    rates=RATES,
    card=__doc__,
)
