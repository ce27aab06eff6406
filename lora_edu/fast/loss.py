"""The loss over the output head, a few tokens at a time: all logits are never there at once. Built in lesson 24.

A vocabulary of 128,256 makes the logits of 8,192 tokens 2 GiB in bfloat16, and the loss a multiple of that: its float32
copy, the softmax, the gradient. But the loss is a sum over tokens, and a frozen head needs no gradient of its own. So
each piece of the tokens can go all the way, logits, loss, gradient of the hidden state, before the next one begins.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lora_edu.core.adapter import at_least_float32

IGNORED = -100  # the label of tokens that do not count
SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # Gemma's, Granite's, Cohere's


def loss_in_pieces(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, rows: int = 512, **inputs: Any) -> Tensor:
    """The loss of ``model(input_ids=..., labels=...)`` and its gradients, without all the logits.

    Args:
        model: a decoder of transformers whose output head is a frozen ``nn.Linear`` without adapter.
        input_ids, labels: (batch, tokens); labels of -100 do not count.
        rows: how many tokens' logits exist at a time.
        inputs: what else the decoder is called with, as ``attention_mask``.

    Returns:
        the mean over the counted tokens, a tensor ().

    Raises:
        ValueError: if the head trains, is adapted, or is followed by a scale or a cap of the logits; or if rows is
            below 1.

    Source: the idea is that of Cut Your Losses (Wijmans et al. 2024, arXiv 2411.09009) and Liger Kernel's
    FusedLinearCrossEntropy (Hsu et al. 2024, arXiv 2410.10989). Built in lesson 24.
    """
    head = frozen_head(model)
    if rows < 1:
        raise ValueError(f"rows={rows}: expected at least 1 token at a time, for example 512")
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    # A token's label is the next token: the last one has none.
    hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return _PiecewiseLoss.apply(hidden, head.weight, head.bias, labels, rows)


def frozen_head(model: PreTrainedModel) -> nn.Linear:
    """The model's output head, if this loss knows how to go through it; errors as in ``loss_in_pieces``."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError(
            f"the output head is a {type(head).__name__} that trains or is no plain nn.Linear: its own gradient needs "
            "all logits at once; use the model's loss, or leave the head out of target_modules and modules_to_save"
        )
    if scaled := [name for name in SCALED_LOGITS if getattr(model.config, name, None) not in (None, 1)]:
        raise ValueError(f"{type(model).__name__} changes its logits after the head ({scaled[0]}): use its own loss")
    return head


def loss_and_gradient(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: int = 512, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of hidden Wᵀ + b against labels, and its gradient with respect to hidden.

    Args:
        hidden: what goes into the head.
        weight, bias: the frozen head's.
        labels: those of -100 do not count.
        rows: how many tokens' logits exist at a time.

    Shapes:
        hidden: (tokens, d). weight: (vocabulary, d). labels: (tokens,). Returns () and (tokens, d).

    Built in lesson 24.
    """
    counted = labels != IGNORED
    number = counted.sum()
    loss = at_least_float32(hidden.new_zeros(()))
    gradient = torch.empty_like(hidden)
    for start in range(0, len(hidden), rows):
        piece = slice(start, start + rows)
        logits = at_least_float32(F.linear(hidden[piece], weight, bias))  # (rows, vocabulary)
        places = labels[piece].where(counted[piece], 0)[:, None]
        total = logits.logsumexp(1)
        loss += (total - logits.gather(1, places)[:, 0]).where(counted[piece], 0).sum()
        # ∂loss/∂logits = softmax − one-hot, in the place of the logits.
        slope = logits.sub_(total[:, None]).exp_()
        slope.scatter_add_(1, places, torch.full_like(places, -1, dtype=slope.dtype))
        slope.mul_(counted[piece][:, None] / number)
        gradient[piece] = slope.to(weight.dtype) @ weight
    return loss / number, gradient


class _PiecewiseLoss(torch.autograd.Function):
    """``loss_and_gradient`` for autograd; the gradient of hidden is worked out in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int) -> Tensor:
        loss, gradient = loss_and_gradient(hidden, weight, labels, rows, bias)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None
