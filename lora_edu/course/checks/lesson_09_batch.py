"""Check of lesson 09: a mixed batch by hand (B1)."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_edu.course.checks.report import Report, Wrong, run_steps

BASE = "__base__"
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
Adapters = dict[str, tuple[Tensor, Tensor, float]]


class Products(TorchDispatchMode):
    """Counts matrix products, and those with a factor of the frozen weight's size."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.sizes, self.small, self.with_weight = set(map(int, weight.shape)), 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket.__name__ in PRODUCTS:
            large = any(isinstance(arg, Tensor) and set(arg.shape[-2:]) == self.sizes for arg in args)
            self.with_weight, self.small = self.with_weight + large, self.small + (not large)
        return operation(*args, **(kwargs or {}))


def draw(rows: int = 6, *shape: int) -> tuple[Tensor, Tensor, Adapters]:
    """(x, weight, adapters): three adapters of different ranks and scales, in ≠ out."""
    inputs, outputs = random.randint(9, 12), random.randint(13, 17)
    x = torch.randn(rows, *shape, inputs, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    adapters = {}
    for name, r in zip(("tax", "law", "code"), random.sample([2, 3, 4, 5], 3), strict=True):
        factors = torch.randn(r, inputs, dtype=torch.float64), torch.randn(outputs, r, dtype=torch.float64)
        adapters[name] = (*factors, random.choice([0.5, 1.5, 3.0]))
    return x, weight, adapters


def row_by_row(x: Tensor, weight: Tensor, adapters: Adapters, names: list[str]) -> Tensor:
    """What is right: every row with its own dense weight."""
    found = []
    for row, name in zip(x, names, strict=True):
        dense = weight
        if name != BASE:
            a, b, scaling = adapters[name]
            dense = weight + scaling * b @ a
        found.append(row @ dense.T)
    return torch.stack(found)


def mixed_linear(candidate: Callable[[Tensor, Tensor, Adapters, list[str]], Tensor], hint: int = 1) -> Report:
    """One layer, one batch, several adapters. Exercise B1 of lesson 09."""

    def compare(x: Tensor, weight: Tensor, adapters: Adapters, names: list[str], question: str, fix: str) -> None:
        untouched = x.clone()
        found = candidate(x, weight, adapters, list(names))
        right = row_by_row(untouched, weight, adapters, names)
        if not isinstance(found, Tensor) or found.shape != right.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise Wrong(f"for x {tuple(x.shape)} you return {shape}, expected {tuple(right.shape)}", question, fix)
        if not torch.equal(x, untouched):
            raise Wrong("your function changes x, which the caller still needs", question, "Write into new tensors.")
        for row, (name, ours, theirs) in enumerate(zip(names, right, found, strict=True)):
            if not torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9):
                who = next((n for n in {*names, BASE} if torch.allclose(
                    row_by_row(untouched, weight, adapters, [n] * len(names))[row], theirs, rtol=1e-9, atol=1e-9
                )), None)  # fmt: skip
                instead = f"the answer of {who!r}" if who else "the answer of no adapter"
                raise Wrong(f"names = {names}: row {row} should be {name!r} and is {instead}", question, fix)

    def one() -> None:
        for name in ("tax", "law", "code"):
            x, weight, adapters = draw(3, 4)
            compare(
                x, weight, adapters, [name] * 3,
                "With one adapter, what is added to x Wᵀ? Does the scale stand before it?",
                "x @ W.T + scaling * (x @ A.T @ B.T)",
            )  # fmt: skip

    def mixed() -> None:
        for names in (["law", "tax", "law", "code", "tax", "law"], ["tax", "code", "code", "tax", "law", "code"]):
            x, weight, adapters = draw(6, 4)
            compare(
                x, weight, adapters, names,
                "Where do the rows of an adapter go when its products are done?",
                "Remember the rows' numbers: y[rows] += scaling * (x[rows] @ A.T @ B.T).",
            )  # fmt: skip

    def base() -> None:
        x, weight, adapters = draw(4, 3)
        question, fix = "Which rows get no update?", f"Leave the rows named {BASE!r} at x @ W.T; all may be such rows."
        compare(x, weight, adapters, [BASE, "law", BASE, "tax"], question, fix)
        compare(x, weight, adapters, [BASE] * 4, question, fix)

    def shapes() -> None:
        names = ["law", BASE, "code", "law"]
        for shape in ((), (1,), (2, 3)):
            x, weight, adapters = draw(4, *shape)
            compare(
                x, weight, adapters, names,
                "Rows are the first dimension, features the last. Does your code count on exactly one between them?",
                "x[rows] @ A.T @ B.T works for any number of dimensions in between.",
            )  # fmt: skip

    def unknown() -> None:
        x, weight, adapters = draw(2, 3)
        for names in (["law", "pirate"], ["pirate", BASE]):
            try:
                candidate(x, weight, adapters, names)
            except KeyError:
                continue
            raise Wrong(
                f"names = {names}: 'pirate' is no adapter, and your function answers all the same",
                "Whose answer does the caller get, and how would they find out?",
                f"Raise KeyError for a name that is neither {BASE!r} nor in adapters.",
            )

    def products() -> None:
        x, weight, adapters = draw(9, 5)  # no group's rows × 5 is one of the weight's sizes, by which it is recognised
        names = ["law", "tax", BASE, "law", "tax", "law", "tax", "tax", "law"]
        with Products(weight) as counted:
            candidate(x, weight, adapters, names)
        if counted.with_weight > 1:
            raise Wrong(
                f"x is multiplied with the large weight {counted.with_weight} times",
                "Which product is the same for all rows?",
                "Compute x @ W.T once for the whole batch, before the adapters.",
            )
        if counted.small > 4:
            raise Wrong(
                f"two of three adapters occur, and there are {counted.small} small products instead of 4",
                "How many products does a group of rows need? Does code occur at all?",
                "Two products for each adapter that occurs: loop over the names in the batch, not over rows.",
            )

    steps = [
        ("one adapter for all rows", one),
        ("each row has its own adapter, in the order of the batch", mixed),
        ("rows of the base get no update", base),
        ("any number of dimensions between row and feature", shapes),
        ("an unknown name raises KeyError", unknown),
        ("the base once, a pair of small products per adapter that occurs", products),
    ]
    return run_steps("mixed batch", steps, hint)
