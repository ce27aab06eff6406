"""Which layers of a model does ``target_modules`` mean? The rules are PEFT's; lesson 04 walks through them.

A list matches whole name segments from the right: ``"q_proj"`` matches ``model.layers.0.self_attn.q_proj`` but not
``eq_proj``. A string is a regular expression that must match the full name, except the word ``"all-linear"``.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# What PEFT adapts when target_modules is None, by model type.
DEFAULT_TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gemma3_text": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "chatglm": ["query_key_value"],
    "opt": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "electra": ["query", "value"],
    "deberta-v2": ["query_proj", "value_proj"],
    "bart": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
    "bloom": ["query_key_value"],
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "gptj": ["q_proj", "v_proj"],
    "gpt_neo": ["q_proj", "v_proj"],
    "deberta": ["in_proj"],
    "layoutlm": ["query", "value"],
    "llama4": ["q_proj", "v_proj"],
    "gpt_bigcode": ["c_attn"],
    "mpt": ["Wqkv"],
    "RefinedWebModel": ["query_key_value"],
    "RefinedWeb": ["query_key_value"],
    "falcon": ["query_key_value"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "stablelm": ["q_proj", "v_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gemma": ["q_proj", "v_proj"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
CLASSIFIER_HEADS = ("score", "classifier")
# Attributes below which torch.compile and checkpointing keep the module they wrap: they are no part of its name.
TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Wrapper(nn.Module):
    """Stands where ``base`` stood in a model. Names of modules, in matching and in files, skip it."""

    base: nn.Module


def named_places(
    model: nn.Module, prefix: str = "", above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place at which a module is registered: (its original name, parent, attribute, module).

    Original means without the segments that wrappers add. A module registered under two names is met twice; one that
    is registered somewhere inside itself is not entered again.
    """
    for attribute, module in model._modules.items():  # named_children() would skip the second name of a shared module
        while module is not None and isinstance(compiled := module._modules.get("_orig_mod"), nn.Module):
            module = compiled  # torch.compile keeps calling what it was given: replace the compiled module as a whole
        if module is None:
            continue
        name = prefix[:-1] if attribute in TRANSPARENT else f"{prefix}{attribute}"
        yield name, model, attribute, module
        inside = module
        while isinstance(inside, Wrapper):
            inside = inside.base
        if not any(inside is outer for outer in (model, *above)):
            yield from named_places(inside, f"{name}." if name else "", (model, *above))


def check_regex(field_name: str, pattern: str) -> None:
    """Raise unless the pattern compiles."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field_name}={pattern!r} is not a regular expression: {error}") from None


def check_targets(config: Any) -> None:
    """Bring the fields that every config has into their form, lists rather than sets; raise for what has no sense."""
    biases = ("none", "all", f"{config.peft_type.lower()}_only")  # PEFT's third word is "vera_only" for VeRA
    if config.bias not in biases:
        raise ValueError(f"bias={config.bias!r}: expected one of {', '.join(map(repr, biases))}")
    targets = config.target_modules
    if targets is not None and not isinstance(targets, str):
        if not isinstance(targets, Iterable) or not all(isinstance(target, str) for target in targets):
            raise TypeError(f"target_modules={targets!r}: expected a list of names, a regular expression or None")
        config.target_modules = sorted(targets) if isinstance(targets, set | frozenset) else list(targets)
        if not config.target_modules:
            raise ValueError("target_modules is empty: name at least one layer, for example ['q_proj', 'v_proj']")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(config, name), str):
            check_regex(name, pattern)
    if isinstance(targets, str) and (config.layers_to_transform is not None or config.layers_pattern is not None):
        raise ValueError(
            f"layers_to_transform and layers_pattern narrow a list of names, but target_modules={targets!r} is a "
            "string: name the layers in a list, or write their numbers into the regular expression"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(f"layers_pattern={config.layers_pattern!r} needs layers_to_transform: which numbers?")
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if isinstance(value := getattr(config, name), set | frozenset | range):
            setattr(config, name, sorted(value) if isinstance(value, set | frozenset) else list(value))
    if isinstance(config.modules_to_save, set | frozenset | tuple):
        config.modules_to_save = sorted(config.modules_to_save)
    if isinstance(config.modules_to_save, str):
        raise TypeError(f"modules_to_save={config.modules_to_save!r}: expected a list, [{config.modules_to_save!r}]")


def matches_names(patterns: str | Iterable[str] | None, name: str) -> bool:
    """Whether ``name`` is meant by a regular expression (full match) or by a list of name endings."""
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def fits(pattern: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` describes the end of ``name``, from a dot on (or all of it, after a ^)."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def layer_index(name: str, layers_pattern: str | Sequence[str] | None = None) -> int | None:
    """The first number in a dotted name: 3 for ``model.layers.3.mlp.up_proj``; None where there is none.

    With ``layers_pattern`` only a number that follows one of these names counts (``"layers"``, ``"h"``).
    """
    if not layers_pattern:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1])
    return None


def is_target(
    name: str,
    target_modules: str | Iterable[str],
    exclude_modules: str | Iterable[str] | None = None,
    modules_to_save: Iterable[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> bool:
    """Whether the module called ``name`` is to be adapted. ``"all-linear"`` must have been expanded before.

    Excluded modules, and everything inside ``modules_to_save``, never match. ``layers_to_transform`` narrows a list
    of targets down to some layers; as in PEFT it does not touch a regular expression, nor a target given by its
    full name.
    """
    if matches_names(exclude_modules, name):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in modules_to_save or ()):
        return False
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    targets = set(target_modules)
    if name in targets:
        return True
    if not matches_names(targets, name):
        return False
    if layers_to_transform is None or layers_to_transform == []:
        return True
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    return layer_index(name, layers_pattern) in wanted


def expand_targets(
    target_modules: str | Iterable[str] | None,
    model: nn.Module,
    modules: dict[str, nn.Module],
    task_type: str | None = None,
) -> str | list[str]:
    """Turn None and ``"all-linear"`` into explicit targets; everything else passes through.

    Args:
        model: the model whose family and output head are looked up.
        modules: its modules by original name.
        task_type: ``"SEQ_CLS"`` keeps the classification head out of ``"all-linear"``, as PEFT does.

    Raises:
        ValueError: None for a model family without default targets.
    """
    if target_modules is None:
        family = getattr(getattr(model, "config", None), "model_type", None)
        if family not in DEFAULT_TARGETS:
            raise ValueError(
                f"target_modules=None: there are no default targets for model type {family!r}; "
                f'name the layers to adapt, for example target_modules="all-linear" or {linear_endings(modules)[:4]}'
            )
        return DEFAULT_TARGETS[family]
    if not isinstance(target_modules, str):
        return list(target_modules)
    if target_modules.lower() != "all-linear":
        return target_modules
    head = output_head(model, task_type)
    return [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and module is not head]


def output_head(model: Any, task_type: str | None = None) -> nn.Module | None:
    """The layer that ``"all-linear"`` leaves out: the language-model head, or a classifier with ``"SEQ_CLS"``."""
    if not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    if head is None and task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in CLASSIFIER_HEADS if hasattr(model, name)), None)
    return getattr(head, "frozen", head)  # the plain layer, if the head is adapted already


def linear_endings(modules: dict[str, nn.Module]) -> list[str]:
    """The last segments of the names of all linear layers, each once, in the model's order."""
    linear = (name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D))
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear))


def near_names(wanted: str | Iterable[str], modules: dict[str, nn.Module]) -> list[str]:
    """Names in the model that look like what was asked for: for error messages. Numbers in a list are no names."""
    endings = dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules if name)
    names = [ending for ending in endings if not ending.isdigit()]
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    near = [hit for name in asked for hit in difflib.get_close_matches(name.rsplit(".", 1)[-1], names, n=3)]
    return list(dict.fromkeys(near)) or linear_endings(modules)[:8]


def why_none(targets: str | Iterable[str], model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """Why no module is a target: for an error message."""
    if fit := sum(is_target(name, targets) for name in modules):
        return f"{fit} modules fit, but exclude_modules, modules_to_save or layers_to_transform rule them out"
    return f"no module of the {type(model).__name__} has such a name; near names: {near_names(targets, modules)}"


def warn_unused_targets(
    targets: str | Iterable[str], modules: dict[str, nn.Module], known: Callable[[str], bool]
) -> None:
    """Warn about names in a list of targets that no module has, but for those ``known`` to mean something else."""
    for target in [] if isinstance(targets, str) else targets:
        if not known(target) and not any(matches_names([target], name) for name in modules):
            warn_caller(f"target_modules: {target!r} fits no module; near names: {near_names(target, modules)}")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as from the line outside this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("lora_edu."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
