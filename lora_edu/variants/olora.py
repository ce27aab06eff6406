"""OLoRA: start from the weight's own QR decomposition, with an orthonormal B. Card in the book.

Idea: As in PiSSA the adapter starts as a part of the weight, which it then trains. The part is read off a QR
decomposition, so that the columns of B are orthonormal. It is not the largest part: it holds the first r columns of the
weight, and what of the others lies in their span, so that another order of the inputs is another start.
Formula: W = Q R, with B₀ the first r columns of Q and A₀ the first r rows of R; y = (W − s · B₀ A₀) x + s · B A x
Cost: one QR decomposition of each weight before training, cheaper than a singular value decomposition. From then on as
PiSSA: LoRA's numbers train, and the start is kept and multiplied beside them.
Merging: exact up to one rounding: W + s · (B A − B₀ A₀) is a plain weight. A file is a plain LoRA of twice the rank.
Papers: [Büyükakyüz 2024](https://arxiv.org/abs/2406.01775) reports quicker convergence and better results than LoRA's
on a number of language tasks.

Switched on by ``LoraConfig(init_lora_weights="olora")``, as in PEFT, whose version takes the start out of the frozen
weight and cannot be called on GPT-2's ``Conv1D``. See ``shifted.py`` for what is done here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_edu.core.config import LoraConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.methods import register
from lora_edu.variants.shifted import as_plain_lora, shifted_builders


def olora_start(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A₀, the first r rows of R, and B₀, the first r columns of Q, of W = Q R.

    As in PEFT the scale is not divided out: the product that starts is s times B₀ A₀.

    Args:
        W: the weight, (out, in).
        r: the rank, at most min(out, in).
        s: the scale that the product will get.

    Returns:
        A₀ (r, in) and B₀ (out, r).

    Source: Büyükakyüz 2024. Card in the book.
    """
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


def _applies(config: Any) -> bool:
    return str(config.init_lora_weights).lower() == "olora" and not config.use_dora


register("OLoRA", LoraConfig, shifted_builders(lambda *about: olora_start), applies=_applies, file_fields=as_plain_lora)

register_entrant(
    "olora-r8",
    method="OLoRA",
    config=lambda place: LoraConfig(r=8, lora_alpha=16, target_modules=place.targets, init_lora_weights="olora"),
    rates={
        "tiny": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "smollm2-135m": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
        "minilm": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    },
    card=__doc__,
)
