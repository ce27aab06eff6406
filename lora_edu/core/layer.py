"""The LoRA layer: a frozen weight W plus a trainable rank-r update s·BA. Built in lesson 03.

Plain LoRA for the three kinds of layer that hold a weight matrix: ``LoRALinear``, ``LoRAConv1D`` (GPT-2) and
``LoRAEmbedding``. What every adapted layer can do besides, such as merging, is in ``adapter.py``.
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, Pair, at_least_float32, innermost

Factors = tuple[Tensor, Tensor, float, float]  # A, B, s, and the probability of dropout
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PRODUCTS = (nn.Linear.forward, Conv1D.forward)


class LoRALinear(AdapterLayer):
    """A frozen linear layer plus a trainable rank-r update: y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ.

    Args:
        base: the layer to adapt; its weight (out, in) and bias are frozen, not copied.
        r: rank of the update, at least 1 (above min(in, out) it warns: nothing is gained).
        lora_alpha: the update is scaled by s = lora_alpha / r (lora_alpha / √r with ``use_rslora``).
        lora_dropout: probability of zeroing an entry of x on its way into A, in training only.
        use_rslora: scale by lora_alpha / √r (Kalajdzievski 2023).
        init_lora_weights: True: A uniform, B zero. ``"gaussian"``: A normal with standard deviation 1/r, B zero.
            False: both random, so that the layer starts away from the base; for tests.

    Shapes:
        x: (..., in) → (..., out). ``lora_A``: (r, in). ``lora_B``: (out, r).

    Raises:
        TypeError: if the base is no ``nn.Linear``, or its weight is packed into integers.
        ValueError: if r is not a whole number of at least 1, or lora_dropout is not in [0, 1].

    Source: Hu et al. 2021, eq. 3. Built in lesson 03.
    """

    additive = True
    kind: type[nn.Module] = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self.update(x)).to(y.dtype) if self.applies_in_forward() else y

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the output for x, in the adapter's precision: s · (dropout(x) Aᵀ) Bᵀ."""
        # x (..., in) → h (..., r) → update (..., out): the product BA is never formed.
        h = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)
        return F.linear(h, self.lora_B) * self.scaling

    def delta_weight(self) -> Tensor:
        """ΔW = s · B A, shape (out, in), at least float32."""
        return self.scaling * (at_least_float32(self.lora_B) @ at_least_float32(self.lora_A))

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ):
        r = check_rank(r)
        check_dropout(lora_dropout)
        check_alpha(lora_alpha)
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights={init_lora_weights!r}: expected True, False or 'gaussian'")
        pretrained = innermost(base)
        if not isinstance(pretrained, self.kind):
            raise TypeError(
                f"{type(self).__name__} adapts a {self.kind.__name__}, not a {type(pretrained).__name__}; "
                "to adapt layers inside a model call inject(model, LoraConfig(target_modules=[...]))"
            )
        super().__init__(base, adapter_name, autocast_adapter_dtype)
        self.in_features, self.out_features = self.features()
        if r > min(self.in_features, self.out_features):
            warnings.warn(
                f"r={r} is above min(in, out) = {min(self.in_features, self.out_features)}: no update of this layer "
                "can have a higher rank, so the extra parameters gain nothing",
                stacklevel=2,
            )
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = scale_of(lora_alpha, r, use_rslora)
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        # 4096 → 4096 at r=8: A is (8, 4096), B is (4096, 8): 65,536 numbers instead of 16,777,216.
        self.lora_A = self.new_parameter(r, self.in_features)
        self.lora_B = self.new_parameter(self.out_features, r)
        self.reset_lora_parameters(init_lora_weights)
        self.train(base.training)

    def reset_lora_parameters(self, init_lora_weights: bool | str) -> None:
        """Fresh A and B. B stays zero, so that training starts at the base model; A not too, or no gradient flows."""
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within ±1/√in, as nn.Linear starts
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def adapted(self, weight: Tensor, bias: Tensor | None) -> Pair:
        return weight + self.oriented(self.delta_weight()), bias

    def factors(self) -> Factors:
        """The layer as base(x) + s · B (A · drop(x)): A (r, in), B (out, r), s, and the dropout in effect now."""
        dropout_p = self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0
        return self.lora_A, self.lora_B, self.scaling, dropout_p

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.lora_A, self.lora_B]

    def to_file(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def reconfigure(self, config: Any, name: str) -> None:
        """Take over the scale: a file with another lora_alpha needs another one."""
        self.lora_alpha, self.use_rslora = config.alpha_of(name), config.use_rslora
        self.scaling = scale_of(self.lora_alpha, self.r, self.use_rslora)

    def extra_repr(self) -> str:
        return f"adapter_name={self.adapter_name!r}, r={self.r}, lora_alpha={self.lora_alpha}, merged={self.merged}"


class LoRAConv1D(LoRALinear):
    """LoRA for transformers' ``Conv1D``, GPT-2's linear layer, whose weight is stored as (in, out).

    A is (r, in) and B is (out, r) as everywhere; only ΔW is transposed to fit the weight. Built in lesson 03.
    """

    kind = Conv1D


class LoRAEmbedding(LoRALinear):
    """LoRA for ``nn.Embedding``: row x of the table becomes W[x] + s · B A[:, x]. No dropout, as in PEFT.

    Shapes:
        x: (...) whole numbers → (..., dim). The table is (rows, dim), ``lora_A`` (r, rows), ``lora_B`` (dim, r).

    Here A starts at zero and B is normal: only the columns of A whose tokens occur get a gradient.
    Source: loralib and PEFT. Built in lesson 03.
    """

    kind = nn.Embedding
    factors = None  # type: ignore[assignment]  # rows are looked up, not multiplied

    def reset_lora_parameters(self, init_lora_weights: bool | str) -> None:
        nn.init.normal_(self.lora_B)
        if init_lora_weights is False:
            nn.init.normal_(self.lora_A)

    def update(self, x: Tensor) -> Tensor:
        table = self.frozen
        h = F.embedding(x, self.lora_A.T, table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq)
        # Gemma's embedding multiplies its rows by embed_scale after the look-up.
        return F.linear(h, self.lora_B) * self.scaling * getattr(table, "embed_scale", 1)

    def to_file(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}


def is_plain_product(layer: nn.Module) -> bool:
    """Whether calling this layer gives x Wᵀ + b and does nothing else: it has no forward of its own, and no hooks."""
    return type(layer).forward in PRODUCTS and not any(getattr(layer, hooks) for hooks in HOOKS)


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """s: lora_alpha / r, or lora_alpha / √r (Kalajdzievski 2023)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_rank(r: Any) -> int:
    """Return ``r`` as an int if it is a whole number of at least 1; raise ValueError otherwise."""
    if isinstance(r, bool) or not isinstance(r, Integral):
        raise ValueError(f"r={r!r}: the rank must be a whole number of at least 1, for example 8")
    if r < 1:
        raise ValueError(f"r={r}: the rank must be at least 1; leave the layer out of target_modules to adapt nothing")
    return int(r)


def check_dropout(lora_dropout: float) -> None:
    """Raise unless lora_dropout is a probability."""
    if not isinstance(lora_dropout, int | float) or not 0 <= lora_dropout <= 1:
        raise ValueError(f"lora_dropout={lora_dropout!r}: expected a probability between 0 and 1, for example 0.05")


def check_alpha(alpha: float, name: str = "lora_alpha") -> None:
    """Raise unless alpha, which the message calls ``name``, is a finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise ValueError(f"{name}={alpha!r}: expected a finite number, for example 16")
