"""Does the file fit this base? Names, shapes, vocabulary, tied heads; the base needs no weights. Lessons 04, 08."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lora_edu.core.adapter import innermost
from lora_edu.core.inject import target_names
from lora_edu.core.matching import named_places
from lora_edu.core.parts import PREFIX, with_task_head
from lora_edu.core.vocabulary import check_rows, embeddings_of, tied_embeddings
from lora_edu.counting.parameters import layer_shape
from lora_edu.serving.inspection.findings import Finding, counted, sentence, some
from lora_edu.serving.inspection.formats import DIFFUSERS, KOHYA, PEFT, Adapter


def check_fit(adapter: Adapter, model: nn.Module, base: str) -> Iterator[Finding]:
    """Everything about an adapter that a base can contradict."""
    if adapter.format in (KOHYA, DIFFUSERS):
        yield Finding(
            "wrong", "other-world", f"This file is for an image model, and {base!r} is a model of transformers.", "08",
            "Leave --base out.",
        )  # fmt: skip
        return
    modules = {name: innermost(module) for name, _, _, module in named_places(model)}
    vocabulary = list(check_vocabulary(adapter, model))
    contradictions = [
        *check_names(adapter, modules),
        *vocabulary,
        *check_shapes(adapter, modules, list(embeddings_of(model)) if vocabulary else []),
        *check_whole_tensors(adapter, model, bool(vocabulary)),
        *check_targets(adapter, model, modules),
    ]
    yield from contradictions
    yield from check_base_name(adapter, base, bool(contradictions))
    yield from check_tied(adapter, model)
    if not contradictions and adapter.modules:
        yield Finding("ok", "fits", f"Every tensor has its place in {base!r}, and none is missing.", "08")


def check_names(adapter: Adapter, modules: dict[str, nn.Module]) -> Iterator[Finding]:
    """Modules in the file that the base does not have."""
    extra = [name for name in adapter.modules if name.removesuffix(".base_layer") not in modules]
    if not extra:
        return
    ending = next((own for own in modules if own.endswith(f".{extra[0]}")), None)
    ending = ending or next((own for own in modules if "." in own and extra[0].endswith(f".{own}")), None)
    hint = f" The base calls it {ending}." if ending else ""
    yield Finding(
        "wrong", "extra",
        f"{len(extra):,} of {counted(len(adapter.modules), 'adapted module')} match nothing in the base: "
        f"{some(extra)}.{hint}", "08", "Give the base that it was trained on, loaded with the same class.",
        tuple(extra),
    )  # fmt: skip


def check_vocabulary(adapter: Adapter, model: nn.Module) -> Iterator[Finding]:
    """Whether embedding or head have another number of rows."""
    if adapter.format != PEFT:
        return
    try:
        check_rows(adapter.source.tensors, model)
    except ValueError as error:
        yield Finding("wrong", "vocabulary", sentence(error), "08")


def check_shapes(adapter: Adapter, modules: dict[str, nn.Module], left_out: list[str]) -> Iterator[Finding]:
    """Factors that belong to a layer of another size; ``left_out`` are those of which something was said already."""
    wrong: dict[str, tuple[Any, Any]] = {}
    for name, factors in adapter.modules.items():
        if name not in modules or name in left_out or factors.A is None or factors.B is None:
            continue
        if min(factors.A.ndim, factors.B.ndim) < 2 or not factors.A.numel() or not factors.B.numel():
            continue  # no factors at all, which is another finding
        try:
            expected = layer_shape(name, modules[name])
        except ValueError:  # a kind of layer that LoRA here does not adapt: its shape is not known
            continue
        held = (factors.A.shape[-1], factors.B.shape[0])
        if held != expected:
            wrong[name] = held, expected
    if wrong:
        held, expected = next(iter(wrong.values()))
        names = tuple(wrong)
        yield Finding(
            "wrong", "wrong-base", f"{counted(len(wrong), 'module')} of another shape than the base's: "
            f"{some(names)}. The first was made for {held[0]:,} → {held[1]:,}, and the base has {expected[0]:,} → "
            f"{expected[1]:,}.", "08",
            "This is another base: look at base_model_name_or_path.", names,
        )  # fmt: skip


def check_whole_tensors(adapter: Adapter, model: nn.Module, rows_known: bool) -> Iterator[Finding]:
    """Trained copies and biases: whether the base has them, in this shape."""
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    layers = tuple(f"{key.rpartition('.')[0]}." for key in own)
    extra, wrong = [], []
    for key, tensor in adapter.others.items():
        if key.startswith("base_model."):  # of the model as a whole, such as VeRA's shared matrices
            continue
        for segment in ("base_layer.", "modules_to_save.", "original_module.", "default."):
            key = key.replace(f".{segment}", ".")
        if key not in own:
            if key.endswith(".weight") or not key.startswith(layers):  # else what another method adds to a layer
                extra.append(key)
        elif own[key].shape != tensor.shape and not rows_known:
            wrong.append(f"{key} {tuple(tensor.shape)} instead of {tuple(own[key].shape)}")
    if extra:
        yield Finding(
            "wrong", "extra", f"{counted(len(extra), 'whole tensor')} with no place in the base: {some(extra)}.", "08",
            "Give the base that it was trained on, loaded with the same class.", tuple(extra),
        )  # fmt: skip
    if wrong:
        yield Finding(
            "wrong", "wrong-base", f"{counted(len(wrong), 'whole tensor')} of another shape: {some(wrong)}.", "08",
            "This is another base, or its head has another number of labels.", tuple(wrong),
        )  # fmt: skip


def check_targets(adapter: Adapter, model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Finding]:
    """Layers that the config means and the file lacks, and layers in the file that the config does not mean."""
    if adapter.format != PEFT or adapter.config is None or not adapter.config.replaces_layers:
        return
    if (adapter.source.fields or {}).get("target_parameters"):  # PEFT's way to experts, which are no layers
        return
    config = with_task_head(copy.deepcopy(adapter.config), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a list of targets may serve several families
        try:
            meant = target_names(model, config, modules)
        except ValueError as error:
            yield Finding("wrong", "targets", sentence(error), "04")
            return
    missing = [name for name in meant if name not in adapter.modules]
    if missing and adapter.modules:
        yield Finding(
            "wrong", "missing", f"{len(missing):,} of {counted(len(meant), 'module')} that the config means are not in "
            f"the file: {some(missing)}. PEFT leaves these layers as they are in the base, with a warning only.", "08",
            "Correct target_modules, or save again from the model that was trained.", tuple(missing),
        )  # fmt: skip
    unmeant = [name for name in adapter.modules if name in modules and name not in meant]
    if unmeant:
        yield Finding(
            "wrong", "not-targeted", f"{counted(len(unmeant), 'module')} that target_modules does not mean: "
            f"{some(unmeant)}. PEFT would leave them out.", "04", "Correct target_modules.", tuple(unmeant),
        )  # fmt: skip


def check_base_name(adapter: Adapter, base: str, contradicted: bool) -> Iterator[Finding]:
    """The name of the base in the config against the one given."""
    fields = adapter.source.fields or {}
    declared = fields.get("base_model_name_or_path") or fields.get("model")
    if not isinstance(declared, str) or last_part(declared) == last_part(base):
        return
    said = f"The config names {declared!r} as its base, and {base!r} was given."
    if contradicted:
        yield Finding("wrong", "base-name", said, "08", f"Try --base {declared}.")
    else:
        advice = "If they are not the same model: another base of the same shape takes the file, and answers worse."
        yield Finding("note", "base-name", said, "08", advice)


def last_part(name: str) -> str:
    """What identifies a model in a hub id or a path."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def check_tied(adapter: Adapter, model: nn.Module) -> Iterator[Finding]:
    """An adapter on a head or an embedding that share one weight."""
    tied = [] if getattr(adapter.config, "ensure_weight_tying", False) else tied_embeddings(model)
    saved = tuple(getattr(adapter.config, "modules_to_save", None) or ())
    copied = [name for name in tied if saved and name.endswith(saved) and f"{name}.weight" in adapter.others]
    touched = [name for name in tied if name in adapter.modules or name in copied]
    if touched:
        yield Finding(
            "note", "tied-head", f"{' and '.join(tied)} share one weight in the base, and the adapter "
            f"{'holds a copy of' if copied else 'adapts'} {' and '.join(touched)}: merged, the two differ, and a "
            "program that writes into the shared weight or ties it again gives other answers.", "08",
            "Merge with merge_and_unload, which unties them and sets tie_word_embeddings=False.", tuple(touched),
        )  # fmt: skip


def saved_labels(tensors: dict[str, Tensor]) -> int | None:
    """The number of labels of a classification head that a file holds."""
    ends = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    return next((t.shape[0] for key, t in tensors.items() if key.removeprefix(PREFIX).endswith(ends)), None)
