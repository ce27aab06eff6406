"""LoRA+: another learning rate for B than for A. An optimizer, and no layer of its own; met in lesson 16.

Idea: A starts random and B at zero, so the two need not move at one speed. LoRA+ lets B move λ times as fast as A.
Formula: A ← A − η · step, B ← B − λ η · step, with λ = loraplus_lr_ratio, 16 for instance
Cost: none beside LoRA's. There is a second rate to choose, and under Adam, without clipping and weight decay, the same
training is plain LoRA's with lora_alpha times λ at the rate η: lesson 16 shows it to the last bit.
Merging: as LoRA's, since the trained layers are LoRA's.
Papers: [Hayou et al. 2024](https://arxiv.org/abs/2402.12354) argue that in wide layers one rate cannot suit both
factors, and report one to two percent better results and up to twice the speed. [Schulman et al.
2025](https://thinkingmachines.ai/blog/lora/) note that under Adam two of the four numbers, both rates, the scale and
the size of the start, are redundant, and train both factors at one rate.

PEFT's name: ``peft.optimizers.create_loraplus_optimizer``.
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import Place, register_entrant

RATIO = 16  # in PEFT's documentation, and of the entrant


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer] = AdamW,
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer for what trains, in which B's rate is ``loraplus_lr_ratio`` times A's. As PEFT's of this name.

    Four groups, in PEFT's order: A and whatever is no B; the factors of adapted embeddings; B, and vectors that are no
    bias; biases, and what normalisation layers train.

    Args:
        model: a model with an adapter.
        optimizer_cls: the class of the optimizer.
        lr: η_A, the rate of A, and of trained copies of whole modules, a new head for instance.
        loraplus_lr_ratio: η_B / η_A, the rate of B and of vectors. LoRA+ means a number above 1.
        loraplus_weight_decay: of all but the last group.
        loraplus_lr_embedding: the rate of both factors of an adapted embedding.
        kwargs: handed to ``optimizer_cls``.

    Raises:
        ValueError: if no ``lora_B`` trains in the model, or the ratio is not above 0.

    Source: Hayou et al. 2024. Met in lesson 16.
    """
    if not loraplus_lr_ratio > 0:
        raise ValueError(f"loraplus_lr_ratio={loraplus_lr_ratio}: expected η_B / η_A, a number above 0 such as {RATIO}")
    if loraplus_lr_ratio < 1:
        warnings.warn(
            f"loraplus_lr_ratio={loraplus_lr_ratio} lets A move faster than B, the reverse of LoRA+; for LoRA+ it is "
            f"η_B / η_A = {1 / loraplus_lr_ratio:g}",
            stacklevel=2,
        )
    groups: list[list[nn.Parameter]] = [[], [], [], []]
    trained, names = set(), []
    for owner_name, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in trained:
                trained.add(parameter)
                names.append(name)
                groups[_group(owner, f"{owner_name}.{name}", parameter)].append(parameter)
    if "lora_B" not in names:
        raise ValueError(
            f"no lora_B trains in this {type(model).__name__}: LoRA+ is for LoRA; inject a LoraConfig first, and make "
            "the optimizer after that"
        )
    fast, decay = lr * loraplus_lr_ratio, loraplus_weight_decay
    settings = [(lr, decay), (loraplus_lr_embedding, decay), (fast, decay), (fast, 0.0)]
    return optimizer_cls(
        [
            {"params": parameters, "lr": rate, "weight_decay": weight_decay}
            for parameters, (rate, weight_decay) in zip(groups, settings, strict=True)
        ],
        lr=lr,
        **kwargs,
    )


def _group(owner: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """Which of the four groups a parameter belongs to."""
    if isinstance(owner, AdapterLayer) and isinstance(owner.frozen, nn.Embedding):
        return 1
    if not name.endswith("lora_B") and parameter.ndim != 1:
        return 0
    return 3 if "bias" in name or isinstance(owner, nn.LayerNorm) else 2


def _config(place: Place) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=place.targets)


def _optimizer(model: nn.Module, rate: float) -> Optimizer:
    return create_loraplus_optimizer(model, AdamW, lr=rate, loraplus_lr_ratio=RATIO, weight_decay=0.0)


register_entrant(
    "lora-plus-r8",
    method="LoRA+",
    config=_config,
    optimizer=_optimizer,
    rates={  # η_A; B's is 16 times as large
        "tiny": (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
        "smollm2-135m": (2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
        "minilm": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    },
    card=__doc__,
)
