"""The checks of lesson 04 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn

from found import each_is_found, each_passes
from lora_edu import LoraConfig, LoRALinear, inject, load_adapter, save_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.matching import matches_names
from lora_edu.core.peft_io import tensors_of as tensors_of_adapter
from lora_edu.course import checks
from lora_edu.course.notebooks.stored import find_notebook, read

pytestmark = pytest.mark.graders
NOTEBOOK = "04_lora_in_a_model"


def test_load_alone_is_not_done(from_solution: Callable, from_stub: Callable) -> None:
    report = checks.save_and_load(from_solution(NOTEBOOK, "save_lora"), from_stub(NOTEBOOK, "load_lora"))
    assert report.status == "not done"
    assert len(report.passed) == 3


NAME_MATCHING = {
    "substring": (lambda n, ts: any(t in n for t in ts), "parts of words", "eq_proj"),
    "ends with, without the dot": (lambda n, ts: any(n.endswith(t) for t in ts), "parts of words", "eq_proj"),
    "last segment only": (lambda n, ts: n.split(".")[-1] in ts, "several segments", "self_attn.q_proj"),
    "equal only": (lambda n, ts: n in ts, "last segment", "q_proj"),
    "top level forgotten": (lambda n, ts: any(n.endswith("." + t) for t in ts), "top of the model", "means 'q_proj'"),
    "any segment": (lambda n, ts: any(f".{t}." in f".{n}." for t in ts), "inside a match", "q_proj.base"),
    "read from the left": (lambda n, ts: any(n.startswith(t) for t in ts), "last segment", "From which side"),
    "all of them": (
        lambda n, ts: all(n == t or n.endswith("." + t) for t in ts),
        "one fitting target",
        "One fit is enough",
    ),
    "only the first": (lambda n, ts: n == ts[0] or n.endswith("." + ts[0]), "one fitting target", "any("),
    "the library's rule": (lambda n, ts: matches_names(ts, n), "last segment", "you call matches_names"),
    "PEFT's rule": (
        lambda n, ts: bool(check_target_module_exists(peft.LoraConfig(target_modules=ts), n)),
        "last segment",
        "which holds the rule",
    ),
    "a pattern": (lambda n, ts: any(re.search(rf"(^|\.){t}$", n) for t in ts), "no patterns", "regular expression"),
}


def by_pattern(name: str, targets: Sequence[str]) -> re.Match | None:
    found = (re.search(rf"(^|\.){re.escape(target)}\Z", name) for target in targets)
    return next(filter(None, found), None)


RIGHT_MATCHING = {
    "a dot in front of both": lambda n, ts: any(f".{n}".endswith(f".{t}") for t in ts),
    "segments from the right": lambda n, ts: any(n.split(".")[-len(t.split(".")) :] == t.split(".") for t in ts),
    "endswith with a tuple": lambda n, ts: n in ts or n.endswith(tuple(f".{t}" for t in ts)),
    "an escaped pattern, a match for true": by_pattern,
}
test_other_matchings_pass = each_passes(checks.name_matching, RIGHT_MATCHING)
test_name_matching_names_the_mistake = each_is_found(checks.name_matching, NAME_MATCHING)


def from_lesson(which: str) -> Callable:
    """``meant`` of the lesson's *Your turn*: its "source" or its "stub"."""
    cells = read(find_notebook(NOTEBOOK)).cells
    cell = next(cell for cell in cells if "your-turn" in cell.metadata.get("tags", []))
    space: dict = {}
    exec(cell.source if which == "source" else cell.metadata["stub"], space)
    return space["meant"]


def test_your_turn_passes_and_its_stub_is_not_done() -> None:
    assert checks.name_matching(from_lesson("source")).status == "passed"
    assert checks.name_matching(from_lesson("stub")).status == "not done"


def by_segments(name: str, targets: Sequence[str]) -> bool:
    segments = name.split(".")
    return any(segments[-len(target.split(".")) :] == target.split(".") for target in targets)


@pytest.mark.parametrize(
    "right",
    [
        lambda name, targets: ("." + name).endswith(tuple("." + target for target in targets)),
        by_segments,
    ],
    ids=["a dot in front", "segments"],
)
def test_name_matching_passes_other_ways_to_write_it(right: Callable) -> None:
    assert checks.name_matching(right).status == "passed"


def wrapped(
    model: nn.Module,
    targets: Sequence[str],
    r: int = 8,
    lora_alpha: float = 8,
    match: Callable = matches_names,
    freeze: str = "by owner",
    kinds: tuple = (nn.Linear,),
    names: str = "full",
    fresh: bool = False,
    settings: bool = True,
) -> list[str]:
    """Injection by hand with switches for its mistakes."""
    if freeze == "first":
        model.requires_grad_(False)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and match(targets, n)]
    for name, linear in found:
        parent, _, attribute = name.rpartition(".")
        if fresh:
            linear = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
        layer = LoRALinear(linear, r, lora_alpha) if settings else LoRALinear(linear, lora_alpha=lora_alpha)
        setattr(model.get_submodule(parent), attribute, layer)
    if freeze == "by owner":
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(isinstance(module, LoRALinear))
    elif freeze == "last":
        model.requires_grad_(False)
    elif freeze == "all but the head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("head"))
    return [name.rpartition(".")[2] if names == "short" else name for name, _ in found]


def with_mistake(**switches: object) -> Callable[..., list[str]]:
    return lambda model, targets, r=8, lora_alpha=8: wrapped(model, targets, r, lora_alpha, **switches)


def in_a_copy(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    return wrapped(copy.deepcopy(model), targets, r, lora_alpha)


def top_level_only(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    found = [name for name, child in model.named_children() if name in targets]
    for name in found:
        setattr(model, name, LoRALinear(getattr(model, name), r, lora_alpha))
    return found


def published(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    """As in the lesson's 'Spot the bug', whole segments aside: a layer at the top of the model has no parent's name."""
    found = []
    for name, module in model.named_modules():
        if matches_names(targets, name) and isinstance(module, nn.Linear):
            parent, attribute = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), attribute, LoRALinear(module, r, lora_alpha))
            found.append(name)
    return found


def by_the_library(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    inject(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets))
    return list(adapter_layers(model))


def by_peft(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets))
    return []


def while_walking(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    found = []
    for parent_name, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            name = f"{parent_name}.{attribute}".lstrip(".")
            if isinstance(child, nn.Linear) and matches_names(targets, name):
                parent._modules.pop(attribute)
                parent._modules[f"{attribute}"] = LoRALinear(child, r, lora_alpha)
                parent._modules[f"{attribute}_done"] = nn.Identity()
                found.append(name)
    return found


def substring(targets: Sequence[str], name: str) -> bool:
    return any(target in name for target in targets)


def substring_but_right(targets: Sequence[str], name: str) -> bool:
    """Right on a fresh model; on an adapted one it also finds the layers inside."""
    return matches_names(targets, name.removesuffix(".base"))


HAND_INJECTION = {
    "the library's injection": (by_the_library, "every target is replaced", "you call inject"),
    "PEFT's injection": (by_peft, "every target is replaced", "the library injects"),
    "in a copy": (in_a_copy, "every target is replaced", "a copy of it"),
    "top level only": (top_level_only, "every target is replaced", "at every depth"),
    "a layer at the top": (published, "every target is replaced", "not enough values to unpack"),
    "dictionary changed while walking": (while_walking, "every target is replaced", "RuntimeError"),
    "substring": (with_mistake(match=substring), "every target is replaced", "eq_proj"),
    "short names": (with_mistake(names="short"), "names of the replaced", "full names"),
    "rank not passed on": (with_mistake(settings=False), "r and lora_alpha", "asked for r="),
    "fresh weights": (with_mistake(fresh=True), "starts where it was", "new tensors"),
    "only wrapped layers frozen": (with_mistake(freeze="never"), "only A and B train", "embed.weight"),
    "head left to train": (with_mistake(freeze="all but the head"), "only A and B train", "head.weight"),
    "adapter frozen too": (with_mistake(freeze="last"), "only A and B train", "frozen as well"),
    "inner layers on a second call": (with_mistake(match=substring_but_right), "wraps nothing twice", "wrapped twice"),
    "wraps the wrapper": (with_mistake(kinds=(nn.Linear, LoRALinear)), "wraps nothing twice", "wrapped twice"),
    "second call freezes the first": (with_mistake(freeze="first"), "a second call", "stops the first adapter"),
}


class OwnLoRA(LoRALinear):
    """A layer that only looks like the one asked for."""


def with_its_own_class(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    found = wrapped(model, targets, r, lora_alpha)
    for name in found:
        model.get_submodule(name).__class__ = OwnLoRA
    return found


HAND_INJECTION["a class of its own"] = (with_its_own_class, "every target is replaced", "holds no LoRALinear")


def recursive(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    found: list[str] = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for attribute, child in list(parent.named_children()):
            name = f"{prefix}{attribute}"
            if isinstance(child, LoRALinear):
                continue
            if isinstance(child, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
                setattr(parent, attribute, LoRALinear(child, r, lora_alpha))
                found.append(name)
            else:
                visit(child, f"{name}.")

    visit(model, "")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return found


def freeze_first(model: nn.Module, targets: Sequence[str], r: int = 8, lora_alpha: float = 8) -> list[str]:
    for module in model.modules():
        if not isinstance(module, LoRALinear):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and matches_names(targets, n)]
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), r=r, lora_alpha=lora_alpha))
    return names


RIGHT_INJECTION = {"collected, then replaced": wrapped, "child by child": recursive, "frozen first": freeze_first}
test_other_injections_pass = each_passes(checks.hand_injection, RIGHT_INJECTION)
test_hand_injection_names_the_mistake = each_is_found(checks.hand_injection, HAND_INJECTION)


def tensors_of(model: nn.Module, prefix: str = "base_model.model.", ending: str = ".weight") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}.{key}{ending}": getattr(module, key)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for key in ("lora_A", "lora_B")
    }


def saver(change: Callable[[torch.Tensor], torch.Tensor] = lambda t: t, **names: str) -> Callable:
    def save(model: nn.Module, file: Path) -> None:
        save_file({key: change(t.detach()).contiguous() for key, t in tensors_of(model, **names).items()}, file)

    return save


def save_everything(model: nn.Module, file: Path) -> None:
    tensors = {key: t.detach().clone() for key, t in tensors_of(model).items()}
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    save_file(tensors | base, file)


def save_first_layer(model: nn.Module, file: Path) -> None:
    save_file({key: t.detach() for key, t in list(tensors_of(model).items())[:2]}, file)


def save_pickle(model: nn.Module, file: Path) -> None:
    torch.save({key: t.detach() for key, t in tensors_of(model).items()}, file)


def loader(missing: bool = True, foreign: bool = True, shapes: bool = True, early: bool = False) -> Callable:
    """Loading that leaves out one of its checks, or copies before it is done with them."""

    def load(model: nn.Module, file: Path) -> None:
        places, tensors = tensors_of(model), load_file(file)
        if early:
            copy_all(places, {key: t for key, t in tensors.items() if key in places})
        if missing and places.keys() - tensors.keys():
            raise ValueError("missing")
        if foreign and tensors.keys() - places.keys():
            raise ValueError("foreign")
        tensors = {key: t for key, t in tensors.items() if key in places}
        if shapes and any(t.shape != places[key].shape for key, t in tensors.items()):
            raise ValueError("shape")
        copy_all(places, tensors)

    return load


@torch.no_grad()
def copy_all(places: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        places[key].copy_(tensor)


def load_not_strict(model: nn.Module, file: Path) -> None:
    state = {key.removeprefix("base_model.model.").removesuffix(".weight"): t for key, t in load_file(file).items()}
    model.load_state_dict(state, strict=False)


def load_by_lookup(model: nn.Module, file: Path) -> None:
    """A missing key is a KeyError; nothing is written until all are found."""
    tensors, places = load_file(file), tensors_of(model)
    found = {key: tensors[key] for key in places}
    if tensors.keys() - places.keys() or any(found[key].shape != places[key].shape for key in places):
        raise ValueError("foreign, or of another shape")
    copy_all(places, found)


def load_new_parameters(model: nn.Module, file: Path) -> None:
    for key, tensor in load_file(file).items():
        module, _, attribute = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor))


def load_only_a(model: nn.Module, file: Path) -> None:
    copy_all(tensors_of(model), {key: t for key, t in load_file(file).items() if "lora_A" in key})


SAVE_AND_LOAD = {
    "the library's files": (
        lambda model, file: save_adapter(model, file.parent), lambda model, file: load_adapter(model, file.parent),
        "nothing else", "you call save_adapter",
    ),
    "the library's tensors": (
        lambda model, file: save_file(tensors_of_adapter(adapter_layers(model), []), file), loader(),
        "nothing else", "you call tensors_of",
    ),
    "base weights too": (save_everything, loader(), "nothing else", "belongs to the base"),
    "one layer only": (save_first_layer, loader(), "nothing else", "the adapter has"),
    "a pickle": (save_pickle, loader(), "nothing else", "no safetensors file"),
    "prefix forgotten": (saver(prefix=""), loader(), "PEFT's keys", "base_model.model."),
    "weight forgotten": (saver(ending=""), loader(), "PEFT's keys", "after lora_A"),
    "transposed": (saver(lambda t: t.T), loader(), "value for value", "differs from the model's"),
    "rounded": (saver(lambda t: t.bfloat16().float()), loader(), "value for value", "differs from the model's"),
    "B not loaded": (saver(), load_only_a, "the same logits", "are not those of the saved one"),
    "new parameters": (saver(), load_new_parameters, "the same logits", "an optimizer made before"),
    "not strict": (saver(), load_not_strict, "tensor missing", "strict=False"),
    "a KeyError": (saver(), load_by_lookup, "tensor missing", "raises KeyError"),
    "missing not noticed": (saver(), loader(missing=False), "tensor missing", "without a word"),
    "foreign not noticed": (saver(), loader(foreign=False), "foreign tensor", "without a word"),
    "shapes not compared": (saver(), loader(shapes=False), "another rank", "copy_ broadcasts"),
    "copied before checking": (saver(), loader(early=True), "tensor missing", "half of it had been loaded"),
}  # fmt: skip


def save_by_parameters(model: nn.Module, file: Path) -> None:
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in ("lora_A", "lora_B")]
    save_file({f"base_model.model.{name}.weight": model.get_parameter(name).data for name in names}, str(file))


def save_by_layers(model: nn.Module, file: Path) -> None:
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    tensors = {f"{name}.{key}": tensor.detach() for name, layer in layers for key, tensor in layer.to_file().items()}
    save_file({f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, file)


def load_through_the_state(model: nn.Module, file: Path) -> None:
    tensors, state = load_file(file), model.state_dict()
    names = {key: key.removeprefix("base_model.model.").removesuffix(".weight") for key in tensors}
    if {name for name in state if "lora_" in name} != set(names.values()):
        raise ValueError("the file is not for these layers")
    if any(tensors[key].shape != state[name].shape for key, name in names.items()):
        raise ValueError("the file is not for this rank")
    model.load_state_dict({**state, **{name: tensors[key] for key, name in names.items()}})


RIGHT_FILES = {
    "by parameters": (save_by_parameters, loader()),
    "by layers": (save_by_layers, load_through_the_state),
    "by hand": (saver(), loader()),
}
test_other_files_pass = each_passes(checks.save_and_load, RIGHT_FILES)
test_save_and_load_names_the_mistake = each_is_found(checks.save_and_load, SAVE_AND_LOAD)


def mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def ranges(a: Sequence[float], b: Sequence[float], few: int = 2, equal: bool = False) -> str:
    if min(len(a), len(b)) < few:
        return "not evidence"
    if max(a) < min(b) or (equal and max(a) == min(b)):
        return "a"
    return "b" if max(b) < min(a) else "not evidence"


SEED_VERDICT = {
    "higher is better": (lambda a, b: ranges(b, a), "lie apart", "lower loss wins"),
    "never b": (lambda a, b: "a" if max(a) < min(b) else "not evidence", "lie apart", "exchanged"),
    "lower mean": (lambda a, b: "a" if mean(a) < mean(b) else "b", "overlap", "every seed of one"),
    "best seed": (lambda a, b: "a" if min(a) < min(b) else "b", "overlap", "every seed of one"),
    "a fixed gap": (
        lambda a, b: "not evidence" if abs(mean(a) - mean(b)) < 0.07 else "a" if mean(a) < mean(b) else "b",
        "mean alone",
        "inside the other",
    ),
    "equal counts": (lambda a, b: ranges(a, b, equal=True), "touch", "same loss"),
    "a tie goes to a": (
        lambda a, b: "not evidence" if min(len(a), len(b)) < 2 else ranges(a, b) if min(a) != max(b) else "a",
        "touch",
        "same loss",
    ),
    "one seed decides": (lambda a, b: ranges(a, b, few=1), "single seed", "spread of one seed"),
}


def every_pair(a: Sequence[float], b: Sequence[float]) -> str:
    if len(a) < 2 or len(b) < 2:
        return "not evidence"
    if all(x < y for x in a for y in b):
        return "a"
    return "b" if all(y < x for x in a for y in b) else "not evidence"


def by_sorting(a: Sequence[float], b: Sequence[float]) -> str:
    a, b = sorted(a), sorted(b)
    wins = {"a": a[-1] < b[0], "b": b[-1] < a[0]}
    return next((name for name, won in wins.items() if won and len(a) > 1 < len(b)), "not evidence")


RIGHT_VERDICT = {"ranges": ranges, "every pair": every_pair, "sorted": by_sorting}
test_other_verdicts_pass = each_passes(checks.seed_verdict, RIGHT_VERDICT)
test_seed_verdict_names_the_mistake = each_is_found(checks.seed_verdict, SEED_VERDICT)


def trains(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def outside_lora_layers(model: nn.Module) -> list[str]:
    layers = tuple(name + "." for name, module in model.named_modules() if isinstance(module, LoRALinear))
    return [name for name in trains(model) if not name.startswith(layers)]


def freezing(model: nn.Module) -> list[str]:
    names = [name for name in trains(model) if "lora_" not in name]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names


def by_owner(model: nn.Module) -> set[str]:
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if not isinstance(module, LoRALinear)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


LOOSE_PARAMETERS = {
    "A and B too": (trains, "after inject", "the A or B of a LoRA layer"),
    "whatever is no A or B": (
        lambda m: [n for n, _ in m.named_parameters() if "lora_" not in n],
        "after inject",
        "it does not train",
    ),
    "what is frozen": (
        lambda m: [n for n, p in m.named_parameters() if not p.requires_grad],
        "after inject",
        "it does not train",
    ),
    "how many": (lambda m: len([n for n in trains(m) if "lora_" not in n]), "after inject", "a list of names"),
    "none": (lambda m: [], "a head", "it trains: head.weight"),
    "freezes them": (freezing, "a head", "only look"),
    "short names": (lambda m: [n.rpartition(".")[2] for n in trains(m) if "lora_" not in n], "a head", "full names"),
    "modules": (lambda m: [n.rpartition(".")[0] for n in trains(m) if "lora_" not in n], "a head", "full names"),
    "weights only": (
        lambda m: [n for n in trains(m) if n.endswith(".weight")],
        "a head",
        "head.bias",
    ),
    "the head only": (lambda m: [n for n in trains(m) if n.startswith("head")], "biases", "it trains"),
    "outside LoRA layers": (outside_lora_layers, "biases", "belong to the base"),
    "lora in the name": (lambda m: [n for n in trains(m) if "lora" not in n], "sounds like LoRA", "Which segment"),
}
test_loose_parameters_names_the_mistake = each_is_found(checks.loose_parameters, LOOSE_PARAMETERS)


@pytest.mark.parametrize(
    "right",
    [by_owner, lambda m: [n for n in trains(m) if not n.endswith((".lora_A", ".lora_B"))]],
    ids=["by owner", "by ending"],
)
def test_loose_parameters_passes_other_ways_to_write_it(right: Callable) -> None:
    assert checks.loose_parameters(right).status == "passed"
