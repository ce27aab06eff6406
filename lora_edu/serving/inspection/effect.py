"""What the adapter does to a base whose weights are here: what merging loses, and whether the output changes at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_edu.core.adapter import AdapterLayer, adapter_layers, at_least_float32
from lora_edu.core.merging import disable_adapter
from lora_edu.core.peft_io import load_adapter
from lora_edu.lab.diagnose import tensors_in
from lora_edu.serving.inspection.factors import Measured
from lora_edu.serving.inspection.findings import Finding, sentence, some
from lora_edu.serving.inspection.formats import Adapter

PROMPT = "A politician is a person who"
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WORTH_SAYING = 0.9  # of the update along itself: what a merge keeps of the gain follows it (lesson 09)


@dataclass(frozen=True)
class MergeLoss:
    """What a merge in half precision does to an update D, over all layers as one long vector; D′ is what is written.

    Attributes:
        size: ‖D‖ / ‖W‖.
        error: ‖D′ − D‖ / ‖D‖.
        projection: ⟨D′, D⟩ / ⟨D, D⟩, the share of D that is left along D.
    """

    size: float
    error: float
    projection: float


@torch.no_grad()
def merge_loss(layers: Iterable[AdapterLayer], dtype: torch.dtype) -> MergeLoss:
    """Size, error and projection of a merge into weights of this type, rounded once, as ``merge`` does. Lesson 09.

    Raises:
        ValueError: if a method has no dense form, or every update or every weight is zero.
    """
    sums = [0.0] * 4
    for layer in layers:
        layer.check_mergeable()
        weight = at_least_float32(layer.weight.to(dtype))
        adapted = layer.adapted(weight, None if layer.bias is None else at_least_float32(layer.bias))[0]
        meant, written = adapted - weight, at_least_float32(adapted.to(dtype)) - weight
        products = (weight**2, meant**2, (written - meant) ** 2, written * meant)
        sums = [total + product.sum().item() for total, product in zip(sums, products, strict=True)]
    weight2, meant2, wrong2, along = sums
    if not meant2 or not weight2:
        raise ValueError("every update is zero, or every weight, so that a merge loses nothing that could be measured")
    return MergeLoss((meant2 / weight2) ** 0.5, (wrong2 / meant2) ** 0.5, along / meant2)


@dataclass(frozen=True)
class OutputChange:
    """What one forward pass on a fixed prompt says.

    Attributes:
        relative: ‖difference‖ / ‖output of the base‖.
        largest: the largest change of one number of the output.
        before, after: the likeliest next tokens, for a language model.
    """

    prompt: str
    relative: float
    largest: float
    before: str | None = None
    after: str | None = None


@torch.no_grad()
def output_change(model: nn.Module, tokenizer: Any, prompt: str = PROMPT) -> OutputChange:
    """Compare the model's output with the adapter on and off, on one prompt."""
    batch = dict(tokenizer(prompt, return_tensors="pt"))
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["input_ids"]
    with disable_adapter(model):
        base = next(tensors_in(model(**batch)))
    adapted = next(tensors_in(model(**batch)))
    words = [None, None]
    if (
        adapted.ndim == 3
        and adapted.shape[-1] == getattr(model.config, "vocab_size", None)
        and adapted.isfinite().all()
    ):
        words = [tokenizer.decode([int(output[0, -1].argmax())]) for output in (base, adapted)]
    difference = (adapted - base).float()
    return OutputChange(
        prompt, (difference.norm() / base.float().norm()).item(), difference.abs().max().item(), *words
    )  # fmt: skip


@dataclass
class Effect:
    """What was measured with the base's weights."""

    merging: dict[str, MergeLoss]
    output: OutputChange | None = None


def check_effect(
    adapter: Adapter, model: nn.Module, tokenizer: Any, modules: list[Measured], effect: Effect
) -> Iterator[Finding]:
    """Load the adapter into the base and look what it does; fills in ``effect`` and the modules' shares."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say is a finding already
        try:
            load_adapter(model, adapter.source.folder)
        except ValueError as error:
            yield Finding("wrong", "refused", f"load_adapter refuses it: {error}.", "08")
            return
        layers = adapter_layers(model)
        for measured in modules:
            if measured.norm is not None and measured.name in layers:
                length = at_least_float32(layers[measured.name].weight).norm().item()
                measured.share = measured.norm / length if length else None
        yield from check_merging(layers.values(), effect)
        yield from check_output(model, tokenizer, effect)


def check_merging(layers: Iterable[AdapterLayer], effect: Effect) -> Iterator[Finding]:
    """One sentence for each half precision."""
    layers = list(layers)
    if fixed := [type(layer).__name__ for layer in layers if not layer.mergeable]:
        yield Finding(
            "note", "not-mergeable", f"{some(sorted(set(fixed)))} has no dense form: it cannot be merged.", "09"
        )
        return
    for name, dtype in HALVES.items():
        try:
            loss = merge_loss(layers, dtype)
        except ValueError as error:
            yield Finding("note", "merging", sentence(error), "09")
            return
        if not all(map(torch.isfinite, torch.tensor([loss.size, loss.error, loss.projection]))):
            yield Finding(
                "note", "merging", f"Merged in {name}, some weights would be infinite or NaN.", "09",
                "Merge in bfloat16 or float32, or keep the adapter beside the weights.",
            )  # fmt: skip
            continue
        effect.merging[name] = loss
        said = (
            f"Merged in {name}, the update (size ‖D‖ / ‖W‖ = {loss.size:.2g}) is written with an error "
            f"of {loss.error:.1%} and a projection of {loss.projection:.1%}."
        )
        if loss.projection >= WORTH_SAYING:
            yield Finding("ok", "merging", said, "09")
        else:
            yield Finding("note", "merging", said, "09", "Merge in float32, or compare the losses before you ship it.")


def check_output(model: nn.Module, tokenizer: Any, effect: Effect) -> Iterator[Finding]:
    """Whether the output changes at all."""
    change = output_change(model, tokenizer)
    if not all(map(torch.isfinite, torch.tensor([change.relative, change.largest]))):
        yield Finding("wrong", "output", "With the adapter the output is not finite.", "11", "Look for NaN in it.")
        return
    effect.output = change
    if change.largest == 0:
        yield Finding(
            "wrong", "output", f"On {change.prompt!r} the output is the base's, bit for bit: the adapter does nothing.",
            "13", "Look for what is zero or has no place.",
        )  # fmt: skip
        return
    words = "" if change.before is None else f"; the next token is {change.before!r} before and {change.after!r} after"
    said = f"On {change.prompt!r} the output moves by {change.relative:.1%} of its length{words}."
    yield Finding("ok", "output", said, "13")
