"""SHiRA: a few fixed places of every weight train, and the rest stays as it was. A card in the book.

PEFT's name: ``SHIRA``. Source: Bhardwaj et al. 2024 (https://arxiv.org/abs/2406.13175). Lesson 17 trains one beside
LoRA.

Idea: LoRA keeps an update small by its rank. One may as well keep it small by its places: r · (in + out) entries of
the weight, as many numbers as LoRA has, chosen once, train, and the update may have full rank.
Formula: y = (W + S) x, where S is zero but at the chosen places
Cost: r · (in + out) numbers train in each adapted layer, and the file holds their places too. Here S is formed as a
dense matrix in each pass, and its gradient, too, so a step takes the memory of a second weight of W's size; sparse
kernels could save that, and nothing is lost once S is merged.
Merging: exact up to one rounding: W + S is a plain weight, of which few entries changed.
Papers: [Bhardwaj et al. 2024](https://arxiv.org/abs/2407.16712) report up to 2.7 % more than LoRA on commonsense
reasoning with one to two in a hundred weights trained, adapters that switch faster, and several that disturb each
other less. In PEFT's own [comparison](https://github.com/huggingface/peft/tree/main/method_comparison) on
mathematics, with one seed a method, SHiRA reaches 51.0 % and LoRA of rank 32 47.8 %, and both forget about as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, Pair, at_least_float32, innermost
from lora_edu.core.config import AdapterConfig
from lora_edu.core.entrants import register_entrant
from lora_edu.core.layer import check_rank
from lora_edu.core.matching import expand_targets
from lora_edu.core.methods import InjectionContext, register
from lora_edu.variants.vera import shape_of, without_phis_feedforward

MaskFunction = Callable[[nn.Module, int], Tensor]


def random_mask(layer: nn.Module, r: int, seed: int | None = None) -> Tensor:
    """r · (in + out) places of a layer's (out, in) weight at random: the mask that PEFT draws from this seed.

    Each layer draws anew from the same seed, so that layers of one shape train the same places. None is a seed too:
    the one that every new ``torch.Generator`` has.
    """
    outside, inside = shape_of(layer)
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    mask = torch.zeros(outside * inside, dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=generator)[: r * (inside + outside)]] = True
    return mask.view(outside, inside)


class ShiraLayer(AdapterLayer):
    """A frozen layer plus an update with few entries: y = x (W + S)ᵀ + b, S zero but where the mask is not.

    Args:
        base: the layer to adapt; its weight (out, in) and bias are frozen.
        mask: the places that train, (out, in), zeros and ones.
        init_weights: start at zeros, and so at the base model; otherwise at random, for tests.

    Shapes:
        x: (..., in) → (..., out). ``shira_weight``: (k,), one number for each of the k places, row by row.
        ``shira_indices``: (2, k), the row and the column of each.

    Source: Bhardwaj et al. 2024. Card in the book.
    """

    additive = True
    shira_indices: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self.update(x)).to(y.dtype) if self.applies_in_forward() else y

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the output for x, in the adapter's precision: x Sᵀ."""
        return F.linear(x.to(self.shira_weight.dtype), self.entries(self.shira_weight))

    def delta_weight(self) -> Tensor:
        """ΔW = S as a dense matrix, shape (out, in), at least float32."""
        return self.entries(at_least_float32(self.shira_weight))

    def entries(self, values: Tensor) -> Tensor:
        """An (out, in) matrix of zeros with these values at the places that train."""
        rows, columns = self.shira_indices
        return values.new_zeros(self.out_features, self.in_features).index_put((rows, columns), values)

    def __init__(self, base: nn.Module, mask: Tensor, init_weights: bool = True, **settings: Any):
        super().__init__(base, **settings)
        self.in_features, self.out_features = self.features()
        # int32 and row by row, as PEFT's files have them.
        indices = torch.stack(torch.where(mask)).to(self.weight.device, torch.int32)
        self.register_buffer("shira_indices", indices)
        self.shira_weight = self.new_parameter(indices.shape[1])
        if not init_weights:
            nn.init.normal_(self.shira_weight)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> Pair:
        return weight + self.oriented(self.delta_weight()), bias

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.shira_weight]

    def to_file(self) -> dict[str, Tensor]:
        return {"shira_weight": self.shira_weight, "shira_indices": self.shira_indices}

    def check_file(self, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError for a place outside the weight."""
        limits = torch.tensor([[self.out_features], [self.in_features]])
        indices = tensors["shira_indices"].cpu()
        if ((indices < 0) | (indices >= limits)).any():
            raise ValueError(f"shira_indices name places outside a weight of {self.out_features} × {self.in_features}")

    def reconfigure(self, config: Any, name: str) -> None:
        """Nothing is left to take over: another file's places came with its values, whatever seed they had."""

    def extra_repr(self) -> str:
        return f"adapter_name={self.adapter_name!r}, places={len(self.shira_weight)}, merged={self.merged}"


@dataclass
class ShiraConfig(AdapterConfig):
    """Settings of SHiRA. Names, defaults and meaning are PEFT's.

    Args:
        r: r · (in + out) places of each layer train, as many numbers as a LoRA of rank r has. It limits no rank.
        mask_type: ``"random"``, or a name of your own for what ``mask_fn`` chooses.
        random_seed: of the random places; None is the same seed each time.
        target_modules: as in ``LoraConfig``.
        init_weights: start at the base model.
        mask_fn: function (layer, r) → an (out, in) mask of zeros and r · (in + out) ones, instead of random places. It
            is in no file, as the places are. In PEFT it is set after the config is made.

    Raises:
        ValueError: for a rank below 1 or not whole, a seed that is not whole.
    """

    peft_type: ClassVar[str] = "SHIRA"
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern", "bias")

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True
    mask_fn: MaskFunction | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.r = check_rank(self.r)
        seed = self.random_seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise ValueError(f"random_seed={seed!r}: expected a whole number, or None for the usual places")

    def default_targets(self, model: nn.Module, modules: dict[str, nn.Module]) -> Sequence[str]:
        return without_phis_feedforward(model, expand_targets(None, model, modules))

    def to_file(self) -> dict[str, Any]:
        fields = super().to_file()
        del fields["mask_fn"]
        return fields

    @classmethod
    def from_file(cls, fields: Any) -> Any:
        config = super().from_file(fields)
        if config.mask_type != "random":  # whatever was chosen is in the file, and takes the place of these
            config.mask_fn = random_mask
        return config


def build(base: nn.Module, name: str, config: ShiraConfig, context: InjectionContext) -> AdapterLayer:
    """The adapted layer for the module called ``name``, with its places chosen."""
    layer = innermost(base)
    outside, inside = shape = shape_of(layer)
    if (wanted := config.r * (inside + outside)) > inside * outside:
        raise ValueError(
            f"r={config.r}: r · (in + out) = {wanted:,} places of {name!r}, whose weight has {inside * outside:,}; "
            f"r can be at most {inside * outside // (inside + outside)} there"
        )
    if config.mask_fn is not None:
        mask = config.mask_fn(layer, config.r)
    elif config.mask_type == "random":
        mask = random_mask(layer, config.r, config.random_seed)
    else:
        raise ValueError(f"mask_type={config.mask_type!r}: expected 'random', or a mask_fn that chooses the places")
    if mask.shape != shape or not ((mask == 0) | (mask == 1)).all() or mask.sum() != wanted:
        raise ValueError(
            f"mask_fn gave {name!r} a mask of shape {tuple(mask.shape)} with the sum {mask.sum()}; expected "
            f"{tuple(shape)} (out, in), zeros and r · (in + out) = {wanted} ones"
        )
    return ShiraLayer(base, mask, config.init_weights, **context.settings)


register("SHiRA", ShiraConfig, {nn.Linear: build, Conv1D: build})

register_entrant(
    "shira-r8",
    method="SHiRA",
    config=lambda place: ShiraConfig(r=8, target_modules=place.targets),
    rates={
        "tiny": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "smollm2-135m": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "minilm": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    },
    card=__doc__,
)
