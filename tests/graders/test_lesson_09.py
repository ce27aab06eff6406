"""The checks of lesson 09 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from found import assert_random_state_kept, each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.course.notebooks.stored import find_notebook, read

pytestmark = pytest.mark.graders
NOTEBOOK = "09_merge_switch_serve"


def slot(
    keep: Callable[[Tensor], Tensor] = torch.clone,
    only_first: bool = True,
    rounded: bool = False,
    new_tensor: bool = False,
    widened: bool = False,
    back: str = "copy",
    forget: bool = True,
    guarded: bool = True,
    from_kept: bool = False,
) -> type:
    """The class with switches for its mistakes."""

    class Slot:
        def __init__(self, weight: Tensor):
            self.weight, self.kept, self.delta = weight, None, None

        def merge(self, delta: Tensor) -> None:
            if self.kept is None or not only_first:
                self.kept = keep(self.weight)
            self.delta = delta
            if widened:
                self.weight = self.weight + delta
            elif new_tensor:
                self.weight = (self.weight + delta).to(self.weight.dtype)
            elif from_kept:
                self.weight.copy_(self.kept + delta)
            else:
                self.weight += delta.to(self.weight.dtype) if rounded else delta

        def unmerge(self) -> None:
            if guarded and self.kept is None:
                return
            if back == "subtract":
                self.weight -= self.delta
            elif back == "assign":
                self.weight = self.kept
            else:
                self.weight.copy_(self.kept)
            if forget:
                self.kept = None

    return Slot


MERGED_WEIGHT = {
    "the update rounded first": (slot(rounded=True), "exact sum", "exact sum, rounded once"),
    "float32 afterwards": (slot(widened=True), "exact sum", "weight is torch.float32"),
    "a new tensor when merging": (slot(new_tensor=True), "stays in use", "the model goes on with the old one"),
    "a new tensor when unmerging": (slot(back="assign"), "stays in use", "the model goes on with the merged one"),
    "a second name instead of a copy": (slot(keep=lambda w: w), "old bits", "still the merged one"),
    "detach instead of a copy": (slot(keep=torch.detach), "old bits", "clone()"),
    "subtracted": (slot(back="subtract"), "old bits", "w + d − d"),
    "kept at every merge": (slot(only_first=False), "two merges", "does not bring the pretrained weight back"),
    "the second from the kept one": (slot(from_kept=True), "two merges", "does not add to it"),
    "unmerging without a merge": (slot(guarded=False), "does no harm", "TypeError|kept"),
    "the copy never forgotten": (slot(forget=False), "does no harm", "self.kept = None"),
}

test_merged_weight_names_the_mistake = each_is_found(checks.merged_weight, MERGED_WEIGHT)


def right(x: Tensor, weight: Tensor, adapters: dict, names: list[str], scale: bool = True) -> Tensor:
    for name in names:
        if name != "__base__" and name not in adapters:
            raise KeyError(name)
    y = x @ weight.T
    for name in dict.fromkeys(names):
        if name != "__base__":
            rows = [i for i, each in enumerate(names) if each == name]
            a, b, scaling = adapters[name]
            y[rows] += (scaling if scale else 1) * (x[rows] @ a.T @ b.T)
    return y


def first_for_all(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    return right(x, weight, adapters, [names[0]] * len(names))


def in_groups(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    """Joins the groups' answers in the order of the groups."""
    order = [[i for i, each in enumerate(names) if each == name] for name in dict.fromkeys(names)]
    y = right(x, weight, adapters, names)
    return torch.cat([y[rows] for rows in order])


def all_added(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    return x @ weight.T + sum(s * (x @ a.T @ b.T) for name, (a, b, s) in adapters.items() if name in names)


def base_gets_the_first(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    return right(x, weight, adapters, [next(iter(adapters)) if name == "__base__" else name for name in names])


def base_is_unknown(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    y = x @ weight.T
    for name in set(names):
        a, b, scaling = adapters[name]
        rows = [i for i, each in enumerate(names) if each == name]
        y[rows] += scaling * (x[rows] @ a.T @ b.T)
    return y


def unknown_is_base(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    return right(x, weight, adapters, [name if name in adapters else "__base__" for name in names])


def three_dimensions(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    rows, tokens, inputs = x.shape
    return right(x.reshape(rows, tokens, inputs), weight, adapters, names)


def row_after_row(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    y = right(x, weight, adapters, ["__base__"] * len(names))
    for i, name in enumerate(names):
        if name != "__base__":
            a, b, scaling = adapters[name]
            y[i] += scaling * (x[i] @ a.T @ b.T)
    return y


def base_for_each(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    right(x[:, ..., :], weight, adapters, names)
    y = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    for name in dict.fromkeys(names):
        rows = [i for i, each in enumerate(names) if each == name]
        y[rows] = right(x[rows], weight, adapters, [name] * len(rows))
    return y


def writes_into_x(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    y = right(x, weight, adapters, names)
    x *= 0
    return y


def dense_weights(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    zero = (torch.zeros(1, weight.shape[1], dtype=x.dtype), torch.zeros(weight.shape[0], 1, dtype=x.dtype), 0.0)
    chosen = [zero if name == "__base__" else adapters[name] for name in names]
    return torch.stack([row @ (weight + s * b @ a).T for row, (a, b, s) in zip(x, chosen, strict=True)])


MIXED_LINEAR = {
    "scale forgotten": (lambda *given: right(*given, scale=False), "one adapter", "scale"),
    "weight not transposed": (lambda x, w, a, n: x @ w, "one adapter", "RuntimeError|shape"),
    "the first row's adapter for all": (first_for_all, "in the order", "and is the answer of 'law'"),
    "answers in the order of the groups": (in_groups, "in the order", "Remember the rows' numbers"),
    "all adapters added": (all_added, "in the order", "the answer of no adapter"),
    "the base gets the first adapter": (base_gets_the_first, "the base get no", "should be '__base__'"),
    "the base is looked up": (base_is_unknown, "the base get no", "KeyError: '__base__'"),
    "three dimensions only": (three_dimensions, "any number of dimensions", "not enough values|unpack"),
    "an unknown name is the base": (unknown_is_base, "unknown name", "answers all the same"),
    "row after row": (row_after_row, "the base once", "not over rows"),
    "the base for each adapter": (base_for_each, "the base once", "times"),
    "a dense weight for each row": (dense_weights, "the base once", "large weight 9 times"),
    "x is written over": (writes_into_x, "one adapter", "changes x"),
    "nothing returned": (lambda *given: None, "one adapter", "NoneType"),
}


def everything_zero(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
    """Overwrites what it is given, so that a check which computes too late expects zeros."""
    for tensor in (weight, *(factor for a, b, _ in adapters.values() for factor in (a, b))):
        tensor.zero_()
    return x @ weight.T


MIXED_LINEAR["weights overwritten"] = (everything_zero, "one adapter", "the answer of no adapter")
test_mixed_linear_names_the_mistake = each_is_found(checks.mixed_linear, MIXED_LINEAR)


def test_a_gathered_answer_passes_too() -> None:
    def gathered(x: Tensor, weight: Tensor, adapters: dict, names: list[str]) -> Tensor:
        r = max(a.shape[0] for a, _, _ in adapters.values())
        all_a = torch.zeros(len(adapters) + 1, r, x.shape[-1], dtype=x.dtype)
        all_b = torch.zeros(len(adapters) + 1, weight.shape[0], r, dtype=x.dtype)
        number = {"__base__": len(adapters)}
        for i, (name, (a, b, scaling)) in enumerate(adapters.items()):
            all_a[i, : a.shape[0]], all_b[i, :, : a.shape[0]], number[name] = a, scaling * b, i
        ids = [number[name] for name in names]
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        update = flat @ all_a[ids].transpose(1, 2) @ all_b[ids].transpose(1, 2)
        return x @ weight.T + update.reshape(*x.shape[:-1], -1)

    assert checks.mixed_linear(gathered).status == "passed"


def swap(
    write: Callable[[Any, str, Tensor], None] | None = None,
    keys: str = "all",
    shapes: str = "checked",
    scale: str = "own r",
    order: str = "check first",
    error: type[Exception] = ValueError,
    crossed: bool = False,
) -> Callable[..., None]:
    """The swap with switches for its mistakes."""

    def put(layer: Any, key: str, value: Tensor) -> None:
        with torch.no_grad():
            getattr(layer, key).copy_(value)

    def fits(layer: Any, key: str, tensors: dict, name: str) -> bool:
        shape = getattr(layer, key).shape
        return shapes != "checked" or tensors[name].shape == shape

    def hot_swap(layers: dict, tensors: dict, lora_alpha: float) -> None:
        names = {
            f"base_model.model.{place}.{key}.weight": (layer, key)
            for place, layer in layers.items()
            for key in ("lora_A", "lora_B")
        }
        missing, extra = names.keys() - tensors.keys(), tensors.keys() - names.keys()
        if (missing and keys in ("all", "missing")) or (extra and keys in ("all", "extra")):
            raise error("keys")
        if order == "check first":
            for name, (layer, key) in names.items():
                if name in tensors and not fits(layer, key, tensors, name):
                    raise error("shape")
        if scale == "early":
            for layer in layers.values():
                layer.scaling = lora_alpha / layer.r
        for name, (layer, key) in names.items():
            if keys == "missing" or name in tensors or keys == "extra":
                if name not in tensors:
                    continue
                if order != "check first" and not fits(layer, key, tensors, name):
                    raise error("shape")
                (write or put)(layer, key, tensors[name])
        first = next(iter(layers.values()))
        for layer in layers.values():
            if scale == "own r":
                layer.scaling = lora_alpha / layer.r
            elif scale == "first r":
                layer.scaling = lora_alpha / first.r
            elif scale == "alpha":
                layer.scaling = lora_alpha

    return hot_swap


def new_parameters(layer: Any, key: str, value: Tensor) -> None:
    setattr(layer, key, nn.Parameter(value.clone()))


def other_memory(layer: Any, key: str, value: Tensor) -> None:
    getattr(layer, key).data = value.clone()


def frozen(layer: Any, key: str, value: Tensor) -> None:
    getattr(layer, key).requires_grad_(False).copy_(value)


def a_only(layer: Any, key: str, value: Tensor) -> None:
    if key == "lora_A":
        with torch.no_grad():
            layer.lora_A.copy_(value)


def added(layer: Any, key: str, value: Tensor) -> None:
    with torch.no_grad():
        getattr(layer, key).add_(value)


def load_in_order(layers: dict, tensors: dict, lora_alpha: float) -> None:
    """Trusts the file: whatever fits is copied."""
    with torch.no_grad():
        for place, layer in layers.items():
            layer.lora_A.copy_(tensors[f"base_model.model.{place}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"base_model.model.{place}.lora_B.weight"])
            layer.scaling = lora_alpha / layer.r


HOT_SWAP = {
    "B forgotten": (swap(write=a_only), "new values", "lora_B of"),
    "added instead of copied": (swap(write=added), "new values", "does not hold the new values"),
    "new parameters": (swap(write=new_parameters), "same parameters", "has new parameters"),
    "assigned to .data": (swap(write=other_memory), "same parameters", "point to other memory"),
    "frozen on the way": (swap(write=frozen), "same parameters", "no longer requires a gradient"),
    "scale forgotten": (swap(scale="kept"), "new scale", "has the scale"),
    "one rank for all layers": (swap(scale="first r"), "new scale", "the rank the same in every layer"),
    "alpha taken for the scale": (swap(scale="alpha"), "new scale", "lora_alpha / layer.r"),
    "nothing is checked": (load_in_order, "is refused", "raises RuntimeError, expected ValueError"),
    "missing keys skipped": (swap(keys="extra"), "is refused", "a missing tensor: your function accepts"),
    "strange keys ignored": (swap(keys="missing"), "is refused", "a layer that is not there: your function accepts"),
    "another exception": (swap(error=KeyError), "is refused", "raises KeyError"),
    "checked while writing": (swap(order="on the way"), "nothing has changed", "Two loops"),
    "scale before the check": (swap(order="on the way", scale="early"), "nothing has changed", "has changed already"),
}


def the_wrong_way(layers: dict, tensors: dict, lora_alpha: float) -> None:
    for place, layer in layers.items():
        for key in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{place}.{key}.weight"].copy_(getattr(layer, key).detach())


HOT_SWAP["copied the wrong way"] = (the_wrong_way, "new values", "does not hold the new values")


def by_position(layers: dict, tensors: dict, lora_alpha: float) -> None:
    rest, plan = dict(tensors), []
    for place, layer in layers.items():
        for key in ("lora_A", "lora_B"):
            value, parameter = rest.pop(f"base_model.model.{place}.{key}.weight", None), getattr(layer, key)
            if value is None or list(value.shape) != list(parameter.shape):
                raise ValueError(f"{key} of {place} does not fit")
            plan.append((parameter, value))
    if rest:
        raise ValueError(f"no place for {min(rest)}")
    for parameter, value in plan:
        parameter.detach().copy_(value)
    for layer in layers.values():
        layer.scaling = lora_alpha / layer.r


test_other_swaps_pass = each_passes(checks.hot_swap, {"with switches": swap(), "a plan": by_position})
test_hot_swap_names_the_mistake = each_is_found(checks.hot_swap, HOT_SWAP)


MERGING_PAYS = {
    "rounded up": (lambda u, m, c: None if u <= m else math.ceil(c / (u - m)), "equal times", "you answer"),
    "rounded down": (lambda u, m, c: None if u <= m else math.floor(c / (u - m)), "first number", "one pass less"),
    "no rounding": (lambda u, m, c: None if u <= m else c / (u - m), "first number", "a float; expected the whole"),
    "the cost against the unmerged pass": (
        lambda u, m, c: None if u <= m else math.floor(c / u) + 1,
        "first number",
        "Write down both times",
    ),
    "the gain upside down": (lambda u, m, c: None if u <= m else math.floor((u - m) / c) + 1, "first number", "answer"),
    "never is not seen": (lambda u, m, c: math.floor(c / (u - m)) + 1 if u != m else None, "None where", "never gets"),
    "equal passes divide by zero": (
        lambda u, m, c: None if u < m else math.floor(c / (u - m)) + 1,
        "None where",
        "ZeroDivisionError",
    ),
    "never is infinity": (
        lambda u, m, c: math.inf if u <= m else math.floor(c / (u - m)) + 1,
        "None where",
        "you answer inf",
    ),
    "a free merge pays before the first pass": (
        lambda u, m, c: None if u <= m else 0 if c == 0 else math.floor(c / (u - m)) + 1,
        "pays at once",
        "you answer 0",
    ),
    "whole units only": (
        lambda u, m, c: None if u <= m else int(c) // max(1, int(u - m)) + 1,
        "fractions",
        "you answer",
    ),
}


def counted(unmerged: float, merged: float, change: float) -> int | None:
    if merged >= unmerged:
        return None
    passes = 1
    while change + passes * merged >= passes * unmerged:
        passes += 1
    return passes


RIGHT_PAYS = {"counted": counted, "whole division": lambda u, m, c: int(c // (u - m)) + 1 if u > m else None}
test_other_pays_pass = each_passes(checks.merging_pays, RIGHT_PAYS)
test_merging_pays_names_the_mistake = each_is_found(checks.merging_pays, MERGING_PAYS)


def merging(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype)


def into_the_float32_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    exact = weight.float()  # no copy of a float32 weight
    exact += scaling * (b.float() @ a.float())
    return exact.to(weight.dtype)


def scales_b_in_place(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    wide = b.float()  # no copy of a float32 B
    wide *= scaling
    return merging(weight, a, wide, 1.0)


def merges_and_returns_the_given_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return weight.copy_(merging(weight, a, b, scaling))


MERGE_ONCE = {
    "scale forgotten": (lambda w, a, b, s: merging(w, a, b, 1.0), "a float32 weight becomes", "the scale is missing"),
    "scale twice": (lambda w, a, b, s: merging(w, a, b, s * s), "a float32 weight becomes", "in it twice"),
    "the update alone": (lambda w, a, b, s: merging(0 * w, a, b, s), "a float32 weight becomes", "update alone"),
    "subtracted": (lambda w, a, b, s: merging(w, a, b, -s), "a float32 weight becomes", "is subtracted"),
    "A before B": (lambda w, a, b, s: w + s * (a @ b), "a float32 weight becomes", "shape"),
    "factors transposed": (lambda w, a, b, s: w + s * (a.T @ b.T), "a float32 weight becomes", "size|shape"),
    "the result transposed": (lambda w, a, b, s: merging(w, a, b, s).T, "a float32 weight becomes", "you return ("),
    "nothing returned": (lambda w, a, b, s: None, "a float32 weight becomes", "NoneType"),
    "left in float32": (lambda w, a, b, s: w + s * (b.float() @ a.float()), "keeps its type", "is float32"),
    "all in the weight's type": (
        lambda w, a, b, s: w + s * (b.to(w.dtype) @ a.to(w.dtype)),
        "rounded once",
        "whole merge was computed in bfloat16",
    ),
    "rounded twice": (lambda w, a, b, s: w + (s * (b.float() @ a.float())).to(w.dtype), "rounded once", "once more"),
    "the product in the factors' type": (
        lambda w, a, b, s: (w.float() + s * (b @ a).float()).to(w.dtype),
        "also where A and B",
        "update was computed in bfloat16",
    ),
    "the update in the factors' type": (
        lambda w, a, b, s: (w.float() + (s * (b @ a)).float()).to(w.dtype),
        "also where A and B",
        "update was computed in bfloat16",
    ),
    "the weight written over": (merges_and_returns_the_given_weight, "stay as they were", "writes into weight"),
    "a float32 weight written over": (
        into_the_float32_weight,
        "stay as they were",
        "writes into weight (here float32)",
    ),
    "B scaled in place": (scales_b_in_place, "stay as they were", "writes into lora_B"),
}
RIGHT_MERGES = {
    "addmm": lambda w, a, b, s: torch.addmm(w.float(), b.float(), a.float(), alpha=s).to(w.dtype),
    "in float64": lambda w, a, b, s: (w.double() + s * (b.double() @ a.double())).to(w.dtype),
    "into a clone": lambda w, a, b, s: w.clone().add_((s * b.float()) @ a.float()),
}
test_other_merges_pass = each_passes(checks.merge_once, RIGHT_MERGES)
test_merge_once_names_the_mistake = each_is_found(checks.merge_once, MERGE_ONCE)


@pytest.mark.parametrize(("which", "status"), [("source", "passed"), ("stub", "not done")])
def test_your_turn_of_the_lesson(which: str, status: str) -> None:
    cell = next(cell for cell in read(find_notebook(NOTEBOOK)).cells if "your-turn" in cell.metadata.get("tags", []))
    space: dict = {"torch": torch}
    exec(cell.source if which == "source" else cell.metadata["stub"], space)
    report = checks.merge_once(space["merged"])
    assert report.status == status, report.text
    assert (report.passed == []) == (which == "stub")


def test_checks_leave_the_random_state_alone(from_solution: Callable) -> None:
    assert_random_state_kept(checks.mixed_linear, from_solution(NOTEBOOK, "mixed_linear"))
