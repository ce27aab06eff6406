"""The checks of lesson 11 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from found import by_class, each_is_found, each_passes
from lora_edu.course import checks

pytestmark = pytest.mark.graders


def in_place(ids: Tensor, mask: Tensor) -> Tensor:
    ids[mask == 0] = -100
    return ids


def shifted(ids: Tensor, mask: Tensor) -> Tensor:
    labels = ids.masked_fill(mask == 0, -100)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


LABELS = {
    "by the id of the padding": (lambda i, m: i.masked_fill(i == 2, -100), "ends the text", "will never stop"),
    "nothing masked": (lambda i, m: i.clone(), "padding is left out", "padding positions still count"),
    "the mask upside down": (lambda i, m: i.masked_fill(m == 1, -100), "padding is left out", "still count"),
    "zero instead of -100": (lambda i, m: i * m, "padding is left out", "still count"),
    "changes its input": (in_place, "input_ids", "fed -100"),
    "shifted by hand": (shifted, "ends the text", "left out"),
    "only the end counts": (
        lambda i, m: i.masked_fill(m.cumsum(1) != m.sum(1, keepdim=True), -100).masked_fill(m == 0, -100),
        "own label",
        "another label",
    ),
    "flattened": (lambda i, m: i.masked_fill(m == 0, -100).flatten(), "padding is left out", "your labels are ("),
}


def nothing_is_padding(ids: Tensor, mask: Tensor) -> Tensor:
    """Overwrites the mask, so that a check which looks at it later finds no padding."""
    mask.fill_(1)
    return ids.clone()


LABELS["the mask overwritten"] = (nothing_is_padding, "padding is left out", "padding positions still count")
RIGHT_LABELS = {
    "where": lambda i, m: torch.where(m.bool(), i, -100),
    "an index": lambda i, m: i.clone().index_put_((m == 0,), torch.tensor(-100)),
    "arithmetic": lambda i, m: i * m - 100 * (1 - m),
}
test_other_labels_pass = each_passes(checks.labels_without_padding, RIGHT_LABELS)
test_labels_name_the_mistake = each_is_found(checks.labels_without_padding, LABELS)


def linear(model: nn.Module, keep: Callable[[str], bool]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and keep(name)]


BLOCKS = {
    "part of a name": (
        lambda m, i: linear(m, lambda n: f"layers.{i}" in n), "more than ten", "10.",
    ),
    "everything with the name": (
        lambda m, i: [n for n, _ in m.named_modules() if f"layers.{i}." in n], "fewer than ten", "needs a weight",
    ),
    "the number anywhere": (
        lambda m, i: linear(m, lambda n: f".{i}." in n), "other numbered", "experts",
    ),
    "only direct children": (
        lambda m, i: linear(m, lambda n: n.split(".")[-3:-1] == ["layers", str(i)]), "fewer than ten", "is not among",
    ),
    "first digit": (
        lambda m, i: linear(m, lambda n: n.split("layers.")[-1][0] == str(i)), "more than ten", "too many",
    ),
    "counts from one": (
        lambda m, i: linear(m, lambda n: f"layers.{i - 1}." in n), "fewer than ten", "you also return",
    ),
    "nothing found": (lambda m, i: [], "fewer than ten", "is not among"),
    "endings only": (
        lambda m, i: [n.split(".")[-1] for n in linear(m, lambda n: f"layers.{i}." in n)], "fewer", "is no module",
    ),
}  # fmt: skip
BLOCKS |= {
    "names twice": (lambda m, i: 2 * linear(m, lambda n: f"layers.{i}." in n), "fewer than ten", "twice"),
    "nothing returned": (lambda m, i: None, "fewer than ten", "you return None"),
}
RIGHT_BLOCKS = {
    "a pattern": lambda m, i: linear(m, lambda n: re.search(rf"(^|\.)layers\.{i}\.", n)),
    "from the block itself": lambda m, i: next(
        [f"{name}.{inner}" for inner, each in block.named_modules() if isinstance(each, nn.Linear)]
        for name, block in m.named_modules()
        if f".{name}".endswith(f".layers.{i}")
    ),
    "a generator": lambda m, i: (name for name in linear(m, lambda n: f".layers.{i}." in f".{n}")),
}
test_other_blocks_pass = each_passes(checks.linear_layers_of_block, RIGHT_BLOCKS)
test_blocks_name_the_mistake = each_is_found(checks.linear_layers_of_block, BLOCKS)


class Right(nn.Module):
    """The right layer; each wrong one below changes one thing."""

    def __init__(self, layer: Any, lora_A: Tensor, lora_B: Tensor, scaling: float):
        super().__init__()
        self.linear, self.lora_A, self.lora_B, self.scaling = layer, lora_A, lora_B, scaling
        self.merged = False

    def update(self) -> Tensor:
        return self.scaling * self.lora_B @ self.lora_A

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.merged else self.linear(x) + x @ self.update().T

    def merge(self) -> None:
        if not self.merged:
            self.linear.weight.data += self.update()
            self.merged = True

    def unmerge(self) -> None:
        if self.merged:
            self.linear.weight.data -= self.update()
            self.merged = False


class NoFlagInForward(Right):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.update().T


class NoFlagInMerge(Right):
    def merge(self) -> None:
        self.linear.weight.data += self.update()
        self.merged = True


class NoFlagInUnmerge(Right):
    def unmerge(self) -> None:
        self.linear.weight.data -= self.update()
        self.merged = False


class OnlyTheFlag(Right):
    def merge(self) -> None:
        self.merged = True


class NoScale(Right):
    def update(self) -> Tensor:
        return self.lora_B @ self.lora_A


class ScaleForgottenInMerge(Right):
    def merge(self) -> None:
        if not self.merged:
            self.linear.weight.data += self.lora_B @ self.lora_A
            self.merged = True


class ZeroesB(Right):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.update().T

    def merge(self) -> None:
        self.linear.weight.data += self.update()
        self.lora_B = torch.zeros_like(self.lora_B)


class HiddenElsewhere(Right):
    """Never touches the weight: right in every output, but nothing to save."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.update().T

    def merge(self) -> None:
        self.merged = True

    def unmerge(self) -> None:
        self.merged = False


class FlagNotReset(Right):
    def unmerge(self) -> None:
        if self.merged:
            self.linear.weight.data -= self.update()


MERGING = {
    NoFlagInForward: ("merged, it counts once", "adds 2.0 × the update"),
    NoFlagInMerge: ("merging again", "adds 2.0 × the update"),
    NoFlagInUnmerge: ("unmerge brings", "adds 0.0 × the update"),
    OnlyTheFlag: ("merged, it counts once", "adds 0.0 × the update"),
    NoScale: ("unmerged", "adds 0.7 × the update"),
    ScaleForgottenInMerge: ("merged, it counts once", "adds 0.7 × the update"),
    ZeroesB: ("the merged weight", "lora_B is no longer what it was"),
    HiddenElsewhere: ("the merged weight", "is not W + s·BA"),
    FlagNotReset: ("unmerge brings", "adds 0.0 × the update"),
}
test_merging_names_the_mistake = each_is_found(checks.merging_layer, by_class(MERGING))


def doctor(*, skip: str = "", zero_is_missing: bool = False, step: bool = False, leave: bool = False) -> Callable:
    """The solution, with one examination left out or one thing done too much."""

    def triage(model: Any, batch: dict[str, Tensor]) -> str:
        training = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if skip != "no label counts" and (batch["labels"] == -100).all():
            return "no label counts"
        if skip != "nothing trains" and not training:
            return "nothing trains"
        if skip != "the base trains" and any("lora_" not in name for name in training):
            return "the base trains"
        loss = model(**batch).loss
        if skip != "not finite" and not torch.isfinite(loss):
            return "not finite"
        if skip != "no graph" and not loss.requires_grad:
            return "no gradient"
        loss.backward()
        gradients = [p.grad for p in training.values()]
        if step:
            torch.optim.SGD(training.values(), lr=0.1).step()
        if not leave:
            model.zero_grad()
        missing = any(g is None or (zero_is_missing and not g.any()) for g in gradients)
        return "no gradient" if missing and skip != "no gradient" else "healthy"

    return triage


TRIAGE = {
    "always healthy": (lambda m, b: "healthy", "nothing trains", "gets the verdict 'healthy'"),
    "zero taken for missing": (doctor(zero_is_missing=True), "a healthy run", "gets the verdict 'no gradient'"),
    "frozen taken for cut off": (doctor(skip="nothing trains"), "nothing trains", "gets the verdict 'no gradient'"),
    "base not looked at": (doctor(skip="the base trains"), "the base trains", "gets the verdict"),
    "labels not looked at": (doctor(skip="no label counts"), "no label counts", "gets the verdict 'not finite'"),
    "numbers not looked at": (doctor(skip="not finite"), "not finite", "gets the verdict 'healthy'"),
    "gradients not looked at": (doctor(skip="no gradient"), "one block is cut off", "gets the verdict 'healthy'"),
    "backward raises": (doctor(skip="no graph"), "everything is cut off", "your code raised RuntimeError"),
    "takes a step": (doctor(step=True), "as it was", "changed the model"),
    "leaves gradients": (doctor(leave=True), "as it was", "gradients are left behind"),
    "no return": (lambda m, b: None, "a healthy run", "your verdict is None"),
}
TRIAGE["values of gradients not looked at"] = (doctor(), "a gradient that is not", "gets the verdict 'healthy'")
test_triage_names_the_mistake = each_is_found(checks.triage, TRIAGE)


Entries = list[dict[str, str]]


def by_entry(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    order = random.Random(seed).sample(entries, len(entries))
    cut = round(share * len(entries))
    return order[cut:], order[:cut]


def shuffles_the_input(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    random.Random(seed).shuffle(entries)
    return by_word(entries, share, seed)


def by_word(
    entries: Entries, share: float, seed: int, draw: Callable[[int], Any] = random.Random
) -> tuple[Entries, Entries]:
    words = sorted({entry["word"] for entry in entries})
    draw(seed).shuffle(words)
    held = set(words[: round(share * len(words))])
    return [e for e in entries if e["word"] not in held], [e for e in entries if e["word"] in held]


def seeds_everybody(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    random.seed(seed)
    return by_word(entries, share, seed, draw=lambda _: random)


def one_entry_a_word(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    return by_word(list({entry["word"]: entry for entry in entries}.values()), share, seed)


SPLITS = {
    "draws entries": (by_entry, "no headword", "headwords are in both"),
    "shuffles what it was given": (shuffles_the_input, "exactly one part", "changed the list"),
    "drops second definitions": (one_entry_a_word, "exactly one part", "entries went in"),
    "the two swapped": (lambda e, s, r: by_word(e, s, r)[::-1], "the size", "of the words are held out"),
    "nothing held out": (lambda e, s, r: (list(e), []), "the size", "0% of the words"),
    "no seed": (
        lambda e, s, r: by_word(e, s, r, draw=lambda _: random.Random(random.random())), "the seed", "two different",
    ),
    "the seed ignored": (lambda e, s, r: by_word(e, s, 0), "the seed", "the same split"),
    "seeds everybody": (seeds_everybody, "random numbers", "reseeds"),
}  # fmt: skip


def by_permutation(entries: Entries, share: float, seed: int) -> tuple[Entries, Entries]:
    torch.manual_seed(seed)
    words = sorted({entry["word"] for entry in entries})
    held = {words[i] for i in torch.randperm(len(words))[: round(share * len(words))]}
    return [e for e in entries if e["word"] not in held], [e for e in entries if e["word"] in held]


def by_numpy(entries: Entries, share: float, seed: int) -> list[Entries]:
    words = list(dict.fromkeys(entry["word"] for entry in entries))
    held = {str(word) for word in np.random.default_rng(seed).permutation(words)[: round(share * len(words))]}
    parts: list[Entries] = [[], []]
    for entry in entries:
        parts[entry["word"] in held].append(entry)
    return parts


SPLITS["seeds PyTorch"] = (by_permutation, "random numbers", "PyTorch's own random numbers")
test_other_splits_pass = each_passes(checks.honest_split, {"drawn words": by_word, "NumPy's generator": by_numpy})
test_split_names_the_mistake = each_is_found(checks.honest_split, SPLITS)
