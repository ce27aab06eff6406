"""The checks of lesson 08 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from found import assert_random_state_kept, each_is_found, each_passes
from lora_edu.course import checks

pytestmark = [
    pytest.mark.graders,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
NOTEBOOK = "08_same_with_peft"


def rs(fields: dict) -> float:
    return math.sqrt(fields.get("r", 8)) if fields.get("use_rslora") else fields.get("r", 8)


SCALE_OF = {
    "alpha alone": (lambda f: f.get("lora_alpha", 8), "lora_alpha / r", "PEFT multiplies by"),
    "upside down": (lambda f: f.get("r", 8) / f.get("lora_alpha", 8), "lora_alpha / r", "Which line"),
    "whole numbers": (lambda f: f.get("lora_alpha", 8) // rs(f), "lora_alpha / r", "PEFT multiplies by"),
    "always the root": (lambda f: f.get("lora_alpha", 8) / math.sqrt(f.get("r", 8)), "is lora_alpha / r", "√r with"),
    "rslora forgotten": (lambda f: f.get("lora_alpha", 8) / f.get("r", 8), "use_rslora", '"use_rslora": true'),
    "missing fields raise": (
        lambda f: f["lora_alpha"] / (math.sqrt(f["r"]) if f["use_rslora"] else f["r"]),
        "missing fields",
        "KeyError: 'use_rslora'",
    ),
    "another default": (
        lambda f: f.get("lora_alpha", f.get("r", 8)) / rs(f),
        "missing fields",
        "where they are missing",
    ),
    "alpha 16 by default": (lambda f: f.get("lora_alpha", 16) / rs(f), "missing fields", "lora_alpha are 8"),
    "nothing returned": (lambda f: None, "is lora_alpha / r", "returns None"),
}
SCALE_OF["a text"] = (lambda f: str(f.get("lora_alpha", 8) / f.get("r", 8)), "the scale is", "expected a number")


def with_defaults_first(fields: dict) -> float:
    given = {"r": 8, "lora_alpha": 8, "use_rslora": False} | dict(fields)
    return given["lora_alpha"] * (given["r"] ** -0.5 if given["use_rslora"] else 1 / given["r"])


RIGHT_SCALE = {
    "a power": lambda f: f.get("lora_alpha", 8) / f.get("r", 8) ** (0.5 if f.get("use_rslora") else 1),
    "defaults first": with_defaults_first,
}
test_other_scales_pass = each_passes(checks.scale_of, RIGHT_SCALE)
test_scale_of_names_the_mistake = each_is_found(checks.scale_of, SCALE_OF)


def kohya(
    flat_to_name: str = "look up",
    down: str = "A",
    change: Callable[[Tensor], Tensor] = lambda t: t,
    alpha: str = "read",
    rank: int = 0,
    targets: str = "full",
    strangers: str = "refused",
    scaled: bool = False,
    prefix: str = "base_model.model.",
    pair: bool = True,
) -> Callable[..., Any]:
    """The translation with switches for its mistakes."""

    def translate(tensors: dict[str, Tensor], modules: list[str]) -> Any:
        names = {"lora_te_" + name.replace(".", "_"): name for name in modules}
        found: dict[str, Tensor] = {}
        used, r, value = [], 0, None
        alphas = {key.partition(".")[0]: float(t) for key, t in tensors.items() if key.endswith("alpha")}
        for key, tensor in tensors.items():
            flat, _, part = key.partition(".")
            if flat_to_name == "replace":
                name = flat.removeprefix("lora_te_").replace("_", ".")
            elif flat in names:
                name = names[flat]
            elif strangers == "refused":
                raise ValueError(key)
            elif strangers == "KeyError":
                name = names[flat]
            else:
                continue
            if part == "alpha":
                value = float(tensor) if alpha != "tensor" else tensor
                continue
            is_a = (part == "lora_down.weight") == (down == "A")
            if part == "lora_down.weight":
                used.append(name)
                r = tensor.shape[rank]
                if scaled:
                    tensor = tensor * alphas.get(flat, r) / r
            found[f"{prefix}{name}.lora_{'A' if is_a else 'B'}.weight"] = change(tensor)
        lora_alpha = {"r": r, "8": 8}.get(alpha, value if value is not None else (None if alpha == "kept" else r))
        names_out: Any = {"full": used, "last": sorted({n.rpartition(".")[2] for n in used}), "set": set(used)}[targets]
        fields = {"peft_type": "LORA", "r": r, "lora_alpha": lora_alpha, "target_modules": names_out}
        return (found, fields) if pair else found

    return translate


FROM_KOHYA = {
    "underscores to dots": (kohya(flat_to_name="replace"), "keys are PEFT's", "self.attn.q.proj"),
    "prefix forgotten": (kohya(prefix=""), "keys are PEFT's", "you give the key 'model.layers"),
    "down taken for B": (kohya(down="B"), "down and up", "lora_A of"),
    "transposed": (kohya(change=lambda t: t.T.contiguous()), "down and up", "shape"),
    "scale folded in": (kohya(scaled=True), "down and up", "alpha belongs into the config"),
    "alpha taken for r": (kohya(alpha="r"), "the fields hold", "lora_alpha is"),
    "r read from the wrong side": (kohya(rank=1), "the fields hold", "r is"),
    "alpha left a tensor": (kohya(alpha="tensor"), "the fields hold", "JSON cannot hold"),
    "a set of targets": (kohya(targets="set"), "the fields hold", "use lists, not sets"),
    "no alpha, no value": (kohya(alpha="kept"), "without an alpha", "lora_alpha is None"),
    "strangers left out": (kohya(strangers="skipped"), "is refused", "without a word"),
    "strangers a KeyError": (kohya(strangers="KeyError"), "is refused", "raises KeyError"),
    "last segments as targets": (kohya(targets="last"), "PEFT loads it", "PEFT adapts"),
    "no fields": (kohya(pair=False), "keys are PEFT's", "no pair"),
}
test_from_kohya_names_the_mistake = each_is_found(checks.from_kohya, FROM_KOHYA)


def places(folder: Path, model: nn.Module, copied: bool = True) -> set[str]:
    config = peft.LoraConfig.from_pretrained(str(folder))
    adapted = peft.get_peft_model(copy.deepcopy(model) if copied else model, config)
    return set(peft.get_peft_model_state_dict(adapted))


def parts(keys: set[str], wanted: set[str]) -> dict[str, list[str]]:
    return {"filled": sorted(keys & wanted), "missing": sorted(wanted - keys), "ignored": sorted(keys - wanted)}


def in_file(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def audit_in_place(folder: Path, model: nn.Module) -> dict:
    return parts(in_file(folder), places(folder, model, copied=False))


def audit_exchanged(folder: Path, model: nn.Module) -> dict:
    found = parts(in_file(folder), places(folder, model))
    return found | {"missing": found["ignored"], "ignored": found["missing"]}


def audit_trusting(folder: Path, model: nn.Module) -> dict:
    return {"filled": sorted(in_file(folder)), "missing": [], "ignored": []}


def audit_without_prefix(folder: Path, model: nn.Module) -> dict:
    keys, wanted = in_file(folder), places(folder, model)
    short = {key.rpartition("base_model.model.")[2]: key for key in keys}
    fits = {key.removeprefix("base_model.model.") for key in wanted}
    return {
        "filled": sorted(key for name, key in short.items() if name in fits),
        "missing": sorted(key for key in wanted if key.removeprefix("base_model.model.") not in short),
        "ignored": sorted(key for name, key in short.items() if name not in fits),
    }


def audit_model_keys(folder: Path, model: nn.Module) -> dict:
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig.from_pretrained(str(folder)))
    return parts(in_file(folder), {name for name, _ in adapted.named_parameters() if "lora_" in name})


def audit_by_module(folder: Path, model: nn.Module) -> dict:
    keys, wanted = in_file(folder), places(folder, model)
    modules = {key.partition(".lora_")[0] for key in keys}
    filled = {key for key in wanted if key.partition(".lora_")[0] in modules}
    return {"filled": sorted(filled), "missing": sorted(wanted - filled), "ignored": sorted(keys - wanted)}


def audit_by_ending(folder: Path, model: nn.Module) -> dict:
    """Does not ask which layers the config means: any module of the model counts as a place."""
    keys, wanted = in_file(folder), places(folder, model)
    modules = {name for name, _ in model.named_modules()}
    known = {k for k in keys if k.removeprefix("base_model.model.").partition(".lora_")[0] in modules}
    known = {k for k in known if k.startswith("base_model.model.")}
    return {"filled": sorted(known), "missing": sorted(wanted - keys), "ignored": sorted(keys - known)}


AUDIT = {
    "all is filled": (audit_trusting, "renamed keys", "lack PEFT's prefix: filled"),
    "keys with the adapter's name": (audit_model_keys, "a sound file", "a sound file: filled has 0 keys"),
    "prefix ignored": (audit_without_prefix, "renamed keys", "Are whole keys compared?"),
    "missing and ignored exchanged": (audit_exchanged, "renamed keys", "missing is places - file"),
    "module by module": (audit_by_module, "leaves empty", "without any B"),
    "targets ignored": (audit_by_ending, "without a place", "v_proj, which is no target"),
    "in place": (audit_in_place, "as it was", "copy.deepcopy"),
    "no dictionary": (lambda f, m: sorted(in_file(f)), "a sound file", "does not return a dictionary"),
}
test_audit_names_the_mistake = each_is_found(checks.audit, AUDIT)


PREFIX = "base_model.model."


def stripped(key: str) -> str:
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def mender(rule: Callable[[str], str]) -> Callable[[list[str]], dict[str, str]]:
    return lambda keys: {key: rule(key) for key in keys}


MEND = {
    "prefix put on blindly": (mender(lambda k: PREFIX + k), "sound keys", "a sound file"),
    "only damaged keys": (
        lambda keys: {k: PREFIX + k for k in keys if not k.startswith(PREFIX)},
        "sound keys",
        "for every key",
    ),
    "left as they are": (mender(lambda k: k), "missing prefix", "without the prefix"),
    "cut at model.": (mender(lambda k: PREFIX + k.split("model.", 1)[1]), "sound keys", "a sound file"),
    "cut at the last model.": (mender(lambda k: PREFIX + k.rsplit("model.", 1)[1]), "sound keys", "a sound file"),
    "prefix taken off once": (
        mender(lambda k: PREFIX + k.replace("_orig_mod.", "").removeprefix(PREFIX)),
        "repeated prefix",
        "nested twice",
    ),
    "compiled forgotten": (mender(lambda k: PREFIX + stripped(k)), "_orig_mod", "a compiled model"),
    "_orig_mod only in front": (
        mender(lambda k: PREFIX + stripped(k.removeprefix("_orig_mod."))),
        "_orig_mod",
        "a compiled model",
    ),
    "module forgotten": (
        mender(lambda k: PREFIX + stripped(k.replace("_orig_mod.", ""))),
        "leading module",
        "trained in parallel",
    ),
    "one damage a key": (
        mender(
            lambda k: k.replace("_orig_mod.", "") if "_orig_mod." in k else PREFIX + stripped(k.removeprefix("module."))
        ),
        "two damages",
        "compiled and nested",
    ),
}
test_mend_names_the_mistake = each_is_found(checks.mend, MEND)


def test_checks_leave_the_random_state_alone(from_solution: Callable) -> None:
    assert_random_state_kept(checks.mend, from_solution(NOTEBOOK, "mend"))
