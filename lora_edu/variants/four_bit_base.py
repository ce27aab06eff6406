"""A base model in four bits: the layer that stores its weight so, and how a model's layers become such. Lesson 14."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import config as compiler_config
from torch.utils.checkpoint import checkpoint

from lora_edu.core.config import LoraConfig
from lora_edu.core.inject import aimed
from lora_edu.core.matching import named_places
from lora_edu.core.refusals import check_readable
from lora_edu.core.state import injected_models, unwrapped_model
from lora_edu.nf4 import NF4_CODE, NF4State, PackedParameter, check_weight, dequantize_nf4, quantize_nf4

TABLES = ("pairs", "absmax_code")  # the same for every layer, so that no state_dict holds them
BUFFERS = (*TABLES, "absmax", "absmax_scales", "absmax_offset")
SHAPES = 64  # of weights in one process, each with a kernel of its own
CAN_FUSE = find_spec("triton") is not None  # what torch.compile writes kernels in


class _Product(torch.autograd.Function):
    """x Wᵀ + b with a W made of four bits: made in the forward pass, forgotten, and made again in the backward pass.

    ``F.linear`` on a dequantised weight would keep that weight for the backward pass, 16 bits for every number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, about: tuple[Any, ...], *stored: Tensor | None) -> Tensor:
        ctx.about = about
        ctx.save_for_backward(*stored)
        return F.linear(x, _dense(about, stored, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors  # asked for once: checkpointing allows no more
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ _dense(ctx.about, stored, grad.dtype)
        if ctx.needs_input_grad[1]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0)
        return x_grad, bias_grad, *[None] * (1 + len(stored))


def _dense(about: tuple[Any, ...], stored: Sequence[Any], into: torch.dtype) -> Tensor:
    """The stored weight as numbers of type ``into``. On a GPU that is one kernel, which the compiler writes.

    It may then round a scale otherwise in float32's last bit than ``dequantize_nf4`` does by itself.
    """
    if stored[0].is_cuda and CAN_FUSE and not torch.compiler.is_compiling():
        return _fused()(about, stored, into)
    return dequantize_nf4(_state(about, stored), into)


@cache
def _fused() -> Callable[..., Tensor]:
    """``dequantize_nf4`` as one kernel, compiled for each shape when it first occurs."""
    # It serves all models of the process; beyond the compiler's usual limit, 8, further shapes would run uncompiled.
    compiler_config.recompile_limit = max(compiler_config.recompile_limit, SHAPES)
    return torch.compile(lambda about, stored, into: dequantize_nf4(_state(about, stored), into), dynamic=False)


def _state(about: tuple[Any, ...], stored: Sequence[Any]) -> NF4State:
    """The stored weight from shape, dtype and block size, and its tensors."""
    shape, dtype, block_size = about
    packed, pairs, absmax_code, absmax, scales, offset = stored
    return NF4State(packed, absmax, shape, dtype, block_size, pairs, absmax_code, scales, offset)


class NF4Linear(nn.Linear):
    """A frozen linear layer that stores its weight in four bits and computes in the precision of its input.

    Args:
        state: the stored weight, from ``quantize_nf4``, of shape (out, in).
        bias: as it was, (out,).

    Shapes:
        x: (..., in) → (..., out).

    Its backward pass dequantises again, under ``torch.compile``, too. On a GPU that is one kernel each time.

    Source: Dettmers et al. 2023, eq. 5. Built in lesson 14.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling():  # the compiler decides what is kept in between, unless it is told so
            return checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
        return _Product.apply(x, self.bias, self.about, *self.stored)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, _dense(self.about, self.stored, x.dtype), self.bias)

    def __init__(self, state: NF4State, bias: Tensor | None = None):
        nn.Module.__init__(self)  # nn.Linear's own would begin with a dense weight
        self.out_features, self.in_features = state.shape
        self.block_size, self.dtype = state.block_size, state.dtype
        self.packed = PackedParameter(state.packed, requires_grad=False)
        self.register_parameter("bias", bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        for name in BUFFERS:
            self.register_buffer(name, getattr(state, name), persistent=name not in TABLES)

    @property
    def about(self) -> tuple[torch.Size, torch.dtype, int]:
        """The weight's shape and dtype, and the block size."""
        return torch.Size((self.out_features, self.in_features)), self.dtype, self.block_size

    @property
    def stored(self) -> list[Tensor | None]:
        """The tensors that stand for the weight."""
        return [self.packed.data, *(getattr(self, name) for name in BUFFERS)]

    @property
    def state(self) -> NF4State:
        """The weight as it is stored."""
        return _state(self.about, self.stored)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The numbers that the four bits stand for, (out, in): made anew each time it is asked for."""
        return _dense(self.about, self.stored, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Move as other modules do. A cast changes what the layer computes in; the scales stay as they were."""
        exact = {name: tensor for name in BUFFERS if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        self.dtype = fn(torch.zeros((), dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.state.bits_per_parameter:.3f} bits per weight"


@dataclass(frozen=True)
class QuantizationReport:
    """What ``quantize_base`` did: the layers that are stored in four bits, and their bytes before and after."""

    replaced: list[str]
    bytes_before: int
    bytes_after: int
    bits_per_parameter: float

    def __str__(self) -> str:
        return (
            f"stored {len(self.replaced)} weights in {self.bits_per_parameter:.3f} bits for each number: "
            f"{self.bytes_before / 1e6:,.1f} MB became {self.bytes_after / 1e6:,.1f} MB"
        )


def quantize_base(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    code: Tensor = NF4_CODE,
) -> QuantizationReport:
    """Store linear layers in four bits, in place and for good: before ``inject``, which then adapts them as others.

    Args:
        model: any model. What is no ``nn.Linear``, such as embeddings and norms, stays as it is.
        target_modules, exclude_modules: which layers, as in ``LoraConfig``. The default leaves out the output head, as
            bitsandbytes does.
        block_size, double_quant, code: as for ``quantize_nf4``.

    Raises:
        ValueError: if no layer fits, one is read and not called by its owner, a weight is not finite or not here, or
            the model has adapters. The model is then as it was.
        TypeError: if a target is no linear layer, or its weight is packed already.

    Built in lesson 14.
    """
    model = unwrapped_model(model)
    if injected_models(model):
        raise ValueError("the model has adapters, which were made for its weights: quantize_base(model) comes first")
    settings = LoraConfig(target_modules=target_modules, exclude_modules=exclude_modules, task_type="SEQ_CLS")
    layers = aimed(model, settings, "default").targets
    layers = {name: layer for name, layer in layers.items() if not isinstance(layer, NF4Linear)}
    if not layers:
        raise ValueError(f"target_modules={target_modules!r}: these layers are stored in four bits already")
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"{name!r} is a {type(layer).__name__}: only nn.Linear is stored in four bits; leave it out"
            )
        check_readable(layer, layer.weight)
        check_weight(layer.weight)
    quantize_nf4(torch.ones(1), block_size, double_quant, code)  # says so if the settings are wrong
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, parent, attribute, module in named_places(model):
        places.setdefault(id(module), []).append((parent, attribute))
    names, numbers, before, after = list(layers), 0, 0, 0
    for name in names:  # one at a time, and nothing keeps the old one: both models together might not fit
        layer = layers.pop(name)
        state = quantize_nf4(layer.weight, block_size, double_quant, code)
        new = NF4Linear(state, layer.bias).train(layer.training)
        for parent, attribute in places[id(layer)]:
            setattr(parent, attribute, new)
        numbers, before, after = numbers + layer.weight.numel(), before + layer.weight.nbytes, after + state.nbytes
    return QuantizationReport(names, before, after, 8 * after / numbers)
