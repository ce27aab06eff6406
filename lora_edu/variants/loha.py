"""LoHa: the update is the entrywise product of two low-rank matrices. Card in the book; lesson 17.

PEFT's name: ``LOHA``. Source: Hyeon-Woo et al. 2021 (https://arxiv.org/abs/2108.06098).

Idea: Two products of thin matrices are multiplied entry by entry. Each has rank r, and what comes out can have rank r²,
so that the numbers of a LoRA of rank 2r reach a rank far above it.
Formula: ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b), with w_a (out, r), w_b (r, in) and s = alpha / r
Cost: 2r · (in + out) numbers in each adapted layer, twice LoRA's of the same rank: rank 4 here has as many as LoRA of
rank 8. A step is that of a LoRA of rank r², whose factors are made anew from the small ones in each pass; where r² is
above the layer's smaller side, ΔW is formed instead.
Merging: exact up to one rounding: ΔW is a plain matrix.
Papers: [Hyeon-Woo et al. 2021](https://arxiv.org/abs/2108.06098) (FedPara) train whole models so and send them between
clients; they report the accuracy of the original model for 3 to 10 times less communication. [Yeh et al.
2023](https://arxiv.org/abs/2309.14859) (LyCORIS) make it an adapter for image models. In [PEFT's own
comparison](https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA), one run each on mathematics, it
stays behind LoRA and takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.entrants import register_entrant
from lora_edu.core.methods import InjectionContext, register
from lora_edu.variants.products import KINDS, ProductConfig, ProductLayer


class LoHaLayer(ProductLayer):
    """A frozen layer plus ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b).

    Its entry (o, i) is s · Σⱼₖ (w1_a[o, j] w2_a[o, k]) · (w1_b[j, i] w2_b[k, i]), a product of (out, r²) and (r², in):
    a LoRA of rank r² whose factors are tied. So ΔW is not formed where r² is at most min(in, out).

    Args:
        base, r, alpha, rank_dropout, module_dropout: as for ``ProductLayer``.
        init_weights: ``hada_w2_b`` starts at zero, and so the layer at the base; otherwise all at random, for tests.

    Shapes:
        ``hada_w1_a``, ``hada_w2_a``: (out, r). ``hada_w1_b``, ``hada_w2_b``: (r, in).

    Source: Hyeon-Woo et al. 2021; Yeh et al. 2023. Card in the book.
    """

    def product(self, x: Tensor) -> Tensor:
        if self.r**2 > min(self.in_features, self.out_features):
            return super().product(x)
        # 4096 → 4096 at r=8: (64, 4096) and (4096, 64) are made in each pass, instead of three matrices of 4096 · 4096.
        A = (self.hada_w1_b[:, None] * self.hada_w2_b).flatten(0, 1)  # (r², in)
        B = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)  # (out, r²)
        if isinstance(self.frozen, nn.Embedding):
            return F.linear(F.embedding(x, A.T), B) * self.scaling * getattr(self.frozen, "embed_scale", 1)
        return F.linear(F.linear(x.to(A.dtype), A), B) * self.scaling

    def delta_weight(self) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = map(at_least_float32, self.adapter_parameters())
        return self.scaling * (w1_a @ w1_b) * (w2_a @ w2_b)

    def __init__(self, base: nn.Module, r: int = 8, alpha: float = 8, init_weights: bool = True, **settings: Any):
        super().__init__(base, r, alpha, **settings)
        self.hada_w1_a = self.new_parameter(self.out_features, self.r)
        self.hada_w1_b = self.new_parameter(self.r, self.in_features)
        self.hada_w2_a = self.new_parameter(self.out_features, self.r)
        self.hada_w2_b = self.new_parameter(self.r, self.in_features)
        self.keys = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
        self.start(at_zero=["hada_w2_b"] if init_weights else [])


@dataclass
class LoHaConfig(ProductConfig):
    """Settings of LoHa. Names, defaults and meaning are PEFT's; see ``ProductConfig`` for the others.

    Args:
        init_weights: start at the base model.
    """

    peft_type: ClassVar[str] = "LOHA"

    init_weights: bool = True


def build(base: nn.Module, name: str, config: LoHaConfig, context: InjectionContext) -> AdapterLayer:
    """The adapted layer for the module called ``name``."""
    return LoHaLayer(base, init_weights=config.init_weights, **config.settings_of(name), **context.settings)


register("LoHa", LoHaConfig, dict.fromkeys(KINDS, build))

register_entrant(
    "loha-r4",
    method="LoHa",
    config=lambda place: LoHaConfig(r=4, alpha=8, target_modules=place.targets),
    rates={
        "tiny": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
        "smollm2-135m": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
        "minilm": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    },
    card=__doc__,
)
