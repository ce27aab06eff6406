"""LoRA's linear layer as one autograd function: the same numbers, with less memory traffic. Built in lesson 24.

The plain layer of lesson 03 writes three tensors of the output's size: the base's output, the update and their sum.
Here the update is written first and the base's output added to it in place, what the backward pass needs is kept and
not computed twice, the thin products are taken with their short side first, and layers that read the same input, such
as q, k and v, read it together.

``inject(model, config, fast=True)`` puts these layers into a model. The plain layer stays the one to read and to trust:
the tests compare every value and every gradient with it. Gradients of gradients are not available here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_edu.core.layer import check_dropout

Layer = tuple[Tensor, Tensor | None, Tensor, Tensor]  # weight, bias, A, B


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ, values and gradients those of the plain layer up to rounding.

    Args:
        x: the input; in the weight's dtype, or whatever autocast turns into one.
        weight, bias: the frozen layer's; they get gradients if they require them.
        lora_A, lora_B: the adapter. In another dtype than the weight's (float32 on bfloat16), they are rounded to the
            weight's for the products, as autocast does, and get gradients in their own.
        scaling: s.
        dropout_p: probability of zeroing an entry of x on its way into A, rounded to a multiple of 1/65536. The random
            numbers are drawn in a cheaper way than ``F.dropout``'s, so the same seed gives another mask.

    Shapes:
        x: (..., in) → (..., out). weight: (out, in). lora_A: (r, in). lora_B: (out, r).

    Raises:
        ValueError: if the shapes do not fit together, or dropout_p is no probability.

    Source: Hu et al. 2021, eq. 3; compare RunLoRA (Cherniuk et al. 2023), which also saves bytes. Built in lesson 24.
    """
    check_dropout(dropout_p)
    _check_shapes(x, weight, bias, lora_A, lora_B)
    return lora_linears(x, [(weight, bias, lora_A, lora_B)], [scaling], [dropout_p])[0]


def lora_linears(x: Tensor, layers: list[Layer], scalings: list[float], dropouts: list[float]) -> tuple[Tensor, ...]:
    """``lora_linear`` of several layers that read the same x: one output for each."""
    device = x.device.type
    dtype = layers[0][0].dtype
    if _autocasts(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
    tensors = [t if t is None else t.to(dtype) for layer in layers for t in layer]
    keeps = [_kept_share(p) for p in dropouts]
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (..., in) → (tokens, in)
    masks = [None if p == 0 else _random_mask(len(rows), rows.shape[1], p, x.device) for p in dropouts]
    # What dropout keeps is scaled up by 1 / keep; s takes that along.
    scalings = [s / keep if keep else 0.0 for s, keep in zip(scalings, keeps, strict=True)]
    with torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext():
        outputs = _LoRALinears.apply(rows, scalings, masks, *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _LoRALinears(torch.autograd.Function):
    """n adapted layers of one input: yᵢ = x Wᵢᵀ + bᵢ + sᵢ · (mᵢ ⊙ x) Aᵢᵀ Bᵢᵀ, where mᵢ is a mask or None.

    x is (tokens, in) here, and yᵢ (tokens, out).

    The thin products are kept as (r, tokens): matrix libraries cut the first dimension into pieces for their threads
    and registers, and r = 8 rows of 2,048 numbers suit them better than 2,048 rows of 8.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, scalings: list[float], masks: list[Tensor | None], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = list(_fours(tensors))
        downs = _down(rows, [A for _, _, A, _ in layers], scalings, masks)
        outputs = []
        for (W, b, _, B), h in zip(layers, downs, strict=True):
            y = h.T @ B.T if b is None else torch.addmm(b, h.T, B.T)  # the thin product first, as it need not read y
            _add_product(y, rows, W.T)  # in place: no second tensor of (tokens, out)
            outputs.append(y)
        ctx.save_for_backward(rows, *downs, *masks, *tensors)
        ctx.scalings = scalings
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        device = grads[0].device.type
        with torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext():
            return _backward(ctx, grads)


def _backward(ctx: Any, gs: Sequence[Tensor]) -> tuple[Any, ...]:
    """The gradients for x and each layer's weight, bias, A and B; ``gs`` are those of the outputs, (tokens, out)."""
    n = len(gs)
    rows, *saved = ctx.saved_tensors  # asked for once: with checkpointing, each time would recompute them
    downs, masks, layers = saved[:n], saved[n : 2 * n], list(_fours(saved[2 * n :]))
    ups = [B.T @ g.T for g, (_, _, _, B) in zip(gs, layers, strict=True)]  # the gradient of h, (r, tokens)
    As = [A for _, _, A, _ in layers]
    gx = None
    if ctx.needs_input_grad[0]:
        gx = _through(As, ups, ctx.scalings, masks)
        for g, (W, _, _, _) in zip(gs, layers, strict=True):
            _add_product(gx, g, W)
    of_As = _into_As(ups, rows, ctx.scalings, masks) if any(ctx.needs_input_grad[5::4]) else [None] * n
    found: list[Tensor | None] = []
    for i, (g, h) in enumerate(zip(gs, downs, strict=True)):
        of_weight, of_bias, of_A, of_B = ctx.needs_input_grad[3 + 4 * i : 7 + 4 * i]
        found.append(g.T @ rows if of_weight else None)
        found.append(g.sum(0) if of_bias else None)
        found.append(of_As[i] if of_A else None)
        found.append(_into_B(h, g) if of_B else None)
    return gx, None, None, *found


# Layers that read x together read it once: their thin matrices are stacked for one product. Dropout, which gives each
# an x of its own, and different scalings keep them apart. The scale goes to A or its gradient, the smallest tensors.
# (Stacked, the gradients of the As are parts of one tensor.)


def _can_be_stacked(scalings: list[float], masks: Sequence[Tensor | None]) -> bool:
    return len(set(scalings)) == 1 and all(mask is None for mask in masks)


def _stacked(thin: Sequence[Tensor]) -> Tensor:
    return thin[0] if len(thin) == 1 else torch.cat(list(thin))


def _down(rows: Tensor, As: list[Tensor], scalings: list[float], masks: Sequence[Tensor | None]) -> list[Tensor]:
    """h = s A xᵀ of each layer, (r, tokens)."""
    if _can_be_stacked(scalings, masks):
        return list(((scalings[0] * _stacked(As)) @ rows.T).split([len(A) for A in As]))
    each = zip(As, scalings, masks, strict=True)
    return [(s * A) @ (rows if mask is None else rows * mask).T for A, s, mask in each]


def _through(As: list[Tensor], ups: list[Tensor], scalings: list[float], masks: Sequence[Tensor | None]) -> Tensor:
    """The gradient for x by way of the adapters, (tokens, in)."""
    if _can_be_stacked(scalings, masks):
        return _stacked(ups).T @ (scalings[0] * _stacked(As))  # (tokens, n·r) (n·r, in)
    products = [up.T @ (s * A) for up, s, A in zip(ups, scalings, As, strict=True)]
    masked = [product if mask is None else product.mul_(mask) for product, mask in zip(products, masks, strict=True)]
    return functools.reduce(Tensor.add_, masked)


def _into_As(ups: list[Tensor], rows: Tensor, scalings: list[float], masks: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradient of each A, (r, in)."""
    if _can_be_stacked(scalings, masks):
        return list((scalings[0] * (_stacked(ups) @ rows)).split([len(up) for up in ups]))
    each = zip(ups, scalings, masks, strict=True)
    return [s * (up @ (rows if mask is None else rows * mask)) for up, s, mask in each]


def _into_B(h: Tensor, g: Tensor) -> Tensor:
    """The gradient of B, (out, r): a CPU likes the short side first, a GPU writes it as it is to lie."""
    return g.T @ h.T if h.is_cuda else (h @ g).T.contiguous()


def _add_product(y: Tensor, left: Tensor, right: Tensor) -> None:
    """y += left right, in place: (m, n) += (m, k) (k, n)."""
    if torch.compiler.is_compiling():
        _add_product_compiled(y, left, right)
    else:
        y.addmm_(left, right)


@torch.library.custom_op("lora_edu::add_product_", mutates_args={"y"})
def _add_product_compiled(y: Tensor, left: Tensor, right: Tensor) -> None:
    """The same, named so that a compiler keeps it in place: of ``addmm_`` it makes ``addmm``, which copies y first."""
    y.addmm_(left, right)


@_add_product_compiled.register_fake
def _add_product_traced(y: Tensor, left: Tensor, right: Tensor) -> None:
    """What the compiler has to know of the result's shape: there is none, y keeps its own."""


def _fours(tensors: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    for i in range(0, len(tensors), 4):
        yield tuple(tensors[i : i + 4])


def _autocasts(device: str) -> bool:
    """Whether autocast is on for this kind of device; the meta device, which computes nothing, has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _kept_share(p: float) -> float:
    """The share of entries that a mask keeps, exactly: p in 65,536ths."""
    return 1 - round(p * 65536) / 65536


def _random_mask(rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """True where an entry is kept. On a CPU four decisions come from each 64-bit draw, which is five times faster."""
    numbers = rows * columns
    if device.type != "cpu" or p == 1:
        return torch.empty(rows, columns, dtype=torch.bool, device=device).bernoulli_(_kept_share(p))
    # The lower bound matters: without it random_() draws 63 bits, and every fourth decision is biased.
    bits = torch.empty((numbers + 3) // 4, dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    return (bits.view(torch.int16)[:numbers] >= round(p * 65536) - 32768).view(rows, columns)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise unless the shapes fit together."""
    out_features, in_features = weight.shape
    r = len(lora_A)
    expected = {"lora_A": (r, in_features), "lora_B": (out_features, r)} | (
        {} if bias is None else {"bias": (out_features,)}
    )
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if tensor is not None and tensor.shape != expected[name]:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}; beside a weight of (out, in) = {(out_features, in_features)} "
                f"and r={r} it must be {expected[name]}"
            )
    if not x.shape or x.shape[-1] != in_features:
        raise ValueError(f"x is {tuple(x.shape)}: its last dimension must be the weight's in = {in_features}")
