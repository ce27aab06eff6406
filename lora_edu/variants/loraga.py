"""LoRA-GA: start A and B at singular directions of the gradient, so that the first step is full tuning's, nearly.

Idea: The first step of LoRA with a random A moves the weight in directions that have little to do with the gradient of
the full weight. LoRA-GA averages this gradient over a few batches, decomposes it, and starts A and B at its largest
singular directions: the first update of the product is then close to the best of its rank.
Formula: G = U S Vᵀ; with "ArB2r": A₀ = V[:, :r]ᵀ and B₀ = U[:, r:2r] S[r:2r] · out^¼ / √γ ("stable");
y = W x + s · (B A − B₀ A₀) x
Cost: a few forward and backward passes through the full weights before training, memory for the gradients of some
layers at a time, and one decomposition for each layer. Then LoRA's numbers train; the start is kept beside them, since
the base stays as it is: 2r · (in + out) numbers are stored and multiplied.
Merging: exact up to one rounding: W + s · (B A − B₀ A₀). A file is a plain LoRA of twice the rank.
Papers: [Wang et al. 2024](https://arxiv.org/abs/2407.05000) report convergence two to four times as fast as LoRA's,
with Llama-2-7B as quick as full fine-tuning's. [He et al. 2026](https://arxiv.org/abs/2601.22708), who compare LoRA's
variants in one code base, find that LoRA with proper settings, the learning rate above all, does as well as most of
them or better.

Switched on by ``LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(...))`` and
``inject(..., batches=[...])``; card in the book. As in PEFT, S stays in B, which the paper's formula has not: the
start's size follows the gradient's. PEFT takes out^¼ of a ``Conv1D`` from its number of inputs, which is right where it
is square; here it is that of the outputs. PEFT averages over calls of a layer, here over batches, which differs for a
layer that a model calls twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.methods import InjectionContext, register
from lora_edu.lowrank import truncated_svd
from lora_edu.variants.from_data import Batch, features, settings_in, weight_gradients
from lora_edu.variants.shifted import ShiftedConv1D, ShiftedLinear, Start, as_plain_lora, shifted_builder

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")
Decomposition = tuple[Tensor, Tensor, Tensor]  # U (out, 2r), S (2r,), Vh (2r, in)


@dataclass
class LoraGAConfig:
    """Settings of LoRA-GA. Names and defaults are PEFT's. Card in the book.

    Args:
        direction: which of the first 2r singular directions A and B get. ``"ArBr"``: A those at odd places, B those at
            even ones, counted from 0. ``"A2rBr"``: A the second half, B the first. ``"ArB2r"``: A the first half, B
            the second. ``"random"``: both the same r of them, drawn at random.
        scale: ``"stable"``: B times out^¼ / √stable_gamma. ``"weight_svd"``: B times the weight's largest singular
            value over the largest of B's. ``"gd_scale"``: both divided by s. ``"unit"``: as they are.
        stable_gamma: γ of ``"stable"``.

    Raises:
        ValueError: for a word that is none of these, or a stable_gamma that is not above zero.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction={self.direction!r}: expected one of {', '.join(DIRECTIONS)}")
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale!r}: expected one of {', '.join(SCALES)}")
        if not self.stable_gamma > 0:
            raise ValueError(f"stable_gamma={self.stable_gamma}: expected a number above 0, for example 16")


def lora_ga_start(
    W: Tensor, r: int, s: float, gradient: Decomposition, settings: LoraGAConfig
) -> tuple[Tensor, Tensor]:
    """A₀ (r, in) and B₀ (out, r) from the first 2r singular directions of the gradient.

    Args:
        W: the weight, (out, in).
        r, s: the rank, and the scale that the product will get.
        gradient: U (out, 2r), S (2r,) and Vh (2r, in).

    Source: Wang et al. 2024, in the form of PEFT's ``lora_ga_init``.
    """
    U, S, Vh = gradient
    places = torch.arange(2 * r)
    if settings.direction == "ArBr":
        for_A, for_B = places[1::2], places[0::2]
    elif settings.direction == "A2rBr":
        for_A, for_B = places[r:], places[:r]
    elif settings.direction == "ArB2r":
        for_A, for_B = places[:r], places[r:]
    else:
        for_A = for_B = torch.randperm(2 * r)[:r]
    A, B = Vh[for_A], U[:, for_B] * S[for_B]
    if settings.scale == "stable":
        return A, B * len(W) ** 0.25 / settings.stable_gamma**0.5
    if settings.scale == "weight_svd":
        largest = S[for_B][0]
        return A, B * torch.linalg.matrix_norm(W, 2) / largest if largest > 0 else B
    if settings.scale == "gd_scale":
        return A / s, B / s
    return A, B


def prepare(config: LoraConfig, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Decomposition]:
    """{layer: the first 2r singular directions of its mean gradient}.

    Raises:
        TypeError: if ``lora_ga_config`` is something else, or a batch is no dictionary.
        ValueError: if a layer has no 2r directions, or the batches do not do; see ``weight_gradients``.
    """
    settings_in(config, "lora_ga_config", LoraGAConfig)  # says so if it is something else
    for name, layer in config.targets.items():
        most, r = min(features(layer)), config.rank_of(name)
        if 2 * r > most:
            raise ValueError(
                f"r={r}: LoRA-GA takes 2r = {2 * r} singular directions, and the gradient of {name!r}, "
                f"{features(layer)} (in, out), has {most}; choose r ≤ {most // 2}, for this layer in rank_pattern"
            )
    gradients = weight_gradients(model, config.targets, batches)
    return {name: truncated_svd(gradient, 2 * config.rank_of(name)) for name, gradient in gradients}


def start_of(name: str, config: LoraConfig, context: InjectionContext) -> Start:
    """The start of one layer, from the gradient that ``prepare`` decomposed."""
    settings = settings_in(config, "lora_ga_config", LoraGAConfig)
    return partial(lora_ga_start, gradient=context.shared.pop(name), settings=settings)


def file_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The file's fields: a plain LoRA of twice the rank."""
    return as_plain_lora({name: value for name, value in fields.items() if name != "lora_ga_config"})


register(
    "LoRA-GA",
    LoraConfig,
    {layer.kind: shifted_builder(layer, start_of) for layer in (ShiftedLinear, ShiftedConv1D)},
    applies=lambda config: config.init_lora_weights == "lora_ga" and not config.use_dora,
    prepare=prepare,
    file_fields=file_fields,
)

register_entrant(
    "lora-ga-r8",
    method="LoRA-GA",
    config=lambda place: LoraConfig(r=8, lora_alpha=16, target_modules=place.targets, init_lora_weights="lora_ga"),
    rates={
        "tiny": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "smollm2-135m": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
        "minilm": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    },
    card=__doc__,
)
