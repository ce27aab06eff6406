"""How many floating-point operations is a training step, and what does that cost? Built in lesson 06.

A matrix product of (m, k) and (k, n) is 2·m·k·n operations: a multiplication and an addition for each pair. One weight
and one token cost 2 in the forward pass, 2 for the gradient of the layer's input, and 2 for the gradient of the weight.
LoRA saves the last 2, and nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# The fused layers of lesson 24 add in place, which PyTorch's counter does not know as a product.
IN_PLACE = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # of the three shapes


def rule_flops(
    weights: float, tokens: int, method: str = "full", adapter: float = 0, checkpointing: bool = False
) -> float:
    """The rule of thumb: 6 operations a weight and token for full fine-tuning, 4 (and 6 for A and B) for LoRA.

    Args:
        weights: parameters in matrix products: all of them less the input embedding.
        tokens: batch × length.
        method: "full" or "lora".
        adapter: LoRA's parameters.
        checkpointing: adds a second forward pass, 2 a weight.

    Leaves out attention's own products (see ``step_flops``). Lesson 06.
    """
    if method not in ("full", "lora"):
        raise ValueError(f'method={method!r}: expected "full" or "lora"')
    frozen = 6 if method == "full" else 4
    again = 2 if checkpointing else 0
    return tokens * ((frozen + again) * weights + (6 + again) * adapter)


def step_flops(model: nn.Module, batch: int = 1, tokens: int = 512, checkpointing: bool = False) -> int:
    """Count the operations of forward and backward exactly, without computing them. Lesson 06.

    Every matrix product that PyTorch would run is counted, attention's included, for what requires a gradient. What is
    not a matrix product (norms, the loss, the optimizer) is not.

    Args:
        model: a causal language model of transformers on the meta device (``lora_edu.counting.meta.meta_model``),
            adapted or not, with eager attention.
        batch, tokens: the shape of the input.
        checkpointing: run with gradient checkpointing, and leave the model with it off.

    Raises:
        ValueError: if the model holds real weights, or if nothing requires a gradient.
    """
    if any(not p.is_meta for p in model.parameters()):
        raise ValueError("the model has real weights: build it with meta_model(config)")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing requires a gradient, so there is no training step to count; inject an adapter first")
    checkpointed: Any = model
    was_training = model.training
    model.train()
    if checkpointing:
        _quietly(checkpointed.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    # A ready-made mask: transformers would look into the values of an absent one, and meta tensors have none.
    mask = torch.zeros(batch, 1, tokens, tokens, device="meta")
    try:
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    finally:
        if checkpointing:
            _quietly(checkpointed.gradient_checkpointing_disable)
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def _quietly(call: Callable[..., Any], **options: Any) -> None:
    """Transformers 5.23 gave these methods new names and warns; the old ones work in all versions that we support."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_")
        call(**options)


def training_hours(flops: float, ceiling: float, share: float) -> float:
    """Hours for so many operations on a device that reaches ``share`` of its ``ceiling`` (operations a second).

    >>> round(training_hours(6 * 7e9 * 1e9, ceiling=312e12, share=0.4), 1)   # a billion tokens of 7B on an A100
    93.5

    Raises:
        ValueError: if ceiling is not positive or share not in (0, 1].
    """
    if ceiling <= 0:
        raise ValueError(f"ceiling={ceiling}: operations a second, for example 312e12 for an A100 in bfloat16")
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: the part of the ceiling that is reached, above 0 and at most 1, such as 0.4")
    return flops / (ceiling * share) / 3600


def cost(hours: float, price: float) -> float:
    """Hours × price of an hour."""
    return hours * price
