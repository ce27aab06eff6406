"""LoKr: the update is the Kronecker product of two small matrices. Card in the book; lesson 17.

PEFT's name: ``LOKR``. Source: Yeh et al. 2023 (https://arxiv.org/abs/2309.14859).

Idea: A small matrix is repeated, each time multiplied by an entry of another one. The ranks of the two multiply, so
that very few numbers can reach full rank, in a pattern that repeats.
Formula: ΔW = s · w1 ⊗ w2, with w1 (a, c), w2 (b, d), out = a · b, in = c · d and s = alpha / r; w2 is itself a product
w2_a w2_b of rank r where r is below half of its longer side
Cost: for a square layer of n · n and r = 8 about n + 16·√n numbers, or 2n where √n is at most 16. The product is never
formed: x is read as a (c, d) matrix X, and the update is w1 X w2ᵀ.
Merging: exact up to one rounding: ΔW is a plain matrix.
Papers: [Yeh et al. 2023](https://arxiv.org/abs/2309.14859) (LyCORIS) compare it with LoRA and LoHa on image models.
[Edalati et al. 2022](https://arxiv.org/abs/2212.10650) (KronA) do the same with text models, and report better results
on GLUE than LoRA's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edu.core.adapter import AdapterLayer, at_least_float32
from lora_edu.core.entrants import register_entrant
from lora_edu.core.methods import InjectionContext, register
from lora_edu.variants.products import KINDS, ProductConfig, ProductLayer


class LoKrLayer(ProductLayer):
    """A frozen layer plus ΔW = s · w1 ⊗ w2.

    Args:
        base, r, alpha, rank_dropout, module_dropout: as for ``ProductLayer``. w2 is a product of rank r if r is below
            half of its longer side. Where no matrix is one, r makes a difference to the scale alone.
        decompose_both: make w1 a product of rank r too, by the same rule.
        decompose_factor: the sizes of w1, which should divide out and in; -1: near their square roots.
        rank_dropout_scale: make up for dropped outputs by larger ones.
        init_weights: True: w1 starts at zero, or w1_a. ``"lycoris"``: w2 does, or w2_b. False: none, for tests.

    Shapes:
        ``lokr_w1``: (a, c), or ``lokr_w1_a`` (a, r) and ``lokr_w1_b`` (r, c); ``lokr_w2``: (b, d), or ``lokr_w2_a``
        (b, r) and ``lokr_w2_b`` (r, d); out = a · b and in = c · d.

    Source: Yeh et al. 2023; LyCORIS. Card in the book.
    """

    def product(self, x: Tensor) -> Tensor:
        c, d = self.in_sizes
        if isinstance(self.frozen, nn.Embedding):
            # Row j·d + l of the table is column j of w1 times column l of w2.
            w1, w2 = self.whole(self.left), self.whole(self.right)
            y = F.embedding(x // d, w1.T)[..., :, None] * F.embedding(x % d, w2.T)[..., None, :]  # (..., a, b)
            return y.flatten(-2) * self.scaling * getattr(self.frozen, "embed_scale", 1)
        X = x.to(self.adapter_dtype).unflatten(-1, (c, d))
        for key in reversed(self.right):  # (..., c, d) → (..., c, b), through r where w2 is a product
            X = F.linear(X, getattr(self, key))
        X = X.mT
        for key in reversed(self.left):  # (..., b, c) → (..., b, a)
            X = F.linear(X, getattr(self, key))
        return X.mT.flatten(-2) * self.scaling

    def delta_weight(self) -> Tensor:
        return self.scaling * torch.kron(self.whole(self.left), self.whole(self.right))

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        alpha: float = 8,
        decompose_both: bool = False,
        decompose_factor: int = -1,
        rank_dropout_scale: bool = False,
        init_weights: bool | str = True,
        **settings: Any,
    ):
        super().__init__(base, r, alpha, **settings)
        self.rank_dropout_scale = rank_dropout_scale
        a, b = factorization(self.out_features, decompose_factor)
        c, d = self.in_sizes = factorization(self.in_features, decompose_factor)
        self.left = self.new_matrix("lokr_w1", a, c, whole=not decompose_both or self.r >= max(a, c) / 2)
        self.right = self.new_matrix("lokr_w2", b, d, whole=self.r >= max(b, d) / 2)
        self.keys = [*self.left, *self.right]
        self.start(at_zero(init_weights))

    def new_matrix(self, name: str, rows: int, columns: int, whole: bool) -> list[str]:
        """Make one matrix, or the two of which it is the product; returns their names."""
        shapes = {f"{name}_a": (rows, self.r), f"{name}_b": (self.r, columns)}
        if whole:
            shapes = {name: (rows, columns)}
        for key, shape in shapes.items():
            setattr(self, key, self.new_parameter(*shape))
        return list(shapes)

    def whole(self, names: Sequence[str]) -> Tensor:
        """The product of these matrices, at least float32."""
        return reduce(torch.matmul, [at_least_float32(getattr(self, name)) for name in names])

    def reconfigure(self, config: Any, name: str) -> None:
        super().reconfigure(config, name)
        self.rank_dropout_scale = config.rank_dropout_scale


def at_zero(init_weights: bool | str) -> list[str]:
    """The names that w1 or w2 may have, whole or as a product, and that stay at zero."""
    names = {True: ["lokr_w1", "lokr_w1_a"], "lycoris": ["lokr_w2", "lokr_w2_b"], False: []}
    if init_weights not in names:
        raise ValueError(f"init_weights={init_weights!r}: expected True, False or 'lycoris'")
    return names[init_weights]


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers with this product: the factor first if it divides, else the largest divisor below it.

    The first is then at most the square root, as with factor = -1, which means no limit but that.

    >>> factorization(128), factorization(128, 4), factorization(128, 5), factorization(127)
    ((8, 16), (4, 32), (4, 32), (1, 127))

    Raises:
        ValueError: if the factor is neither -1 nor a whole number of at least 1.

    Source: LyCORIS, and PEFT after it.
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
        raise ValueError(
            f"decompose_factor={factor!r}: expected a whole number of at least 1, or -1 for sizes near the square root"
        )
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    root = math.isqrt(dimension)
    limit = root if factor == -1 else min(factor, root)
    first = max(number for number in range(1, limit + 1) if dimension % number == 0)
    return first, dimension // first


@dataclass
class LoKrConfig(ProductConfig):
    """Settings of LoKr. Names, defaults and meaning are PEFT's; see ``ProductConfig`` for the others.

    Args:
        decompose_both, decompose_factor, rank_dropout_scale, init_weights: see ``LoKrLayer``.

    Raises:
        ValueError: for a factor that is neither -1 nor at least 1, or another word for ``init_weights``.
    """

    peft_type: ClassVar[str] = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        factorization(1, self.decompose_factor)
        at_zero(self.init_weights)
        super().__post_init__()


def build(base: nn.Module, name: str, config: LoKrConfig, context: InjectionContext) -> AdapterLayer:
    """The adapted layer for the module called ``name``."""
    return LoKrLayer(
        base,
        decompose_both=config.decompose_both,
        decompose_factor=config.decompose_factor,
        rank_dropout_scale=config.rank_dropout_scale,
        init_weights=config.init_weights,
        **config.settings_of(name),
        **context.settings,
    )


register("LoKr", LoKrConfig, dict.fromkeys(KINDS, build))

register_entrant(
    "lokr-r8",
    method="LoKr",
    config=lambda place: LoKrConfig(r=8, alpha=16, target_modules=place.targets),
    rates={
        "tiny": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
        "smollm2-135m": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
        "minilm": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    },
    card=__doc__,
)
