"""LoftQ: start the adapter so that it makes up for what rounding the base to four bits took away. Card in the book.

Idea: QLoRA rounds the frozen weights and starts the adapter at zero, so that training begins at a model that is a
little worse than the pretrained one. LoftQ starts the adapter at the best low-rank correction of the rounding.
Formula: by turns, T times, Q = NF4(W − s · B A) and s · B A = the rank-r matrix nearest to W − Q, beginning with
B A = 0; then y = Q x + s · B A x, and A and B train
Cost: T singular value decompositions of each weight before training; 4.5 bits for each frozen weight. Then as QLoRA.
On `tiny`, r = 8 takes 7 % off the error of rounding with T = 1, and 16 % with T = 5: it is spread over all directions.
Merging: as QLoRA: exact into Q in 16 bits (``dequantize_base``), not into the original weight W.
Papers: [Li et al. 2023](https://arxiv.org/abs/2310.08659) report better results than QLoRA's, most of all where weights
have two bits, or two and four. [PEFT's version](https://github.com/huggingface/peft/issues/1982) does not divide the
start by s, and so starts away from W wherever lora_alpha is not r.

Switched on by ``LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})``, as in PEFT,
for a model in full precision: ``inject`` stores its target layers in four bits. This is the one start that changes the
base, for Q is not W rounded, but W less the correction rounded (with T = 1 it is the same). So a base that is stored in
four bits already is refused: the weight that was there before is gone. What ``disable_adapter`` shows is Q, which
without its correction is further from W the larger T is. A file holds A, B and the settings, not Q; to load it is to
make Q again from the pretrained weight, in PEFT as here. In PEFT that needs a CUDA device.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.lora_entrants import RATES
from lora_edu.core.methods import InjectionContext, register
from lora_edu.lowrank import truncated_svd
from lora_edu.nf4 import NF4State, dequantize_nf4, quantize_nf4
from lora_edu.variants.four_bit_base import NF4Linear
from lora_edu.variants.qlora import FourBitLinear, QLoRALinear
from lora_edu.variants.shifted import check_scale

DEFAULTS = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's


def loftq(W: Tensor, r: int, iterations: int = 1) -> tuple[NF4State, Tensor, Tensor]:
    """A weight as four bits and a low-rank correction, Q + B A ≈ W: each in turn is fitted to what the other leaves.

    Args:
        W: the weight, (out, in), in any floating type.
        r: the rank of the correction, at most min(out, in).
        iterations: how often both are fitted.

    Returns:
        Q in blocks of 64 without double quantisation, as in PEFT; A (r, in) and B (out, r).

    Raises:
        TypeError, ValueError: if W cannot be quantised, or r is out of range.

    Source: Li et al. 2023, algorithm 1. Card in the book.
    """
    exact = at_least_float32(W.detach())
    correction = torch.zeros_like(exact)
    for _ in range(iterations):
        state = quantize_nf4(exact - correction)
        U, S, Vh = truncated_svd(exact - dequantize_nf4(state), r)
        root = S.sqrt()
        A, B = root[:, None] * Vh, U * root
        correction = B @ A
    return replace(state, dtype=W.dtype), A, B


class LoftQLinear(QLoRALinear):
    """LoRA around a weight that it stores in four bits itself, started at the correction of the rounding.

    Args:
        base: a linear layer in full precision. It stays as it is; the layer holds an ``NF4Linear`` in its place.
        loftq_iter: how often Q and the correction are fitted.
        r, settings: as for ``LoRALinear``.

    Shapes:
        x: (..., in) → (..., out). ``lora_A``: (r, in). ``lora_B``: (out, r).

    Raises:
        ValueError: if r is above min(in, out), lora_alpha is not above zero, or the weight is not finite.

    Source: Li et al. 2023, algorithm 1. Card in the book.
    """

    # Q belongs to the settings that it was made with: other ones are not taken over in place.
    reconfigure = AdapterLayer.reconfigure

    def __init__(self, base: nn.Linear, loftq_iter: int = 1, r: int = 8, **settings: Any):
        state, A, B = loftq(base.weight, r, loftq_iter)
        super().__init__(NF4Linear(state, base.bias).train(base.training), r, **settings)
        check_scale(self)
        with torch.no_grad():
            self.lora_A.copy_(A / self.scaling**0.5)
            self.lora_B.copy_(B / self.scaling**0.5)


def build(base: nn.Module, name: str, config: LoraConfig, context: InjectionContext) -> AdapterLayer:
    """The layer for the module called ``name``, which stores its weight in four bits from now on.

    Raises:
        ValueError: if the weight is stored so already, or another adapter stands around it; for other settings than
            are known, and for trained biases, as these are those of the layers that go.
    """
    if isinstance(base, AdapterLayer):
        raise ValueError(
            f"{name!r} has an adapter, {base.adapter_name!r}, and LoftQ would change the weight that it was made for: "
            "inject LoftQ first, or use quantize_base and plain LoRA"
        )
    if isinstance(base, FourBitLinear):
        raise ValueError(
            f"{name!r} is stored in four bits already, so the weight whose rounding LoftQ makes up for is gone: load "
            "the model in full precision and inject into that"
        )
    if config.bias != "none":
        raise ValueError(
            f"bias={config.bias!r}: LoftQ puts new layers in the place of those whose biases would train; use "
            "bias='none', or quantize_base and plain LoRA"
        )
    iterations = iterations_in(config.loftq_config)
    layer = LoftQLinear(base, iterations, **config.settings_of(name), **context.settings)  # type: ignore[arg-type]
    config.targets[name] = layer.frozen  # and no longer the weight in full precision, which would stay in memory
    return layer


def iterations_in(settings: dict[str, Any]) -> int:
    """How often to alternate, from ``loftq_config``.

    Raises:
        ValueError: for unknown settings, other than four bits, or a number of iterations below 1.
    """
    settings = DEFAULTS | settings
    if unknown := settings.keys() - DEFAULTS.keys():
        raise ValueError(f"loftq_config: {sorted(unknown)} are not known; expected {' and '.join(DEFAULTS)}")
    if (bits := settings["loftq_bits"]) != 4:
        raise ValueError(f"loftq_bits={bits!r}: expected 4, the only number of bits that layers here store")
    number = settings["loftq_iter"]
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        raise ValueError(f"loftq_iter={number!r}: expected a whole number of at least 1, for example 5")
    return int(number)


def with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file: PEFT wants both settings spelled out."""
    return fields | {"loftq_config": DEFAULTS | fields.get("loftq_config", {})}


register(
    "LoftQ",
    LoraConfig,
    {nn.Linear: build},
    applies=lambda config: config.init_lora_weights == "loftq" and not config.use_dora,
    file_fields=with_defaults,
)

register_entrant(
    "loftq-r8",
    method="LoftQ",
    config=lambda place: LoraConfig(r=8, lora_alpha=16, target_modules=place.targets, init_lora_weights="loftq"),
    rates=RATES | {"minilm": (*RATES["minilm"], 1e-2, 2e-2)},
    card=__doc__,
)
