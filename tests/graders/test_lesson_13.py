"""The checks of lesson 13 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from found import each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.course.notebooks.stored import find_notebook, read
from lora_edu.serving.gguf import permuted
from lora_edu.serving.proof import served_is_not_base

pytestmark = pytest.mark.graders
PREFIX = "base_model.model."


# A1

ALPHAS = {
    "as the converter": (lambda alpha, r, rs: alpha, "with rsLoRA", "as it stands"),
    "the scale": (lambda alpha, r, rs: alpha / (math.sqrt(r) if rs else r), "without rsLoRA", "the scale itself"),
    "always √r": (lambda alpha, r, rs: alpha * math.sqrt(r), "without rsLoRA", "for rsLoRA only"),
    "times r": (lambda alpha, r, rs: alpha * r if rs else alpha, "with rsLoRA", "times r"),
    "divided by √r": (lambda alpha, r, rs: alpha / math.sqrt(r) if rs else alpha, "with rsLoRA", "the scale itself"),
    "a text": (lambda alpha, r, rs: str(alpha), "without rsLoRA", "a str"),
}
test_alpha_names_the_mistake = each_is_found(checks.gguf_alpha, ALPHAS)
test_other_alphas_pass = each_passes(
    checks.gguf_alpha,
    {
        "scale times r": lambda alpha, r, rs: (alpha / r**0.5 if rs else alpha / r) * r,
        "a power": lambda alpha, r, rs: alpha * r ** (0.5 * rs),
    },
)


# B1


def back(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def second_first(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).flip(1).swapaxes(1, 2).reshape(rows.shape)


def in_place(rows: Tensor, heads: int) -> Tensor:
    right = permuted_by_hand(rows, heads)
    rows[:] = right
    return rows


def permuted_by_hand(rows: Tensor, heads: int) -> Tensor:
    width = len(rows) // heads
    order = [head * width + place // 2 + width // 2 * (place % 2) for head in range(heads) for place in range(width)]
    return rows[order]


def by_index(rows: Tensor, heads: int) -> Tensor:
    numbers = torch.arange(len(rows)).view(heads, 2, -1).transpose(1, 2).reshape(-1)
    return rows.index_select(0, numbers)


def head_by_head(rows: Tensor, heads: int) -> Tensor:
    parts = []
    for head in rows.chunk(heads):
        first, second = head.chunk(2)
        parts.append(torch.stack([first, second], dim=1).flatten(0, 1))
    return torch.cat(parts)


ROWS = {
    "as they are": (lambda rows, heads: rows, "one head", "nothing has moved"),
    "the way back": (back, "one head", "the way back"),
    "second first": (second_first, "one head", "comes first"),
    "halves swapped": (lambda rows, heads: rows.roll(len(rows) // 2, 0), "one head", "changed places"),
    "across heads": (lambda rows, heads: permuted_by_hand(rows, 1), "several heads", "across heads"),
    "two dimensions only": (
        lambda rows, heads: rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape),
        "a bias", "IndexError|out of range",
    ),
    "another shape": (
        lambda rows, heads: rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2), "one head",
        "reshape(rows.shape)",
    ),
    "reversed": (lambda rows, heads: rows.flip(0), "one head", "your first rows are"),
    "in place": (in_place, "stays as it was", "has changed"),
    "the library's": (lambda rows, heads: permuted(rows, heads), "one head", "the library's permuted"),
}  # fmt: skip
test_rows_name_the_mistake = each_is_found(checks.llama_rows, ROWS)
test_other_rows_pass = each_passes(
    checks.llama_rows, {"by a list": permuted_by_hand, "by index": by_index, "head by head": head_by_head}
)


# B2


def cause(
    first: tuple[str, ...] = ("request", "scale", "names", "values"),
    positive: bool = False,
    factors: str = "AB",
    any_key: bool = False,
    request_scale: bool = True,
    ends: bool = False,
    own: bool = True,
    lower: bool = False,
) -> Callable[[dict[str, Any]], str]:
    """The function with switches for its mistakes."""

    def why(case: dict[str, Any]) -> str:
        name = case["request"]["model"]
        name = name.lower() if lower else name
        if "request" in first and name not in case["adapters"]:
            return "request"
        adapter = case["adapters"].get(name) or next(iter(case["adapters"].values()))
        scale = adapter["lora_alpha"] * (case["request"]["scale"] if request_scale else 1)
        if "scale" in first and (scale <= 0 if positive else scale == 0):
            return "scale"
        keys = list(adapter["tensors"])
        there = [
            key for key in keys if key.startswith(PREFIX) and key[len(PREFIX) :].rsplit(".", 2)[0] in case["modules"]
        ]
        if ends:
            there = [key for key in keys if any(module in key for module in case["modules"])]
        if "names" in first and (not there or (any_key and len(there) < len(keys))):
            return "names"
        looked_at = there if own else keys
        modules = {key.rsplit(".", 2)[0] for key in looked_at}
        tensors = adapter["tensors"]
        if factors == "AB":
            updates = [tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"] for m in modules]
        else:
            updates = [tensors[f"{m}.lora_{factor}.weight"] for m in modules for factor in factors]
        if "values" in first and not any(update.any() for update in updates):
            return "values"
        return "adapter"

    return why


CAUSES = {
    "only a positive scale": (cause(positive=True), "that acts", "negative"),
    "never the request": (cause(first=("scale", "names", "values")), "names no adapter", "Look request"),
    "names in small letters": (cause(lower=True), "names no adapter", "'Devil'"),
    "never the scale": (cause(first=("request", "names", "values")), "scale is zero", "the scale 0"),
    "the config's scale only": (cause(request_scale=False), "scale is zero", "the scale 0"),
    "never the names": (cause(first=("request", "scale", "values"), own=False), "no key names", "another prefix"),
    "part of a key": (cause(ends=True), "no key names", "another prefix"),
    "never the values": (cause(first=("request", "scale", "names")), "update is zero", "A is all zero"),
    "B only": (cause(factors="B"), "update is zero", "A is all zero"),
    "all must fit": (cause(any_key=True), "some fit|some modules fit", "one adapted module that the model lacks"),
    "all that is in the file": (cause(own=False), "some modules fit", "those modules only"),
    "another word": (lambda case: "fine", "that acts", "Return one of"),
}
test_causes_name_the_mistake = each_is_found(checks.why_base, CAUSES)


def by_norms(case: dict[str, Any]) -> str:
    adapter = case["adapters"].get(case["request"]["model"])
    if adapter is None:
        return "request"
    if not case["request"]["scale"] or not adapter["lora_alpha"]:
        return "scale"
    norms = []
    for key, A in adapter["tensors"].items():
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if key == f"{PREFIX}{module}.lora_A.weight" and module in case["modules"]:
            norms.append((adapter["tensors"][key.replace("lora_A", "lora_B")] @ A).norm().item())
    return "names" if not norms else "adapter" if sum(norms) > 0 else "values"


test_other_causes_pass = each_passes(checks.why_base, {"in this order": cause(), "by norms": by_norms})


# Your turn


def votes(decide: Callable[[list[str]], str], skip: str = "all three", refuse: bool = True) -> Callable[..., str]:
    """The test with switches for its mistakes."""

    def verdict(ask: Any, base: list[str], adapted: list[str], prompts: list[str]) -> str:
        seen = []
        for prompt, one, other in zip(prompts, base, adapted, strict=True):
            served = ask(prompt)
            if skip != "nothing" and one == other and (skip == "agree" or served == one):
                continue
            seen.append("adapter" if served == other else "base" if served == one else "neither")
        if not seen and refuse:
            raise ValueError("no prompt tells")
        return decide(seen)

    return verdict


def unanimous(seen: list[str]) -> str:
    return seen[0] if len(set(seen)) == 1 else "neither"


VERDICTS = {
    "turned round": (
        votes(lambda seen: {"adapter": "base", "base": "adapter"}.get(unanimous(seen), "neither")), "adapter's answers",
        "'base'",
    ),
    "never the base": (
        votes(lambda seen: "neither" if unanimous(seen) == "base" else unanimous(seen)), "base's answers", "'neither'"
    ),
    "not the base, so the adapter": (
        votes(lambda seen: "base" if set(seen) == {"base"} else "adapter"), "neither", "third text"
    ),
    "the first decides": (votes(lambda seen: seen[0]), "neither", "Collect|third"),
    "the last decides": (votes(lambda seen: seen[-1]), "neither", "Collect|third"),
    "most decide": (votes(lambda seen: max(seen, key=seen.count)), "neither", "Collect|third"),
    "one is enough": (
        votes(lambda seen: "adapter" if "adapter" in seen else unanimous(seen)), "neither", "Collect|third"
    ),
    "prompts that agree count": (votes(unanimous, skip="nothing"), "tell nothing", "Leave it out"),
    "prompts that agree are never asked about": (votes(unanimous, skip="agree"), "tell nothing", "all three texts"),
    "nothing proven": (votes(lambda seen: unanimous(seen) if seen else "adapter", refuse=False), "ValueError", "Raise"),
}  # fmt: skip
test_verdicts_name_the_mistake = each_is_found(checks.served_verdict, VERDICTS)


def by_counting(ask: Any, base: list[str], adapted: list[str], prompts: list[str]) -> str:
    said = [ask(prompt) for prompt in prompts]
    rows = [row for row in zip(said, base, adapted, strict=True) if len(set(row)) > 1]
    if not rows:
        raise ValueError("nothing to compare")
    if all(row[0] == row[2] != row[1] for row in rows):
        return "adapter"
    return "base" if all(row[0] == row[1] != row[2] for row in rows) else "neither"


test_other_verdicts_pass = each_passes(
    checks.served_verdict,
    {"by counting": by_counting, "the library's": lambda *given: served_is_not_base(*given).verdict},
)


def test_the_lessons_own_cell_passes_and_its_stub_is_not_done():
    cell = next(cell for cell in read(find_notebook("13")).cells if "your-turn" in cell.metadata.get("tags", []))
    for source, status in ((cell.source, "passed"), (cell.metadata["stub"], "not done")):
        names: dict[str, Any] = {}
        exec(source, names)
        assert checks.served_verdict(names["verdict"]).status == status
