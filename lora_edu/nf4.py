"""Weights in four bits: sixteen levels, one scale for each block of 64, and what that costs. Mathematics only.

A block of weights is divided by its largest magnitude, and each weight is stored as the number of the nearest of
sixteen levels. NF4 takes its levels from quantiles of the normal distribution, as trained weights look normal. The
numbers are bitsandbytes', bit for bit. Source: Dettmers et al. 2023, *QLoRA*. Built in lesson 14.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# As published: bitsandbytes computed them in float32, which ``normal_float_code`` meets to 1e-7.
NF4_CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
# Four bits as a floating-point number: a sign, two bits of exponent, one of fraction. Zero has two codes.
FP4_CODE = torch.tensor([-12.0, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
INT4_CODE = torch.arange(-7.0, 8) / 7  # symmetric: the sixteenth pattern is left unused, so that zero is a level
DOUBLE_BLOCK = 256  # scales that share a scale of their own, where they are quantised too


def normal_float_code(bits: int = 4) -> Tensor:
    """The levels of NormalFloat: 2^bits quantiles of the normal distribution, scaled to [−1, 1], zero among them.

    Equation 4 of the paper, taken literally, begins at the quantile of probability 0, which is −∞. bitsandbytes stops
    before the end: at the mean of the two probabilities that lie half a level inside it when the circle of
    probabilities is cut into 2^bits and into 2^bits − 1 pieces; with four bits that is 0.9677083. It takes equal
    steps in probability from there to 1/2, eight for the levels above zero and seven for those below.

    Returns:
        (2^bits,) rising levels in float32.

    Source: ``create_normal_map`` in bitsandbytes' ``functional.py``. Built in lesson 14.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: expected 2 to 8, for example 4")
    levels = 2**bits
    end = round(1 - (1 / (2 * levels) + 1 / (2 * levels - 2)) / 2, 7)  # as many digits as bitsandbytes writes
    above = torch.special.ndtri(torch.linspace(end, 0.5, levels // 2 + 1)[:-1].double())
    below = -torch.special.ndtri(torch.linspace(end, 0.5, levels // 2)[:-1].double())
    code = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (code / code.max()).float()


def dynamic_code() -> Tensor:
    """The 256 levels in which double quantisation stores scales: finer near zero, (256,) rising, in float32.

    Seven decades below 1; each has twice as many levels as the one below it. Source: Dettmers 2016, as bitsandbytes'
    ``create_dynamic_map``.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6)) * ((ends[:-1] + ends[1:]) / 2)
        levels += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(levels))


DYNAMIC_CODE = dynamic_code()


class PackedParameter(nn.Parameter):
    """A frozen parameter of bytes that hold two weights each: ``count_parameters`` counts the weights."""


@dataclass(frozen=True)
class NF4State:
    """A weight in four bits, with all that it takes to get numbers back.

    Attributes:
        packed: uint8, two weights a byte, the first in the upper half.
        absmax: one scale for each block: float32, or the numbers of levels in ``absmax_code`` (uint8).
        shape, dtype: of the weight.
        block_size: how many weights, in the order of the flattened matrix, share a scale.
        pairs: (256, 2), the two levels that each byte stands for.
        absmax_code, absmax_scales, absmax_offset: with double quantisation, its 256 levels, one scale for each 256
            scales, and the mean of all scales, which was subtracted first.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    pairs: Tensor
    absmax_code: Tensor | None = None
    absmax_scales: Tensor | None = None
    absmax_offset: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored for this weight; the two tables are the same for all weights."""
        stored = (self.packed, self.absmax, self.absmax_scales, self.absmax_offset)
        return sum(tensor.nbytes for tensor in stored if tensor is not None)

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits for each weight: 4.5 in blocks of 64, about 4.127 with double quantisation."""
        return 8 * self.nbytes / self.shape.numel()

    def scales(self) -> Tensor:
        """The scale of each block in float32."""
        if self.absmax_code is None or self.absmax_scales is None or self.absmax_offset is None:
            return self.absmax
        levels = self.absmax_code.index_select(0, self.absmax.int())
        return _scaled(levels, self.absmax_scales, DOUBLE_BLOCK) + self.absmax_offset


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = False, code: Tensor = NF4_CODE) -> NF4State:
    """Store a weight in four bits for each number.

    Args:
        weight: any shape, in any floating type; computed with in float32.
        block_size: how many neighbours share a scale. bitsandbytes allows powers of two from 32.
        double_quant: store the scales in eight bits, in blocks of 256.
        code: the levels, at most 16, rising, from −1 to 1.

    Raises:
        TypeError: if the weight does not hold floating-point numbers.
        ValueError: if it is empty, on the meta device, or not finite; for a block size below 1; for other levels.

    Source: Dettmers et al. 2023, sections 2 and 3. Built in lesson 14.
    """
    check_weight(weight)
    code = _checked_code(code).to(weight.device)
    index, absmax = _nearest(weight.detach().float().flatten(), code, _checked_block(block_size))
    index = F.pad(index, (0, weight.numel() % 2), value=int(code.abs().argmin())).to(torch.uint8)
    upper, lower = index[::2], index[1::2]
    pairs = F.pad(code, (0, 16 - len(code)))
    pairs = torch.stack([pairs.repeat_interleave(16), pairs.repeat(16)], dim=1)
    state = NF4State((upper << 4) | lower, absmax, weight.shape, weight.dtype, int(block_size), pairs)
    if not double_quant:
        return state
    mean, levels = absmax.mean(), DYNAMIC_CODE.to(weight.device)
    index, scales = _nearest(absmax - mean, levels, DOUBLE_BLOCK)
    return replace(state, absmax=index.to(torch.uint8), absmax_code=levels, absmax_scales=scales, absmax_offset=mean)


def dequantize_nf4(state: NF4State, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that a stored weight stands for, in its shape; in its dtype, or in another one.

    Computed in float32 and rounded once.

    Built in lesson 14.
    """
    levels = state.pairs.index_select(0, state.packed.int()).flatten()[: state.shape.numel()]
    return _scaled(levels, state.scales(), state.block_size).view(state.shape).to(state.dtype).to(dtype or state.dtype)


def rounded_to_code(weight: Tensor, code: Tensor, block_size: int = 64) -> Tensor:
    """The weight after a way to four bits and back with the given levels, whatever their number: to compare codes.

    Raises:
        TypeError, ValueError: as ``quantize_nf4``.
    """
    check_weight(weight)
    code = _checked_code(code, 256).to(weight.device)
    index, absmax = _nearest(weight.detach().float().flatten(), code, _checked_block(block_size))
    return _scaled(code[index], absmax, block_size).view(weight.shape).to(weight.dtype)


def rounded_to_int(weight: Tensor, bits: int = 4, block_size: int = 64) -> Tensor:
    """The weight after rounding to 2^bits even levels between each block's minimum and maximum: integers with offset.

    A block stores two numbers, its minimum and its step.

    Raises:
        TypeError, ValueError: as ``quantize_nf4``.
    """
    check_weight(weight)
    blocks = _blocks(weight.detach().float().flatten(), _checked_block(block_size), mode="last")
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    steps = torch.where(step > 0, ((blocks - low) / step).round(), 0.0)
    return (low + step * steps).flatten()[: weight.numel()].view(weight.shape).to(weight.dtype)


def relative_error(weight: Tensor, rounded: Tensor) -> float:
    """‖W − Ŵ‖ / ‖W‖, in the Frobenius norm."""
    exact = weight.detach().double()
    return float((exact - rounded.detach().double()).norm() / exact.norm())


def _nearest(values: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The number of the nearest level for each value, the lower one in a tie, and the scale of each block."""
    blocks = _blocks(values, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks / torch.where(absmax > 0, absmax, 1.0)[:, None]
    return torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).flatten()[: values.numel()], absmax


def _scaled(levels: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Each level times the scale of its block, flat."""
    return (_blocks(levels, block_size) * scales[:, None]).flatten()[: levels.numel()]


def _blocks(values: Tensor, block_size: int, mode: str = "zero") -> Tensor:
    """Flat values as rows of one block each; a short last block is filled with zeros, or with its last value."""
    missing = -values.numel() % block_size
    if missing:
        values = torch.cat([values, values[-1:].expand(missing) if mode == "last" else values.new_zeros(missing)])
    return values.view(-1, block_size)


def check_weight(weight: Any) -> None:
    """Raise unless this is a tensor of finite floating-point numbers."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"the weight holds {kind}: expected a tensor of floating-point numbers")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device, without numbers to quantise: load it first")
    if weight.numel() == 0 or not torch.isfinite(weight).all():
        what = "is empty" if weight.numel() == 0 else "holds infinite or NaN values"
        raise ValueError(f"the weight of shape {tuple(weight.shape)} {what}: there is no scale for such a block")


def _checked_block(block_size: Any) -> int:
    """The block size, if it is a whole number of at least 1."""
    if isinstance(block_size, bool) or not isinstance(block_size, Integral) or block_size < 1:
        raise ValueError(f"block_size={block_size!r}: expected a whole number of at least 1, for example 64")
    return int(block_size)


def _checked_code(code: Any, most: int = 16) -> Tensor:
    """The levels in float32, if they are 2 to ``most`` rising numbers within [−1, 1]."""
    code = torch.as_tensor(code, dtype=torch.float32)
    if code.ndim != 1 or not 2 <= len(code) <= most or not (code.diff() > 0).all() or code.abs().max() > 1:
        raise ValueError(f"code of shape {tuple(code.shape)}: expected 2 to {most} rising levels within [−1, 1]")
    return code
