"""How many parameters does LoRA train, of how many, and how large is the file? Built in lesson 05.

A weight that maps ``in`` features to ``out`` gets A (r, in) and B (out, r): r · (in + out) numbers. Everything here is
that sum, taken over the layers that PEFT would adapt, in a model built without weights (``lora_edu.counting.meta``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lora_edu.core.adapter import AdapterLayer, innermost
from lora_edu.core.config import LoraConfig
from lora_edu.core.experts import LeftOut, LeftOutWarning, experts_left_out
from lora_edu.core.inject import count_parameters, target_names
from lora_edu.core.layer import check_rank
from lora_edu.core.matching import CLASSIFIER_HEADS, expand_targets, named_places, warn_caller
from lora_edu.core.parts import TrainedCopy
from lora_edu.core.state import unwrapped_model
from lora_edu.counting.meta import meta_model


def lora_formula(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Σ r · (in + out) over ``(in, out)`` pairs: the LoRA parameters of a list of weights. Lesson 05.

    >>> lora_formula([(4096, 4096), (4096, 4096)] * 32, r=8)   # q_proj and v_proj of LLaMA-7B
    4194304
    """
    return sum(check_rank(r) * (inputs + outputs) for inputs, outputs in shapes)


def break_even_rank(d: int, k: int) -> float:
    """The rank at which A and B together are as large as the d×k weight: r (d + k) = d k.

    Below it LoRA holds fewer numbers than the weight; for d = k it is d / 2. Lesson 05.
    """
    return d * k / (d + k)


@dataclass(frozen=True)
class TargetRow:
    """All adapted layers that share a name ending and a shape. ``parameters`` is the sum over these layers."""

    target: str
    layers: int
    in_features: int
    out_features: int
    parameters: int


@dataclass(frozen=True)
class LoraCount:
    """What LoRA adds to a model, by target; ``print(report)`` shows it as a table. Made by ``lora_report``."""

    r: int
    rows: list[TargetRow]
    base_total: int
    left_out: LeftOut | None = None  # what the targets mean and LoRA here does not adapt

    @property
    def total(self) -> int:
        """LoRA parameters: the sum of the rows."""
        return sum(row.parameters for row in self.rows)

    @property
    def percent(self) -> float:
        """The percentage that PEFT prints: n / (N + n), where N counts the base without the adapter."""
        return 100 * self.total / (self.base_total + self.total)

    def __str__(self) -> str:
        head = ("target", "layers", "in → out", "parameters", "share")
        body = [
            (row.target, f"{row.layers:,}", f"{row.in_features:,} → {row.out_features:,}", f"{row.parameters:,}",
             f"{100 * row.parameters / self.total:.1f} %")
            for row in self.rows
        ]  # fmt: skip
        foot = ("total", f"{sum(row.layers for row in self.rows):,}", "", f"{self.total:,}", "")
        widths = [max(map(len, column)) for column in zip(head, *body, foot, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            return "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()

        share = f"base {self.base_total:,}; LoRA r={self.r} is {self.percent:.4f} % of base + LoRA"
        note = [] if self.left_out is None else [str(self.left_out)]
        return "\n".join([line(head), *map(line, body), line(foot), share, *note])


def lora_report(
    config_or_model: PretrainedConfig | nn.Module | str | Path,
    r: int,
    target_modules: str | Iterable[str] | None = None,
    *,
    exclude_modules: str | Iterable[str] | None = None,
    layers_to_transform: int | list[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    head: str | None = None,
    num_labels: int | None = None,
) -> LoraCount:
    """Count the parameters that LoRA of rank ``r`` adds to a model, target by target. Lesson 05.

    Args:
        config_or_model: a model, adapted or not, or anything that ``load_config`` takes.
        target_modules: as in ``LoraConfig``: name endings, a regular expression, ``"all-linear"``, or None for
            the family's defaults. Linear, Conv1D and Embedding layers can be adapted.
        exclude_modules, layers_to_transform, rank_pattern: as in ``LoraConfig``.
        head, num_labels: as in ``meta_model``. A classification head trains in full; the report leaves it out.

    Warns as ``inject`` does: about targets that fit nothing, and about experts that are no layers, which the printed
    report names too.

    Raises:
        ValueError: a rank below 1; no layer matches (the message lists near names); a match that LoRA cannot adapt.
    """
    classifies = head == "classification"
    config = LoraConfig(
        r=r,
        target_modules=target_modules,  # type: ignore[arg-type]
        exclude_modules=exclude_modules,  # type: ignore[arg-type]
        layers_to_transform=layers_to_transform,
        rank_pattern=dict(rank_pattern or {}),
        modules_to_save=CLASSIFIER_HEADS if classifies else None,
        task_type="SEQ_CLS" if classifies else None,
    )
    model = config_or_model
    if not isinstance(model, nn.Module):
        model = meta_model(model, head=head, num_labels=num_labels)
    shapes, left_out = adapted_shapes(model, config)
    rows: dict[tuple[str, int, int], list[int]] = {}
    for name, (rank, d_in, d_out) in shapes.items():
        row = rows.setdefault((name.rsplit(".", 1)[-1], d_in, d_out), [])
        row.append(lora_formula([(d_in, d_out)], rank))
    table = [TargetRow(target, len(found), d_in, d_out, sum(found)) for (target, d_in, d_out), found in rows.items()]
    return LoraCount(r, table, base_parameters(model), left_out)


def adapted_shapes(model: nn.Module, config: LoraConfig) -> tuple[dict[str, tuple[int, int, int]], LeftOut | None]:
    """{name: (rank, in, out)} of the layers that a config means, and what it means that is no layer. Warns of that."""
    model = unwrapped_model(model)
    modules = {name: module for name, _, _, module in named_places(model)}
    if config.target_modules is None:
        config.target_modules = expand_targets(None, model, modules)
    names = target_names(model, config, modules)
    left_out = experts_left_out(model, config, names)
    if left_out:
        warn_caller(str(left_out), LeftOutWarning)
    return {name: (config.rank_of(name), *layer_shape(name, innermost(modules[name]))) for name in names}, left_out


def lora_parameters(
    config_or_model: PretrainedConfig | nn.Module | str | Path,
    r: int,
    target_modules: str | Iterable[str] | None = None,
    **options: object,
) -> int:
    """The number of parameters that LoRA of rank ``r`` trains: ``lora_report(...).total``, same arguments. Lesson 05.

    >>> lora_parameters("llama-7b", 8, ["q_proj", "v_proj"])
    4194304
    """
    return lora_report(config_or_model, r, target_modules, **options).total  # type: ignore[arg-type]


def base_parameters(model: nn.Module) -> int:
    """All parameters of a model as it was before adapters came, tied weights once."""
    own = {id(parameter): parameter.numel() for parameter in _of_adapters(model)}  # layers may share some
    return count_parameters(model)[1] - sum(own.values())


def _of_adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, TrainedCopy):
            yield from module.copies.parameters()
        elif isinstance(module, AdapterLayer):
            yield from module.adapter_parameters()


def full_parameters(config_or_model: PretrainedConfig | nn.Module | str | Path, **options: object) -> int:
    """All parameters of a model (what full fine-tuning trains), tied weights once. Options as in ``meta_model``."""
    if not isinstance(config_or_model, nn.Module):
        config_or_model = meta_model(config_or_model, **options)  # type: ignore[arg-type]
    return count_parameters(config_or_model)[1]


def adapter_bytes(n: int, dtype: str | torch.dtype = torch.float32) -> int:
    """Bytes of ``n`` parameters stored in ``dtype`` (such as "bfloat16"), without the file's header. Lesson 05."""
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f'dtype={dtype!r}: expected a torch dtype or its name, such as "float32" or "bfloat16"')
    return n * found.itemsize


def format_bytes(size: float) -> str:
    """A size in both units: MB = 10⁶ bytes (disks, papers), MiB = 2²⁰ bytes (many programs, mostly as "MB")."""
    return f"{size / 10**6:,.2f} MB ({size / 2**20:,.2f} MiB)"


def layer_shape(name: str, module: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a layer that LoRA can adapt; transformers' Conv1D stores its weight as (in, out)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    raise ValueError(
        f"{name!r} is a {type(module).__name__}: LoRA adapts Linear, Conv1D and Embedding layers; "
        "name the layers inside it"
    )
