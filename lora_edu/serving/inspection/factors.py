"""What A and B are like, without a base: whole, finite, trained; how large the update is, of which rank. Lesson 11."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_edu.core.parts import PREFIX, TASK_HEADS
from lora_edu.lowrank import effective_rank, product_singular_values
from lora_edu.serving.inspection.findings import Finding, counted, some
from lora_edu.serving.inspection.formats import PEFT, Adapter, Factors


@dataclass
class Measured:
    """One adapted module in numbers; None where a number cannot be had.

    Attributes:
        norm: ‖s · B A‖, the Frobenius norm; with s = 1 where nothing says what the scale is.
        effective_rank: of B A; lesson 01.
        share: ‖s · B A‖ / ‖W‖, if the base's weights were there.
    """

    name: str
    rank: int | None
    in_features: int | None
    out_features: int | None
    scale: float | None
    norm: float | None = None
    effective_rank: float | None = None
    share: float | None = None


def measure(name: str, factors: Factors) -> Measured:
    """Norm and effective rank of one update."""
    A, B = factors.A, factors.B
    inputs = A.shape[1] if A is not None and A.ndim > 1 else None
    outputs = B.shape[0] if B is not None and B.ndim > 1 else None
    found = Measured(name, factors.rank, inputs, outputs, factors.scale)
    if A is None or B is None or not can_be_measured(A, B):
        return found
    values = product_singular_values(B.flatten(1).double(), A.flatten(1).double())
    found.norm = abs(1 if factors.scale is None else factors.scale) * values.norm().item()
    found.effective_rank = effective_rank(values) if values.any() else 0.0
    return found


def can_be_measured(A: Tensor, B: Tensor) -> bool:
    """Whether the two are finite matrices with a product, or kernels of convolutions, which are flattened to such."""
    if not all(factor.is_floating_point() and factor.ndim in (2, 4, 5) and factor.numel() for factor in (A, B)):
        return False
    return B[0].numel() == A.shape[0] and bool(torch.isfinite(A).all() and torch.isfinite(B).all())


def fit(A: Tensor, B: Tensor) -> bool:
    """Whether B A can be formed."""
    return min(A.ndim, B.ndim) > 1 and A.shape[0] == B.shape[1]


def check_factors(adapter: Adapter) -> Iterator[Finding]:
    """Everything that can be wrong with a file's tensors themselves."""
    yield from check_keys(adapter)
    modules = adapter.modules
    if alone := [name for name, factors in modules.items() if factors.A is None or factors.B is None]:
        yield Finding(
            "wrong", "half-a-pair", f"{counted(len(alone), 'module')} with only one of A and B: {some(alone)}.", "08",
            "The file is incomplete; save or fetch it again.", tuple(alone),
        )  # fmt: skip
    pairs = {name: factors for name, factors in modules.items() if name not in alone}
    if empty := [name for name, (A, B) in both_of(pairs).items() if not (A.numel() and B.numel())]:
        yield Finding(
            "wrong", "empty-factors", f"{counted(len(empty), 'module')} whose A or B is empty: {some(empty)}.", "08",
            "It was saved where the weights were not: under ZeRO-3 or FSDP gather them first.", tuple(empty),
        )  # fmt: skip
    pairs = {name: factors for name, factors in pairs.items() if name not in empty}
    if torn := [name for name, (A, B) in both_of(pairs).items() if not fit(A, B)]:
        shapes = [tuple(factor.shape) for factor in both_of(pairs)[torn[0]]]
        yield Finding(
            "wrong", "factors-do-not-fit",
            f"{counted(len(torn), 'module')} whose A and B cannot be multiplied: {some(torn)}. "
            f"In the first A is {shapes[0]} and B {shapes[1]}.",
            "03", "A is (r, in) and B is (out, r); tensors of two files may have been mixed.", tuple(torn),
        )  # fmt: skip
    yield from check_ranks(adapter)
    yield from check_values(adapter, pairs)
    yield from check_promises(adapter)


def both_of(modules: dict[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (A, B)} of the modules that have both."""
    return {name: (each.A, each.B) for name, each in modules.items() if each.A is not None and each.B is not None}


def check_keys(adapter: Adapter) -> Iterator[Finding]:
    """Keys that no program will find a place for, whatever the base."""
    if adapter.format != PEFT:
        return
    keys, modules = list(adapter.source.tensors), list(adapter.modules)
    if bare := [key for key in keys if not key.startswith("base_model.")]:
        yield Finding(
            "wrong", "no-prefix",
            f"{len(bare):,} of {counted(len(keys), 'key')} lack PEFT's prefix {PREFIX!r}, such as {bare[0]!r}: PEFT "
            "loads none of them, and says so in a warning only.", "08", "Rename them, or save with save_adapter.",
            tuple(bare),
        )  # fmt: skip
    if twice := [name for name in modules if name.startswith(PREFIX)]:
        yield Finding(
            "wrong", "wrapped-twice", f"Keys have PEFT's prefix twice, such as {PREFIX}{twice[0]}: the model was "
            "wrapped for a second adapter instead of loading it into the first wrapper.", "08",
            "Remove one prefix, and use load_adapter for a second adapter.", tuple(twice),
        )  # fmt: skip
    if compiled := [name for name in modules if "_orig_mod" in name or "_fsdp_wrapped_module" in name]:
        yield Finding(
            "wrong", "wrapper-in-names", f"Names hold what torch.compile or FSDP put there, such as {compiled[0]}: no "
            "plain model has them.", "08", "Save from the model inside the wrapper, or remove that part.",
            tuple(compiled),
        )  # fmt: skip
    if len(adapter.adapters) > 0:
        several = len(adapter.adapters) > 1
        yield Finding(
            "wrong", "two-adapters" if several else "adapter-in-names",
            f"The keys hold the name{'s' if several else ''} of {counted(len(adapter.adapters), 'adapter')}: "
            f"{some(adapter.adapters, 5)}. The file is a state_dict, where PEFT's files leave the name out"
            + (", and what is shown here is a mixture of both." if several else "."),
            "08", "Save each adapter with save_adapter(model, folder, adapter_name).", adapter.adapters,
        )  # fmt: skip


def check_ranks(adapter: Adapter) -> Iterator[Finding]:
    """Whether the file holds the ranks that its config promises."""
    config: Any = adapter.config
    if not hasattr(config, "rank_of"):
        return
    pairs = {name: (config.rank_of(name), factors.rank) for name, factors in adapter.modules.items()}
    if other := [name for name, (said, held) in pairs.items() if held not in (None, said)]:
        said, held = pairs[other[0]]
        yield Finding(
            "wrong", "rank-differs",
            f"{counted(len(other), 'module')} of another rank than the config says: {some(other)}. "
            f"The first has {held}, and r or rank_pattern says {said}. Loading refuses that.", "08",
            f"Set r or rank_pattern to {held}, and lora_alpha to what it was in training.", tuple(other),
        )  # fmt: skip


def check_values(adapter: Adapter, pairs: dict[str, Factors]) -> Iterator[Finding]:
    """Numbers that are none, and factors that are all zero."""
    both = both_of(pairs)
    if packed := [name for name, (A, B) in both.items() if not (A.is_floating_point() and B.is_floating_point())]:
        yield Finding(
            "wrong", "no-floats", f"{counted(len(packed), 'module')} whose A or B holds whole numbers: {some(packed)}.",
            "08", "Factors are floating-point; store them as float32 or bfloat16.", tuple(packed),
        )  # fmt: skip
    floats = {key: tensor for key, tensor in adapter.source.tensors.items() if tensor.is_floating_point()}
    if broken := [key for key, tensor in floats.items() if not torch.isfinite(tensor).all()]:
        yield Finding(
            "wrong", "not-finite", f"{counted(len(broken), 'tensor')} with NaN or infinity: {some(broken)}.", "11",
            "Training diverged: take an earlier checkpoint, or train again with a lower rate.", tuple(broken),
        )  # fmt: skip
    dead = [name for name, (A, B) in both.items() if not (A.any() and B.any())]
    if dead and len(dead) == len(pairs):
        yield Finding(
            "wrong", "never-trained", "In every module B (or A) is zero, so that B A is too: this adapter was never "
            "trained, or what was trained was not what was saved.", "03",
            "Look whether the loss fell, and save the model that was trained.", tuple(dead),
        )  # fmt: skip
    elif dead:
        yield Finding(
            "note", "dead-factors",
            f"In {len(dead):,} of {counted(len(pairs), 'module')} B (or A) is zero, so that they change nothing: "
            f"{some(dead)}.", "11",
            "If they were to train, no gradient reached them: call check_called(model, batch) first.", tuple(dead),
        )  # fmt: skip
    elif pairs:
        yield Finding("ok", "trained", "No factor is all zero.", "03")


def check_promises(adapter: Adapter) -> Iterator[Finding]:
    """What the config says that the file holds besides A and B, and what it holds unsaid."""
    config: Any = adapter.config
    if config is None:
        return
    lengths = [name for name, factors in adapter.modules.items() if factors.magnitude is not None]
    with_lengths = getattr(config, "use_dora", bool(lengths))
    if with_lengths and len(lengths) < len(adapter.modules):
        yield Finding(
            "wrong", "dora", f"use_dora is true, and {len(adapter.modules) - len(lengths)} modules have no magnitudes.",
            "08", "Set use_dora to false if it was plain LoRA.",
        )  # fmt: skip
    if lengths and not with_lengths:
        yield Finding(
            "wrong", "dora", f"{counted(len(lengths), 'module')} with DoRA's magnitudes, and use_dora is false: they "
            "are left out when it is loaded.", "08", "Set use_dora to true.", tuple(lengths),
        )  # fmt: skip
    heads = TASK_HEADS.get(config.task_type or "", ())  # PEFT names them all, and a model has one of them
    held = {saved: any(f".{saved}." in f".{key}" for key in adapter.others) for saved in config.modules_to_save or ()}
    for saved, there in held.items():
        if not there and not (saved in heads and any(held.get(head) for head in heads)):
            yield Finding(
                "wrong", "saved-module-missing", f"modules_to_save names {saved!r}, and the file holds no tensor of "
                "it: loaded, that module would be the base's, or random.", "08",
                "Save again from the model that was trained.",
            )  # fmt: skip
    kept = [key for key in adapter.others if not key.endswith(("base_layer.weight", ".bias"))]
    if kept and not config.modules_to_save:
        yield Finding(
            "note", "whole-tensors", f"{counted(len(kept), 'tensor')} beside the factors: {some(kept)}.", "08",
            names=tuple(kept),
        )  # fmt: skip
