"""Checks of lesson 08: what a file would load (B2), and why an adapter loads nothing (C1)."""

import copy
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_edu.course.checks.lesson_08 import PREFIX, draw_llama
from lora_edu.course.checks.report import Report, Wrong, run_steps

TARGETS = ["q_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"
PARTS = ("filled", "missing", "ignored")


def saved_by_peft(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """A plain model, and the tensors of an adapter for it that PEFT has written to ``folder``."""
    import peft

    model = draw_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=random.randint(2, 4), lora_alpha=5, target_modules=TARGETS)
        )
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        adapted.save_pretrained(folder)
    return model, load_file(folder / WEIGHTS)


def used_by_peft(folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """How many of the file's tensors are in the model after PEFT has loaded it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    inside = [p for name, p in loaded.named_parameters() if "lora_" in name]
    return sum(any(p.shape == t.shape and torch.equal(p, t) for p in inside) for t in tensors.values())


def audit(candidate: Callable[[Path, Any], Any], hint: int = 1) -> Report:
    """Which keys of an adapter's file would be used. Exercise B2 of lesson 08."""

    def tried(damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model, sound = saved_by_peft(folder)
            tensors = damage(sound)
            save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / WEIGHTS)
            right = {
                "filled": sorted(tensors.keys() & sound.keys()),
                "missing": sorted(sound.keys() - tensors.keys()),
                "ignored": sorted(tensors.keys() - sound.keys()),
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
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
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, _ = saved_by_peft(Path(place))
            before = [(name, p.requires_grad) for name, p in model.named_parameters()]
            candidate(Path(place), model)
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
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                model, sound = saved_by_peft(folder)
                broken = {damage(key): tensor for key, tensor in sound.items()}
                renamed = candidate(list(broken))
                save_file({renamed[key]: tensor.clone() for key, tensor in broken.items()}, folder / WEIGHTS)
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
