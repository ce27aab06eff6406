"""How much memory does training take, and what for? Built in lesson 06.

Each number of the model costs bytes for itself; each *trained* number costs more: its gradient, Adam's two moments, and
in mixed precision a float32 master copy. On top come activations (``lora_edu.counting.activations``). The recipes
below are the usual choices of precision. Sizes are in GB = 10⁹ bytes unless a name says GiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lora_edu.core.config import LoraConfig
from lora_edu.core.experts import LeftOut, LeftOutWarning, expert_parameters
from lora_edu.core.matching import output_head, warn_caller
from lora_edu.core.state import unwrapped_model
from lora_edu.counting.activations import INPUT_OF, Training, activation_bytes
from lora_edu.counting.meta import load_config, meta_model
from lora_edu.counting.parameters import adapted_shapes, base_parameters, lora_formula

NF4_BITS = 4 + 32 / 64  # a float32 scale for each block of 64 weights
NF4_DQ_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # that scale in 8 bits, and a float32 one for 256 of them


@dataclass(frozen=True)
class Recipe:
    """Bytes of one number. ``base_bits``: of a frozen weight in a linear layer, None if all weights train; frozen
    weights elsewhere take ``other`` bytes. The others: of one trained number."""

    method: str
    name: str
    base_bits: float | None
    other: int
    weight: int
    gradient: int
    moments: int
    master: int = 0

    @property
    def trained(self) -> int:
        """Bytes of everything that one trained number needs."""
        return self.weight + self.gradient + self.moments + self.master


RECIPES = [
    Recipe("full", "bf16", None, 2, weight=2, gradient=2, moments=4),
    Recipe("full", "fp32-moments", None, 2, weight=2, gradient=2, moments=8),
    Recipe("full", "mixed", None, 2, weight=2, gradient=2, moments=8, master=4),
    Recipe("full", "fp32", None, 4, weight=4, gradient=4, moments=8),
    Recipe("lora", "bf16", 16, 2, weight=2, gradient=2, moments=4),
    Recipe("lora", "fp32-adapter", 16, 2, weight=4, gradient=4, moments=8),  # what PEFT does with a bf16 base
    Recipe("lora", "fp32", 32, 4, weight=4, gradient=4, moments=8),
    Recipe("qlora", "nf4", NF4_BITS, 2, weight=4, gradient=4, moments=8),
    Recipe("qlora", "nf4-dq", NF4_DQ_BITS, 2, weight=4, gradient=4, moments=8),
]
PARTS = ["base", "adapter", "moments", "master", "gradients", "activations"]


def find_recipe(method: str, precision: str) -> Recipe:
    """The recipe with these names.

    Raises:
        ValueError: if there is none; the message lists those that exist.
    """
    found = [r for r in RECIPES if r.method == method and r.name == precision]
    if not found:
        known = "; ".join(f"{m}: {', '.join(names)}" for m, names in _names().items())
        raise ValueError(f"method={method!r}, precision={precision!r}: expected one of these: {known}")
    return found[0]


def _names() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for recipe in RECIPES:
        names.setdefault(recipe.method, []).append(recipe.name)
    return names


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one way of training needs, by part. ``activations`` is None where they were not asked for."""

    method: str
    precision: str
    trainable: int
    base: float
    adapter: float
    moments: float
    master: float
    gradients: float
    activations: float | None = None
    left_out: LeftOut | None = None  # what the targets mean and LoRA here does not adapt
    unquantised: str = ""  # why a base in four bits is larger than that, if it is

    @property
    def states(self) -> float:
        """All but activations: what the circulating tables count."""
        return self.base + self.adapter + self.moments + self.master + self.gradients

    @property
    def peak(self) -> float:
        """The highest point of a step: activations shrink while gradients grow, so the larger of the two counts.

        Assumes that gradients are freed after each step (``zero_grad(set_to_none=True)``) and that the optimizer
        works in place.
        """
        return self.states - self.gradients + max(self.gradients, self.activations or 0)

    def peak_parts(self) -> dict[str, float]:
        """What stands in memory at the peak, by part: all of ``PARTS`` but the smaller of gradients and activations."""
        left_out = "activations" if self.gradients >= (self.activations or 0) else "gradients"
        return {name: self.part(name) for name in PARTS if name != left_out}

    def part(self, name: str) -> float:
        """Bytes of one of ``PARTS``; 0 where there are none."""
        return getattr(self, name) or 0.0


@dataclass(frozen=True)
class MemoryTable:
    """Several estimates for one model; ``print(table)`` shows them in GB."""

    title: str
    rows: Sequence[MemoryEstimate]

    def __str__(self) -> str:
        with_activations = any(row.activations is not None for row in self.rows)
        parts = PARTS if with_activations else PARTS[:-1]
        head = ["method", "precision", "trains", *parts, "peak" if with_activations else "sum"]
        body = [
            [row.method, row.precision, f"{row.trainable:,}"]
            + [_gb(row.part(part)) for part in parts]
            + [_gb(row.peak if with_activations else row.states)]
            for row in self.rows
        ]
        sizes = [max(map(len, column)) for column in zip(head, *body, strict=True)]

        def line(cells: list[str]) -> str:
            return "  ".join([*map(str.ljust, cells[:2], sizes), *map(str.rjust, cells[2:], sizes[2:])]).rstrip()

        notes = [f"LoRA: {row.left_out}" for row in self.rows if row.left_out]
        notes += [f"four bits: {row.unquantised}" for row in self.rows if row.unquantised]
        return "\n".join([self.title, *map(line, [head, *body]), *dict.fromkeys(notes)])


def _gb(size: float) -> str:
    return "·" if size == 0 else f"{size / 1e9:.2f}" if size >= 5e6 else f"{size / 1e9:.4f}"


def training_memory(
    model: PretrainedConfig | nn.Module | str | Path,
    method: str = "lora",
    precision: str = "fp32-adapter",
    *,
    r: int = 8,
    target_modules: str | Iterable[str] | None = None,
    batch: int = 1,
    tokens: int = 512,
    checkpointing: bool = False,
    dropout: bool = False,
    loss_rows: int | None = None,
    activations: bool = True,
) -> MemoryEstimate:
    """Bytes that training takes, by part, from the model's config alone. Lesson 06.

    Args:
        model: a model, or anything that ``load_config`` takes.
        method, precision: a recipe; see ``RECIPES``.
        r, target_modules: of LoRA and QLoRA; None adapts the family's usual layers.
        batch, tokens, checkpointing, dropout, loss_rows: what decides about activations; see ``activation_bytes``.
        activations: whether to estimate them; Llama-shaped decoders only.

    Counts no library, no CUDA context (0.8 GB on the GPU of lesson 06) and nothing that an allocator holds in reserve.

    Raises:
        ValueError: for an unknown recipe, a rank or target that ``lora_report`` refuses, or activations of a model that
            is not Llama-shaped.
    """
    recipe = find_recipe(method, precision)
    config, built = _built(model)
    total = base_parameters(built)
    shapes: dict[str, tuple[int, int, int]] = {}
    left_out, unquantised = None, ""
    if recipe.base_bits is None:
        trainable, base = total, float(total * recipe.weight)
    else:
        if not isinstance(target_modules, str | None):
            target_modules = list(target_modules)
        shapes, left_out = adapted_shapes(built, LoraConfig(r=r, target_modules=target_modules))
        trainable = sum(lora_formula([(d_in, d_out)], rank) for rank, d_in, d_out in shapes.values())
        linear = _linear_weights(built)
        base = linear * recipe.base_bits / 8 + (total - linear) * recipe.other
        if method == "qlora" and (experts := sum(expert_parameters(built).values())):
            unquantised = _about_experts(experts, experts * recipe.other)
            warn_caller(unquantised, LeftOutWarning)
    kept = None
    if activations:
        blocks = None if recipe.base_bits is None else _blocks(config, shapes)
        adapter_bytes = recipe.weight if shapes else recipe.other
        training = Training(recipe.base_bits is None, {}, recipe.other, adapter_bytes, dropout)
        kept = activation_bytes(config, training, batch, tokens, checkpointing, blocks, loss_rows)
    return MemoryEstimate(
        method,
        precision,
        trainable,
        base=base,
        adapter=0 if recipe.base_bits is None else trainable * recipe.weight,
        moments=trainable * recipe.moments,
        master=trainable * recipe.master,
        gradients=trainable * recipe.gradient,
        activations=kept,
        left_out=left_out,
        unquantised=unquantised,
    )


def _about_experts(numbers: int, size: float) -> str:
    """Why a mixture of experts in four bits stays large."""
    return (
        f"{size / 1e9:.1f} GB of the base are {numbers:,} numbers in experts that are no linear layers in "
        "transformers 5; it has bitsandbytes pack linear layers only, and these stay in 16 bits"
    )


def _blocks(config: Any, shapes: Mapping[str, tuple[int, int, int]]) -> list[dict[str, int]]:
    """The ranks in each block that gradients pass: from the lowest adapted layer up."""
    blocks: list[dict[str, int]] = [{} for _ in range(config.num_hidden_layers)]
    lowest = len(blocks)
    for name, (rank, _, _) in shapes.items():
        ending, place = name.rsplit(".", 1)[-1], re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if ending in INPUT_OF and place:
            blocks[int(place[1])][ending] = rank
            lowest = min(lowest, int(place[1]))
        elif ending == "embed_tokens":
            lowest = 0
    return blocks[lowest:]


def _built(model: PretrainedConfig | nn.Module | str | Path) -> tuple[Any, nn.Module]:
    """A model's config, and the model; without weights where it has to be built."""
    if isinstance(model, nn.Module):
        model = unwrapped_model(model)
        return model.config, model
    config = load_config(model)
    return config, meta_model(config)


def _linear_weights(model: nn.Module) -> int:
    """Numbers in the weights of all linear layers but the output head: what bitsandbytes stores in four bits.

    It does so for exactly nn.Linear and Conv1D, not for classes derived from them: transformers' ``bitsandbytes.py``.
    """
    head = output_head(model)
    layers = [each for each in model.modules() if type(each) in (nn.Linear, Conv1D) and each is not head]
    return sum(layer.get_parameter("weight").numel() for layer in layers)


def memory_table(
    model: PretrainedConfig | nn.Module | str | Path, methods: Sequence[str] | None = None, **options: object
) -> MemoryTable:
    """``training_memory`` for every recipe of the ``methods`` ("full", "lora", "qlora"; default all). Lesson 06."""
    chosen = [recipe for recipe in RECIPES if methods is None or recipe.method in methods]
    if not chosen:
        raise ValueError(f"methods={methods!r}: expected some of {', '.join(_names())}")
    config, built = _built(model)
    rows = [training_memory(built, recipe.method, recipe.name, **options) for recipe in chosen]  # type: ignore[arg-type]
    name = model if isinstance(model, str | Path) else config.name_or_path or config.model_type
    return MemoryTable(f"{Path(name).name}: {base_parameters(built):,} parameters; sizes in GB = 10⁹ bytes", rows)
