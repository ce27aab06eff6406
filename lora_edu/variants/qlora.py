"""QLoRA: the frozen weights in four bits, the adapter and all products in sixteen. Built in lesson 14.

Idea: Only the adapter trains, so the pretrained weight may be stored coarsely: four bits for each number, in levels
that fit a normal distribution. Every pass turns it back into 16-bit numbers, uses them and forgets them.
Formula: y = x · dequantize(W)ᵀ + s · (x Aᵀ) Bᵀ, where dequantize(W) is a level times the scale of its block
Cost: 4.127 bits for each frozen weight instead of 16, and one more pass over the weights in forward and in backward.
Numbers that train, activations and files are LoRA's.
Merging: the adapter was trained for the rounded weight, so the exact merge is into that weight in 16 bits. Merging into
the original weight, or rounding the sum to four bits again, gives another model.
Papers: [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314) report 16-bit quality on MMLU with NF4 (53.1 against
53.0) and less with FP4 (52.2). [Yoshida 2023](https://arxiv.org/abs/2306.06965) shows that NF4 is not optimal where
blocks are scaled by their maximum. [Li et al. 2023](https://arxiv.org/abs/2310.08659) (LoftQ) start the adapter so that
it corrects the rounding, and find that this helps most at two bits.

``quantize_base(model)`` stores the linear layers of any model so; ``inject`` then adapts them with a ``LoraConfig`` as
it does others, and does the same with a model whose four bits are bitsandbytes'. Files are LoRA's, and PEFT's.
"""

from __future__ import annotations

from abc import ABC
from typing import Any

from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.config import LoraConfig, lora_builder
from lora_edu.core.entrants import Place, register_entrant
from lora_edu.core.inject import inject
from lora_edu.core.layer import LoRALinear
from lora_edu.core.lora_entrants import RATES
from lora_edu.core.methods import register_kind
from lora_edu.core.state import adapter_state, injected_models
from lora_edu.variants.four_bit_base import NF4Linear, quantize_base


class FourBitLinear(ABC):  # noqa: B024  # it only recognises classes
    """Layers that ``QLoRALinear`` adapts: ``NF4Linear``, and bitsandbytes' ``Linear4bit``, which need not be there."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        names = [(each.__module__.partition(".")[0], each.__name__) for each in kind.__mro__]
        return issubclass(kind, NF4Linear) or ("bitsandbytes", "Linear4bit") in names


class OverFourBits:
    """Put before an adapter's class: around a layer that stores its weight in four bits.

    Attributes:
        dense_class: what an adapter of this very class becomes once ``dequantize_base`` has made its layer a plain one.
            A class that does not say it, whatever it derives from, stays what it is, and is right as well.
    """

    kind: Any = FourBitLinear
    dense_class: type[AdapterLayer]

    @property
    def weight(self: Any) -> Tensor:
        """The frozen weight as numbers, made anew each time it is asked for."""
        return dense_weight(self.frozen)


class QLoRALinear(OverFourBits, LoRALinear):
    """LoRA around a layer that stores its weight in four bits: y = x · dequantize(W)ᵀ + b + s · (dropout(x) Aᵀ) Bᵀ.

    The base's own forward and backward pass dequantise; everything else is ``LoRALinear``, files included. It does
    not merge: a merged weight would have to be rounded to four bits again. ``dequantize_base(model)`` makes it plain
    LoRA around a plain layer, which does.

    Raises:
        TypeError: if the base is no four-bit layer.

    Source: Dettmers et al. 2023, eq. 5. Built in lesson 14.
    """

    dense_class = LoRALinear


def dense_weight(layer: Any) -> Tensor:
    """The weight of a linear layer as numbers, dequantised if it is stored in four bits."""
    quant_state = getattr(layer.weight, "quant_state", None)  # bitsandbytes' own, once it has quantised
    if quant_state is None:
        return layer.weight
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes rearranged the bytes of this Linear4bit for inference on a CPU, as it does in the first pass "
            "in eval mode: load the model again, and inject or dequantise before that"
        )
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, quant_state)


def dequantize_base(model: nn.Module) -> int:
    """Turn the layers that store four bits into plain ones with the numbers that these stand for, in place.

    A model with adapters keeps them: they stand around plain layers then, and can be merged. What rounding to four
    bits took away does not come back.

    Returns:
        How many layers there were.

    Built in lesson 14.
    """
    plain: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for attribute, layer in list(parent._modules.items()):
            if isinstance(layer, FourBitLinear):
                if id(layer) not in plain:
                    plain[id(layer)] = plain_layer(layer)
                setattr(parent, attribute, plain[id(layer)])
        dense_class = vars(type(parent)).get("dense_class")
        if dense_class is not None and not isinstance(parent.frozen, FourBitLinear):
            parent.__class__ = dense_class
    for injected in injected_models(model).values():
        for config in adapter_state(injected).configs.values():
            config.targets = {name: plain.get(id(layer), layer) for name, layer in config.targets.items()}
    return len(plain)


def plain_layer(layer: Any) -> nn.Linear:
    """An ``nn.Linear`` with the numbers that a four-bit layer stands for, frozen."""
    weight = dense_weight(layer)
    new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = layer.bias
    return new.train(layer.training)


register_kind("LoRA", FourBitLinear, lora_builder(QLoRALinear))


def _quantise_and_inject(model: nn.Module, place: Place) -> None:
    quantize_base(model)
    inject(model, LoraConfig(r=8, lora_alpha=16, target_modules=place.targets, task_type=place.task_type))


register_entrant("qlora-r8", method="QLoRA", unfreeze=_quantise_and_inject, rates=RATES, card=__doc__)
