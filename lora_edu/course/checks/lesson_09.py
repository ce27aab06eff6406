"""Checks of lesson 09: undo a merge (A1), and when merging pays (C1)."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_edu.course.checks.report import Report, Wrong, run_steps


def merged_weight(candidate: Callable[[Tensor], Any], hint: int = 1) -> Report:
    """A weight that updates are merged into and taken out of. Exercise A1 of lesson 09."""

    def drawn(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Any]:
        weight = torch.randn(random.randint(20, 30), random.randint(31, 40)).to(dtype)
        delta = 0.03 * torch.randn(weight.shape)
        return weight, delta, candidate(weight)

    def exact() -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weight, delta, slot = drawn(dtype)
            right = (weight.float() + delta).to(dtype)
            slot.merge(delta)
            if slot.weight.dtype != dtype:
                raise Wrong(
                    f"after merging, a {dtype} weight is {slot.weight.dtype}",
                    "What is the type of a half-precision tensor plus a float32 tensor?",
                    "Add in place, self.weight += delta: that computes in float32 and rounds to the weight's own type.",
                )
            if not torch.equal(slot.weight, right):
                off = (slot.weight != right).float().mean().item()
                raise Wrong(
                    f"{off:.0%} of the merged {dtype} weights are not the exact sum, rounded once",
                    "Is anything rounded before the sum is taken, or is something else than the update added?",
                    "Do not convert delta: self.weight += delta adds in float32 and rounds the sum once.",
                )

    def in_use() -> None:
        weight, delta, slot = drawn()
        slot.merge(delta)
        if slot.weight is not weight:
            raise Wrong(
                "after merging, self.weight is another tensor; the model goes on with the old one",
                "Which operations write into a tensor, and which make a new one?",
                "self.weight += delta and self.weight.copy_(…) write in place; self.weight = … makes a new one.",
            )
        slot.unmerge()
        if slot.weight is not weight:
            raise Wrong(
                "after unmerging, self.weight is another tensor; the model goes on with the merged one",
                "Which operations write into a tensor, and which make a new one?",
                "self.weight.copy_(self.kept) writes the kept values into the tensor that the model uses.",
            )

    def back() -> None:
        weight, delta, slot = drawn()
        before = weight.clone()
        slot.merge(delta)
        merged = weight.clone()
        slot.unmerge()
        if torch.equal(weight, merged):
            raise Wrong(
                "after unmerging, the weight is still the merged one",
                "Did you keep the values of the weight, or a second name for the same tensor?",
                "Keep a copy: self.kept = self.weight.clone(), before anything is added.",
            )
        if not torch.equal(weight, before):
            off = (weight != before).float().mean().item()
            raise Wrong(
                f"after merging and unmerging, {off:.0%} of the weights are not what they were",
                "In bfloat16, is w + d − d equal to w?",
                "Do not subtract: keep a clone of the weight when merging, and copy it back.",
            )

    def several() -> None:
        weight, delta, slot = drawn()
        before, other = weight.clone(), torch.flip(delta, [0])
        slot.merge(delta)
        right = (weight.float() + other).bfloat16()
        slot.merge(other)
        if not torch.equal(weight, right):
            raise Wrong(
                "a second update, merged on top of the first, does not add to it",
                "What does your second merge start from?",
                "Add to self.weight as it is; only the kept copy is older.",
            )
        slot.unmerge()
        if not torch.equal(weight, before):
            raise Wrong(
                "after two merges, unmerge does not bring the pretrained weight back",
                "What does the second merge write over?",
                "Keep a copy only if there is none yet: if self.kept is None: …",
            )

    def again() -> None:
        weight, delta, slot = drawn()
        before = weight.clone()
        slot.unmerge()
        if not torch.equal(weight, before):
            raise Wrong(
                "unmerging a weight that was never merged changes it",
                "What is self.kept then?",
                "Do nothing if self.kept is None.",
            )
        slot.merge(delta)
        slot.unmerge()
        weight.mul_(2)  # another base is loaded into the same tensor
        before = weight.clone()
        slot.unmerge()
        slot.merge(delta)
        slot.unmerge()
        if not torch.equal(weight, before):
            raise Wrong(
                "the weight was changed elsewhere after unmerging, and the next merge and unmerge undo that",
                "What does your object still hold after unmerging?",
                "When unmerging, set self.kept = None.",
            )

    steps = [
        ("merged, the weight is the exact sum, rounded once", exact),
        ("the tensor that the model uses stays in use", in_use),
        ("unmerged, every weight has its old bits", back),
        ("two merges, one unmerge: the pretrained weight", several),
        ("unmerging twice, or first, does no harm", again),
    ]
    return run_steps("undo a merge", steps, hint)


def merging_pays(candidate: Callable[[float, float, float], Any], hint: int = 1) -> Report:
    """After how many forward passes merging is the quicker way. Exercise C1 of lesson 09."""

    def ask(unmerged: float, merged: float, change: float, right: int | None) -> None:
        answer = candidate(unmerged, merged, change)
        given = f"unmerged {unmerged}, merged {merged}, merging and unmerging {change}"
        if right is None and answer is not None:
            raise Wrong(
                f"{given}: you answer {answer!r}; merging never gets quicker there",
                "What does one pass gain by merging, and can the gain be zero or less?",
                "If unmerged <= merged, return None.",
            )
        if right is not None and (isinstance(answer, bool) or not isinstance(answer, int)):
            raise Wrong(
                f"{given}: you answer {answer!r}, a {type(answer).__name__}; expected the whole number {right}",
                "What type does your function return?",
                "Passes are counted: return an int (math.floor gives one).",
            )
        if answer != right:
            raise Wrong(
                f"{given}: you answer {answer}; with {right} passes merging takes {change + (right or 0) * merged}, "
                f"not merging {(right or 0) * unmerged}, and with one pass less it is not quicker",
                "Write down both times for n passes. For which n is the one below the other?",
                "change + n · merged < n · unmerged: the first whole n above change / (unmerged − merged).",
            )

    def plain() -> None:
        for _ in range(20):
            merged, gain = random.randint(3, 40), random.randint(2, 30)
            change = gain * random.randint(1, 30) + random.randint(1, gain - 1)
            ask(merged + gain, merged, change, change // gain + 1)

    def ties() -> None:
        for _ in range(20):
            merged, gain, passes = random.randint(3, 40), random.randint(1, 30), random.randint(1, 30)
            ask(merged + gain, merged, gain * passes, passes + 1)

    def never() -> None:
        unmerged = random.randint(3, 40)
        ask(unmerged, unmerged, 7, None)
        ask(unmerged, unmerged + 2, 7, None)
        ask(unmerged, unmerged + 2, 0, None)

    def free() -> None:
        ask(random.randint(8, 20), random.randint(3, 7), 0, 1)

    def seconds() -> None:
        ask(0.75, 0.5, 0.625, 3)
        ask(0.0078125, 0.0068359375, 3.5, 3585)

    steps = [
        ("the first number of passes at which merging is quicker", plain),
        ("equal times are not quicker", ties),
        ("None where it never is", never),
        ("a merge that costs nothing pays at once", free),
        ("seconds with fractions", seconds),
    ]
    return run_steps("when merging pays", steps, hint)
