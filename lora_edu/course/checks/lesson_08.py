"""The checks of lesson 08: a config's scale (A1), another format (B1), what a file loads (B2), mended keys (C1)."""

import copy
import json
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_edu.core.peft_io import PREFIX, WEIGHTS_FILE
from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    close,
    close_number,
    is_tensor,
    need_number,
    need_refusal,
    peft_linear,
    small_llama,
    temporary_folder,
)

TARGETS = ["q_proj", "down_proj"]
draw_llama = partial(small_llama, num_hidden_layers=3)
PARTS = ("filled", "missing", "ignored")


@without(
    "lora_edu.core",
    symptom="you call the library's {name}",
    question="Which line of LoRALinear computes the scale, and with which values if a field is missing?",
    fix="lora_alpha / r, or lora_alpha / √r with use_rslora; r and lora_alpha are 8 where they are missing.",
)
def scale_of(candidate: Callable[[Mapping[str, Any]], float], hint: int = 1) -> Report:
    """The scale that a saved config means. Exercise A1 of lesson 08."""

    def ask(fields: dict[str, Any], right: float) -> None:
        value = candidate(dict(fields))
        if value is None:
            raise Wrong("your function returns None", "What does its last line do?", "Begin it with return.")
        value = need_number(value, "By which number is BA multiplied?", "Return lora_alpha / r, or lora_alpha / √r.")
        if not close_number(value, right):
            raise Wrong(
                f"for {json.dumps(fields)} you give {value:.4g}; PEFT multiplies by {right:.4g}",
                "Which line of LoRALinear computes the scale, and with which values if a field is missing?",
                "lora_alpha / r, or lora_alpha / √r with use_rslora; r and lora_alpha are 8 where they are missing.",
            )

    def plain() -> None:
        for r, alpha in ((random.randint(3, 7), random.randint(9, 31)), (64, 16), (5, 1)):
            ask({"r": r, "lora_alpha": alpha, "use_rslora": False}, alpha / r)

    def rslora() -> None:
        r, alpha = random.choice([3, 5, 6, 7]), random.randint(9, 31)
        ask({"r": r, "lora_alpha": alpha, "use_rslora": True}, alpha / math.sqrt(r))

    def defaults() -> None:
        r, alpha = random.randint(3, 7), random.randint(9, 31)
        ask({"r": r, "lora_alpha": alpha}, alpha / r)
        ask({"r": r}, 8 / r)
        ask({"lora_alpha": alpha}, alpha / 8)
        ask({"r": r, "use_rslora": True, "lora_dropout": 0.1}, 8 / math.sqrt(r))

    def like_peft() -> None:
        for _ in range(4):
            options: dict[str, Any] = {"r": random.randint(2, 9), "lora_alpha": random.randint(1, 40)}
            options["use_rslora"] = random.random() < 0.5
            _, layer = peft_linear(nn.Linear(11, 10), **options)
            ask(options, layer.scaling["default"])

    steps = [
        ("the scale is lora_alpha / r", plain),
        ("with use_rslora it is lora_alpha / √r", rslora),
        ("missing fields have PEFT's defaults", defaults),
        ("the same number as in PEFT's layers", like_peft),
    ]
    return run_steps("the scale in a config", steps, hint)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of the linear layers of the blocks."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    }


def kohya_file(shapes: Mapping[str, tuple[int, int]], r: int, alpha: float | None) -> dict[str, Tensor]:
    """Random tensors in the other dialect, for the given modules."""
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        flat = "lora_te_" + name.replace(".", "_")
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(float(alpha))
        tensors[f"{flat}.lora_down.weight"] = torch.randn(r, in_features)
        tensors[f"{flat}.lora_up.weight"] = torch.randn(out_features, r)
    return tensors


def from_kohya(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """From kohya's keys to PEFT's files. Exercise B1 of lesson 08."""

    def draw(alpha: float | None) -> tuple[Any, dict[str, tuple[int, int]], dict[str, Tensor], int]:
        model, r = draw_llama(), random.randint(2, 5)
        shapes = linear_shapes(model)
        chosen = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"}
        some = {name: shape for name, shape in shapes.items() if name in chosen}
        return model, some, kohya_file(some, r, alpha), r

    def translate(alpha: float | None = 7.0) -> tuple[Any, dict, dict[str, Tensor], int, dict[str, Tensor], dict]:
        model, some, tensors, r = draw(alpha)
        answer = candidate({key: tensor.clone() for key, tensor in tensors.items()}, list(linear_shapes(model)))
        if not isinstance(answer, tuple) or len(answer) != 2 or not all(isinstance(part, dict) for part in answer):
            raise Wrong(
                "your function returns no pair of dictionaries", "What does the task ask for?", "(tensors, fields)"
            )
        return model, some, tensors, r, *answer

    def keys() -> None:
        _, some, _, _, found, _ = translate()
        right = {f"{PREFIX}{name}.lora_{factor}.weight" for name in some for factor in "AB"}
        if strange := sorted(found.keys() - right):
            raise Wrong(
                f"you give the key {strange[0]!r}; PEFT's keys for this file are like {min(right)!r}",
                "Can the dots be got back from the underscores? q_proj has an underscore of its own.",
                "Flatten the modules' names, and look the flat name up: {flat name: name}.",
            )
        if lost := sorted(right - found.keys()):
            raise Wrong(f"the key {lost[0]!r} is missing", "Are all parts translated?", "lora_down is A, lora_up is B.")

    def factors() -> None:
        _, some, tensors, _, found, _ = translate()
        for name in some:
            for factor, part in (("A", "lora_down"), ("B", "lora_up")):
                theirs = tensors[f"lora_te_{name.replace('.', '_')}.{part}.weight"]
                ours = found[f"{PREFIX}{name}.lora_{factor}.weight"]
                if not is_tensor(ours, theirs.shape) or not torch.equal(ours, theirs):
                    words = f"shape {tuple(ours.shape)}" if isinstance(ours, Tensor) else f"a {type(ours).__name__}"
                    raise Wrong(
                        f"lora_{factor} of {name!r} is not the file's {part}: {words}, "
                        f"expected {tuple(theirs.shape)} and the same values",
                        "Which factor reads the input, and is anything scaled or transposed on the way?",
                        "lora_down is A (r, in), lora_up is B (out, r), both unchanged; alpha belongs into the config.",
                    )

    def fields(alpha: float | None) -> Callable[[], None]:
        def run() -> None:
            *_, r, _, config = translate(alpha)
            right = {"peft_type": "LORA", "r": r, "lora_alpha": r if alpha is None else alpha}
            try:
                json.dumps(config)
            except TypeError as error:
                raise Wrong(
                    f"JSON cannot hold your fields: {error}",
                    "Is one of them a tensor or a set?",
                    "float(tensor) makes a number of a tensor without dimensions; use lists, not sets.",
                ) from None
            for field, value in right.items():
                if config.get(field) != value:
                    raise Wrong(
                        f"{field} is {config.get(field)!r}, expected {value!r}"
                        + (" (the file has no alpha)" if alpha is None and field == "lora_alpha" else ""),
                        "Where does the file say it: in a tensor, or in a shape?",
                        "r is lora_down's first dimension, lora_alpha the alpha tensor; without one, alpha is r.",
                    )

        return run

    def stranger() -> None:
        model, _, tensors, r = draw(7.0)
        tensors |= kohya_file({"model.layers.0.self_attn.query": (12, 12)}, r, 7.0)
        try:
            need_refusal(
                lambda: candidate(tensors, list(linear_shapes(model))),
                "a name that fits no module, lora_te_model_layers_0_self_attn_query, goes through without a word",
                "What would be loaded for it?",
                "raise ValueError if the flat name is not among the model's.",
            )
        except KeyError as error:
            raise Wrong(
                f"a name that fits no module raises KeyError: {error}",
                "What will the reader of this message know?",
                "Look first, and raise ValueError with the key.",
            ) from None

    def peft_loads() -> None:
        import peft

        model, some, tensors, r, found, config = translate()
        ids = torch.randint(0, 23, (2, 5))
        with temporary_folder() as folder, warnings.catch_warnings(action="ignore"):
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / WEIGHTS_FILE)
            (folder / "adapter_config.json").write_text(json.dumps(config))
            # A copy for PEFT: it changes the model that it is given.
            theirs = draw_llama()
            theirs.load_state_dict(model.state_dict())
            loaded = peft.PeftModel.from_pretrained(theirs, str(folder))
        adapted = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)]
        if sorted(adapted) != sorted(some):
            raise Wrong(
                f"with your target_modules PEFT adapts {len(adapted)} layers, the file is for {len(some)}",
                "Which layers does a target such as 'q_proj' mean?",
                "Give the full names of the file's modules.",
            )
        with torch.no_grad():
            for name in some:
                flat = f"lora_te_{name.replace('.', '_')}"
                update = tensors[f"{flat}.lora_up.weight"] @ tensors[f"{flat}.lora_down.weight"]
                model.get_submodule(name).weight += 7.0 / r * update
            right, answer = model(ids).logits, loaded(ids).logits
        if not close(answer, right, rtol=1e-3, atol=1e-4):
            raise Wrong(
                "PEFT loads your files, but the answers are not those of W + alpha / r · up · down",
                "Is alpha counted twice, or not at all?",
                "Leave the tensors as they are, and put r and lora_alpha into the fields.",
            )

    steps = [
        ("the keys are PEFT's", keys),
        ("A and B are the file's down and up", factors),
        ("the fields hold r and alpha, and JSON can hold them", fields(7.0)),
        ("without an alpha tensor, alpha is r", fields(None)),
        ("a name that fits no module is refused", stranger),
        ("PEFT loads it, with the right answers", peft_loads),
    ]
    return run_steps("from another tool's format", steps, hint)


def saved_by_peft(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """A plain model, and the tensors of an adapter for it that PEFT has written to ``folder``."""
    import peft

    model = draw_llama()
    with warnings.catch_warnings(action="ignore"):
        adapted: Any = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=random.randint(2, 4), lora_alpha=5, target_modules=TARGETS)
        )
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        adapted.save_pretrained(folder)
    return model, load_file(folder / WEIGHTS_FILE)


def used_by_peft(folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """How many of the file's tensors are in the model after PEFT has loaded it."""
    import peft

    with warnings.catch_warnings(action="ignore"):
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    inside = [p for name, p in loaded.named_parameters() if "lora_" in name]
    return sum(any(p.shape == t.shape and torch.equal(p, t) for p in inside) for t in tensors.values())


def audit(candidate: Callable[[Path, Any], Any], hint: int = 1) -> Report:
    """Which keys of an adapter's file would be used. Exercise B2 of lesson 08."""

    def tried(damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str) -> None:
        with temporary_folder() as folder:
            model, sound = saved_by_peft(folder)
            tensors = damage(sound)
            save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
            right = {
                "filled": sorted(tensors.keys() & sound.keys()),
                "missing": sorted(sound.keys() - tensors.keys()),
                "ignored": sorted(tensors.keys() - sound.keys()),
            }
            with warnings.catch_warnings(action="ignore"):
                answer = candidate(folder, copy.deepcopy(model))
            compare(answer, right, words)
            if (used := used_by_peft(folder, model, tensors)) != len(answer["filled"]):
                raise Wrong(
                    f"{words}: PEFT uses {used} tensors of the file, you say {len(answer['filled'])}",
                    "Where do the two disagree?",
                    "Compare the file's keys with get_peft_model_state_dict of a fresh adapter.",
                )

    def compare(answer: Any, right: dict[str, list[str]], words: str) -> None:
        if not isinstance(answer, Mapping) or set(answer) != set(PARTS):
            raise Wrong(
                "your function does not return a dictionary with filled, missing and ignored",
                "What are its keys?",
                'return {"filled": …, "missing": …, "ignored": …}',
            )
        for part in PARTS:
            found = sorted(answer[part])
            if found != right[part]:
                wrong = sorted(set(found) ^ set(right[part]))
                example = f", for example {wrong[0]!r}" if wrong else ""
                raise Wrong(
                    f"{words}: {part} has {len(found)} keys, expected {len(right[part])}{example}",
                    "Which two sets of keys are compared: the file's, and what else? Are whole keys compared?",
                    "filled is file & places, missing is places - file, ignored is file - places.",
                )

    def sound() -> None:
        tried(dict, "a sound file")

    def renamed() -> None:
        tried(lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()}, "a file whose keys lack PEFT's prefix")
        tried(lambda t: {PREFIX + k: v for k, v in t.items()}, "a file with the prefix twice")

    def incomplete() -> None:
        tried(lambda t: {k: v for k, v in t.items() if "layers.1." not in k}, "a file without layer 1")
        tried(lambda t: {k: v for k, v in t.items() if "lora_A" in k}, "a file without any B")

    def foreign() -> None:
        extra = {f"{PREFIX}model.layers.7.self_attn.q_proj.lora_{f}.weight": torch.randn(3, 12) for f in "AB"}
        tried(lambda t: t | extra, "a file for a deeper model")
        other = {f"{PREFIX}model.layers.0.self_attn.v_proj.lora_A.weight": torch.randn(3, 12)}
        tried(lambda t: t | other, "a file with v_proj, which is no target")

    def untouched() -> None:
        with temporary_folder() as folder, warnings.catch_warnings(action="ignore"):
            model, _ = saved_by_peft(folder)
            before = [(name, p.requires_grad) for name, p in model.named_parameters()]
            candidate(folder, model)
            if [(name, p.requires_grad) for name, p in model.named_parameters()] != before:
                raise Wrong(
                    "after your audit the model is another: it holds adapter layers, or is frozen",
                    "What does get_peft_model do to the model that it is given?",
                    "Give it copy.deepcopy(model).",
                )

    steps = [
        ("a sound file fills every place", sound),
        ("renamed keys fill nothing", renamed),
        ("places that the file leaves empty are missing", incomplete),
        ("tensors without a place are ignored", foreign),
        ("the model is as it was", untouched),
    ]
    return run_steps("what a file would load", steps, hint)


def mend(candidate: Callable[[Sequence[str]], Any], hint: int = 1) -> Report:
    """From damaged keys to PEFT's. Exercise C1 of lesson 08."""

    def right_keys() -> list[str]:
        layers = random.sample(range(10), 3)
        return [
            f"{PREFIX}model.layers.{i}.{name}.lora_{factor}.weight"
            for i in layers
            for name in ("self_attn.q_proj", "mlp.down_proj")
            for factor in "AB"
        ]

    def tried(words: str, *damages: Callable[[str], str]) -> Callable[[], None]:
        def run() -> None:
            for damage in damages:
                pairs = {damage(key): key for key in right_keys()}
                answer = candidate(list(pairs))
                if not isinstance(answer, Mapping) or set(answer) != set(pairs):
                    raise Wrong(
                        "your function does not return {old key: right key} for every key it is given",
                        "Are sound keys in your dictionary too?",
                        "Return one entry for each key, whether it was damaged or not.",
                    )
                for old, key in pairs.items():
                    if answer[old] != key:
                        raise Wrong(
                            f"{words}: {old!r} becomes {answer[old]!r}, expected {key!r}",
                            "What is left when everything that wrappers added is taken off?",
                            "Take off _orig_mod., a leading module. and every leading base_model.model.; then put the "
                            "prefix on once.",
                        )

        return run

    def no_prefix(key: str) -> str:
        return key.removeprefix(PREFIX)

    def compiled(key: str) -> str:
        return key.replace(PREFIX, f"{PREFIX}_orig_mod.")

    def loads() -> None:
        for damage in (no_prefix, compiled, lambda key: PREFIX + key):
            with temporary_folder() as folder:
                model, sound = saved_by_peft(folder)
                broken = {damage(key): tensor for key, tensor in sound.items()}
                renamed = candidate(list(broken))
                save_file({renamed[key]: tensor.clone() for key, tensor in broken.items()}, folder / WEIGHTS_FILE)
                used = used_by_peft(folder, model, sound)
            if used != len(sound):
                raise Wrong(
                    f"PEFT uses {used} of {len(sound)} tensors of a file with your keys",
                    "Which keys does a sound file of the same model have?",
                    "Compare with get_peft_model_state_dict.",
                )

    steps = [
        ("sound keys stay as they are", tried("a sound file", str)),
        ("a missing prefix is put on", tried("a file without the prefix", no_prefix)),
        ("a repeated prefix is taken off", tried("nested twice", lambda k: PREFIX + k, lambda k: PREFIX * 2 + k)),
        ("_orig_mod is taken out", tried("a compiled model", compiled, lambda key: f"_orig_mod.{key}")),
        ("a leading module is taken off", tried("a model trained in parallel", lambda key: f"module.{key}")),
        ("two damages at once", tried("compiled and nested", lambda key: PREFIX + compiled(key))),
        ("PEFT loads the mended files", loads),
    ]
    return run_steps("mended keys", steps, hint)
