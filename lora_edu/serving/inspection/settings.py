"""What ``adapter_config.json`` says: the method, the ranks, and the scale as it acts. Lessons 03 and 08."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lora_edu.core.config import INITS_THAT_KEEP_THE_BASE
from lora_edu.core.layer import scale_of
from lora_edu.core.methods import method_of
from lora_edu.core.peft_io import config_types
from lora_edu.serving.inspection.findings import Finding, counted, some
from lora_edu.serving.inspection.formats import DIFFUSERS, KOHYA, MLX, PEFT, Adapter


def check_settings(adapter: Adapter) -> Iterator[Finding]:
    """Say whose file it is and what it asks for; fills in the config and the scales."""
    found = {PEFT: peft_settings, KOHYA: image_settings, DIFFUSERS: image_settings, MLX: mlx_settings}
    if adapter.format in found:
        yield from found[adapter.format](adapter)
    elif adapter.source.tensors:
        keys = list(adapter.source.tensors)
        yield Finding(
            "wrong", "no-adapter", f"No tensor of the file is a factor of LoRA: {some(keys)}.", "08",
            "Was a whole model saved, or a checkpoint of a trainer? save_adapter(model, folder) writes the adapter.",
        )  # fmt: skip
    if adapter.modules:
        yield from scales(adapter)


def peft_settings(adapter: Adapter) -> Iterator[Finding]:
    """Whether the config is there, can be read and served, and what it leaves unsaid."""
    fields = adapter.source.fields
    if fields is None:
        if not any(finding.code == "config" for finding in adapter.source.findings):
            yield Finding(
                "wrong", "no-config", "There is no adapter_config.json, so that nothing says which scale acts.", "08",
                "Copy it from where the adapter was saved; norms below are those of B A, without a scale.",
            )  # fmt: skip
        return
    if (kind := fields.get("peft_type")) is None:
        yield Finding(
            "wrong", "config", "adapter_config.json names no peft_type, so that no program knows the method.", "08",
            "Add \"peft_type\": \"LORA\" if that is what it is.",
        )  # fmt: skip
        return
    if (config_type := config_types().get(str(kind))) is None:
        yield Finding(
            "note", "kind", f"An adapter of the type {kind} in PEFT's format; its scale is not known here.", "08"
        )
        yield Finding("note", "unsupported", f"lora_edu has no method of the type {kind}.", "08", "Load it with PEFT.")
        return
    own = {each.name for each in dataclasses.fields(config_type) if each.init}
    config: Any
    try:
        config = config_type.from_file({name: value for name, value in fields.items() if name in own and value != []})
        check_types(config)
    except (TypeError, ValueError) as error:
        yield Finding("wrong", "config", f"adapter_config.json: {error}.", "08", "Write the field as PEFT has it.")
        return
    adapter.config = config
    if hasattr(config, "use_rslora"):
        for name, factors in adapter.modules.items():
            factors.scale = scale_of(config.alpha_of(name), config.rank_of(name), config.use_rslora)
    try:
        name = method_of(config_type.from_file(fields)).name
        yield Finding("ok", "kind", f"An adapter of the method {name}, in PEFT's format.", "08")
    except (TypeError, ValueError) as error:
        yield Finding("ok", "kind", f"An adapter of the type {kind}, in PEFT's format.", "08")
        yield Finding("note", "unsupported", f"lora_edu cannot load it: {error}.", "08", "Load it with PEFT.")
    if not fields.get("base_model_name_or_path"):
        yield Finding(
            "note", "no-base-name", "The config does not name its base.", "08", "Write it into the model card."
        )
    if hasattr(config, "use_rslora"):
        yield from start_and_alpha(config)


def check_types(config: Any) -> None:
    """Raise for values of a kind that no program can use, where the config's own checks let them pass."""
    if not isinstance(config.task_type, str | None):
        raise TypeError(f"task_type={config.task_type!r}: expected a word such as 'CAUSAL_LM', or null")
    for name in ("modules_to_save", "exclude_modules"):
        value = getattr(config, name)
        if not isinstance(value, str | list | None) or not all(isinstance(each, str) for each in value or ()):
            raise TypeError(f"{name}={value!r}: expected a list of names, or null")


def start_and_alpha(config: Any) -> Iterator[Finding]:
    """A start that is not told by the file alone, and an alpha that was left at its default."""
    start = config.init_lora_weights
    if start not in INITS_THAT_KEEP_THE_BASE:
        yield Finding(
            "note", "shifted-start",
            f"init_lora_weights={start!r}: this start changes the base's weights, so that the file fits only a base "
            "that is changed in the same way.", "08",
            "From PEFT, save PiSSA and its like with path_initial_model_for_weight_conversion, which writes plain LoRA "
            "for the untouched base. LoftQ's base is made again from the one in full precision.",
        )  # fmt: skip
    alpha, default = config.lora_alpha, type(config)
    if alpha == default.lora_alpha and config.r > default.r:
        yield Finding(
            "note", "alpha-left", f"r was raised to {config.r}, and lora_alpha is still {alpha:g}, the default.", "10",
            "If that was not meant, train again: a scale that is changed afterwards is another adapter.",
        )  # fmt: skip
    if config.use_rslora or config.alpha_pattern:
        rule = "use_rslora" if config.use_rslora else "alpha_pattern"
        yield Finding(
            "note", "lost-in-gguf",
            f"llama.cpp's convert_lora_to_gguf.py does not read {rule}: the file that it writes loads without a "
            "warning and has another scale.", "13", "Write the file with save_adapter_gguf.",
        )  # fmt: skip


def image_settings(adapter: Adapter) -> Iterator[Finding]:
    """Files for image models."""
    if adapter.format == KOHYA:
        said = (
            "A file of kohya's sd-scripts or of a program that writes as they do, for an image model: names with "
            "underscores, lora_down for A, lora_up for B, and alpha as a tensor. PEFT and lora_edu do not load it."
        )
    else:
        said = (
            "A file of diffusers, for an image model: its names begin with the part of the pipeline that they belong "
            "to, such as unet. or transformer. lora_edu does not load it."
        )
    yield Finding(
        "note", "kind", said, "08", "ComfyUI loads it, and diffusers does with pipeline.load_lora_weights(file)."
    )


def mlx_settings(adapter: Adapter) -> Iterator[Finding]:
    """mlx-lm's files, whose scale is a number of its own."""
    fields = adapter.source.fields or {}
    if fields.get("fine_tune_type") == "full":
        yield Finding("wrong", "whole-model", "mlx-lm trained whole weights here, not an adapter.", "08", "Fuse it.")
        return
    yield Finding(
        "note", "kind",
        "A file of mlx-lm: lora_a is (in, r) and lora_b is (r, out), PEFT's A and B transposed. PEFT and lora_edu do "
        "not load it.", "08",
        "mlx_lm.fuse writes the merged model; or transpose both, rename them, and set lora_alpha = scale × rank.",
    )  # fmt: skip
    if not isinstance(fields.get("lora_parameters"), dict):
        yield Finding(
            "wrong", "no-config", "No lora_parameters say which scale acts.", "08", "Copy adapter_config.json."
        )


def scales(adapter: Adapter) -> Iterator[Finding]:
    """The ranks, the scale as it acts, and the targets, in one sentence each."""
    ranks = sorted({factors.rank for factors in adapter.modules.values() if factors.rank is not None})
    values = sorted({factors.scale for factors in adapter.modules.values() if factors.scale is not None})
    config: Any = adapter.config
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    asked = getattr(config, "target_modules", None)
    targets = f"; target_modules: {asked if isinstance(asked, str) else some(asked, 8)}" if asked else ""
    yield Finding("ok", "rank", f"{counted(len(adapter.modules), 'module')} adapted, {rank}{targets}.", "04")
    if not values:
        return
    said = some([f"{value:g}" for value in values], 6)
    if adapter.format == MLX:
        rule = "mlx-lm's scale, which does not depend on the rank (its default is 20)"
    elif adapter.format != PEFT:
        rule = "alpha / r of each module, and 1 where the file has no alpha"
    elif hasattr(config, "use_rslora"):
        alpha = "lora_alpha" if config.alpha_pattern else f"{config.lora_alpha:g}"
        rank = "r" if config.rank_pattern else f"{config.r}"
        rule = (
            f"lora_alpha / √r = {alpha} / √{rank} (rsLoRA)"
            if config.use_rslora
            else f"lora_alpha / r = {alpha} / {rank}"
        )
    if values == [0]:
        yield Finding(
            "wrong", "scale", f"The scale is 0 ({rule}): the adapter changes nothing.", "03", "Set lora_alpha."
        )
    else:
        yield Finding("ok", "scale", f"The update is s · B A with s = {said}: {rule}.", "03")
