"""EVA: start A at the directions in which a layer's inputs vary most, and share ranks out by them. Card in the book.

Idea: LoRA's A starts at random, and at first only the part of the input that falls into its r directions is seen. EVA
looks at a few batches and starts A at the directions in which what the layer reads varies most. Layers whose inputs
have many such directions get more ranks, others fewer.
Formula: A = the first r eigenvectors of Σ (x − x̄)(x − x̄)ᵀ, as rows, and B = 0; the ranks go to the Σ r directions that
explain the largest shares of their layers' variance, at most ρ · r to a layer
Cost: a few batches are read before training, and for each different input an in × in matrix is decomposed. Then it is
LoRA, with about as many numbers: where narrow layers gain ranks from wide ones it is fewer.
Merging: as LoRA's: W + s · B A.
Papers: [Paischer et al. 2024](https://arxiv.org/abs/2410.07170) report quicker convergence than that of other methods,
and the best average in each of language, vision and reinforcement learning. [He et al.
2026](https://arxiv.org/abs/2601.22708), who compare LoRA's variants in one code base, find that LoRA with proper
settings, the learning rate above all, does as well as most of them or better.

Switched on by ``LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...))`` and ``inject(..., batches=[...])``.
PEFT decomposes the same rows step by step and approximately; here their second moments are summed in float64 and
decomposed once (``from_data.py`` sums them), which gives the same directions without PEFT's error. Where several layers
read the same, PEFT's ``whiten`` divides their common directions once for each of them; here it divides once. The layer
is ``LoRALinear``, the file a plain LoRA with ``rank_pattern``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.layer import LoRAConv1D, LoRALinear
from lora_edu.core.lora_entrants import RATES
from lora_edu.core.methods import register
from lora_edu.variants.from_data import Batch, Moments, exactly, features, input_moments, settings_in, started_builder
from lora_edu.variants.qlora import QLoRALinear


@dataclass
class EvaConfig:
    """Settings of EVA. Names and defaults are PEFT's. Card in the book.

    Args:
        rho: a layer gets at most rho · r ranks; 1.0 leaves the ranks as they are.
        tau: PEFT stops reading batches once no direction turns any more (cosine above tau). Here each batch is read
            once and the directions are exact, so that it makes no difference.
        use_label_mask: leave positions out whose label is ``label_mask_value``.
        label_mask_value: the label of positions that are not trained on.
        whiten: divide each direction by √σ, the root of its singular value in the centred rows.
        adjust_scaling_factors: change lora_alpha together with a layer's rank, so that lora_alpha / r stays.

    Raises:
        ValueError: if rho is below 1, or tau is not in [0, 1].
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise ValueError(f"rho={self.rho}: expected at least 1.0, which leaves the ranks as they are")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau}: expected a cosine between 0 and 1, for example 0.99")


def principal_directions(moments: Moments, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The directions in which centred rows vary most, at most so many and none in which they do not vary.

    Returns:
        Directions (k, in) as rows of length 1, their singular values (k,), falling, and their shares of the variance.

    Source: Paischer et al. 2024.
    """
    values, vectors = torch.linalg.eigh(moments.scatter)  # rising; an eigenvector is a column
    values, directions = values.flip(0)[:most], vectors[:, -most:].T.flip(0)
    # Below this an eigenvalue is rounding. n centred rows vary in n − 1 directions at most.
    vary = int((values > 1e-12 * values[0]).sum()) if values[0] > 0 else 0
    k = min(vary, moments.rows - 1)
    values, directions = values[:k], directions[:k]
    # A direction's sign is arbitrary: as in PEFT, the entry that is largest in size becomes positive.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign(), values.sqrt(), values / moments.scatter.trace()


def share_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many ranks each layer gets: one for each of its directions among the ``budget`` that explain most.

    Among equals the earlier layer comes first.
    """
    all_shares = [(share, name) for name, values in shares.items() for share in values.tolist()]
    chosen = sorted(all_shares, key=lambda each: -each[0])[:budget]  # stable
    ranks = dict.fromkeys(shares, 0)
    for _, name in chosen:
        ranks[name] += 1
    return ranks


def prepare(config: LoraConfig, model: nn.Module, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (A, B)} to start from; ranks, alphas and targets of the config become those that EVA found.

    A layer that gets no rank is no target any more.

    Raises:
        TypeError: if ``eva_config`` is something else, or a batch is no dictionary.
        ValueError: if the batches do not do; see ``input_moments``.
    """
    settings = settings_in(config, "eva_config", EvaConfig)
    ignored = settings.label_mask_value if settings.use_label_mask else None
    asked = {name: config.rank_of(name) for name in config.targets}
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for names, moments in input_moments(model, config.targets, batches, ignored):
        most = round(settings.rho * max(asked[name] for name in names))
        together = principal_directions(moments, most)
        for name in names:
            possible = min(features(config.targets[name]))
            found[name] = together[0][:possible], together[1][:possible], together[2][:possible]
    found = {name: found[name] for name in config.targets}  # in the model's order
    budget = sum(asked.values())
    ranks = share_out({name: shares for name, (_, _, shares) in found.items()}, budget)
    check_ranks(ranks, budget)
    starts = {}
    for name, rank in ranks.items():
        if rank:
            directions, sigma, _ = found[name]
            A = directions[:rank] / sigma[:rank, None].sqrt() if settings.whiten else directions[:rank]
            starts[name] = A, torch.zeros(features(config.targets[name])[1], rank)
    alphas = {name: config.alpha_of(name) for name in ranks}
    if settings.adjust_scaling_factors:
        alphas = {name: alpha * ranks[name] / asked[name] for name, alpha in alphas.items()}
    if len(starts) < len(ranks):
        config.targets = {name: config.targets[name] for name in starts}
        config.target_modules = list(starts)
    config.rank_pattern = {exactly(name): ranks[name] for name in starts if ranks[name] != config.r}
    config.alpha_pattern = {exactly(name): alphas[name] for name in starts if alphas[name] != config.lora_alpha}
    return starts


def check_ranks(ranks: Mapping[str, int], budget: int) -> None:
    """Warn if the batches have fewer directions than ranks were asked for, and raise if they have none."""
    if not (given := sum(ranks.values())):
        raise ValueError(
            "the layers read the same numbers at every position that counts, so nothing varies that EVA could start "
            "from: pass batches with several tokens"
        )
    if given < budget:
        warnings.warn(
            f"the batches vary in {given} directions, and {budget} ranks were asked for: the layers have {given} ranks "
            "together; pass more batches for all of them",
            stacklevel=5,
        )


def file_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The file's fields: once it has started it is a plain LoRA."""
    return {name: value for name, value in fields.items() if name != "eva_config"} | {"init_lora_weights": True}


register(
    "EVA",
    LoraConfig,
    {layer.kind: started_builder(layer) for layer in (QLoRALinear, LoRALinear, LoRAConv1D)},
    applies=lambda config: config.init_lora_weights == "eva" and not config.use_dora,
    prepare=prepare,
    file_fields=file_fields,
)

register_entrant(
    "eva-r8",
    method="EVA",
    config=lambda place: LoraConfig(r=8, lora_alpha=16, target_modules=place.targets, init_lora_weights="eva"),
    rates=RATES | {"tiny": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)},
    card=__doc__,
)
