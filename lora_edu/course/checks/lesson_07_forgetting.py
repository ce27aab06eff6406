"""Check of lesson 07: what was forgotten when a given loss is reached (C1)."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.lab.recording.records import read_record


def crossing(learned: Sequence[float], other: Sequence[float], target: float) -> float | None:
    """``other`` where ``learned`` first comes down to the target, in straight lines between the evaluations."""
    if learned[0] <= target:
        return other[0]
    for i in range(1, len(learned)):
        if learned[i] <= target:
            share = (learned[i - 1] - target) / (learned[i - 1] - learned[i])
            return other[i - 1] + share * (other[i] - other[i - 1])
    return None


def at_equal_quality(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise C1: ``candidate(learned, other, target)``, one loss where another first reaches the target."""
    place = "Find the first i with learned[i] <= target."
    line = "share = (learned[i-1] - target) / (learned[i-1] - learned[i]); other[i-1] + share * (other[i] - other[i-1])"

    def same(got: Any, value: float) -> bool:
        return isinstance(got, int | float) and math.isclose(got, value, rel_tol=1e-6)

    def ask(learned: list[float], other: list[float], target: float, question: str, fix: str) -> None:
        given = list(learned), list(other)
        got, right = candidate(*given, target), crossing(learned, other, target)
        if given != (learned, other):
            raise Wrong("your function changed its lists", "Does sort make a new list?", "Work on copies.")
        if got is None and right is None:
            return
        if right is not None and same(got, right):
            return
        last = next((i for i in range(len(learned) - 1, 0, -1) if learned[i] <= target < learned[i - 1]), None)
        near = min(range(len(learned)), key=lambda i: abs(learned[i] - target))
        low = min(range(len(learned)), key=learned.__getitem__)
        notes: list[tuple[float | None, str]] = [(other[low], "that is where the learned loss is lowest")]
        if right is not None:
            i = next(i for i, loss in enumerate(learned) if loss <= target)
            notes += [(other[i], "that is the first evaluation at or below the target, not the crossing before it")]
            notes += [(target, "that is the target itself"), (learned[i], "that is the learned loss")]
            if i:
                notes += [(other[i - 1] + other[i] - right, "the two evaluations have each other's weight")]
                notes += [(other[i - 1], "that is the evaluation before the target is reached")]
                notes += [((other[i - 1] + other[i]) / 2, "that is halfway, wherever the target lies")]
            notes += [(other[near], "that is the nearest evaluation")]
        if last is not None:
            notes += [(crossing(learned[last - 1 :], other[last - 1 :], target), "that is the last crossing")]
        notes += [(other[0], "that is the first evaluation"), (other[-1], "that is the last evaluation")]
        note = next((f": {words}" for value, words in notes if value is not None and same(got, value)), "")
        raise Wrong(
            f"learned={learned}, other={other}, target={target}: you give "
            + (f"{got!r}" if got is None or not isinstance(got, int | float) else f"{got:.4g}")
            + f", expected {right if right is None else round(right, 4)}{note}",
            question,
            fix,
        )

    def moves(start: float, *steps: float) -> list[float]:
        losses = [start]
        for step in steps:
            losses.append(round(losses[-1] + step, 2))
        return losses

    def other(count: int) -> list[float]:
        # three decimals and no value twice: then no slip looks like another
        return [value / 1000 for value in random.sample([v for v in range(4001, 6000) if v % 10], count)]

    def on_an_evaluation() -> None:
        learned = moves(5.0, *(-random.choice([0.2, 0.3, 0.4]) for _ in range(5)))
        ask(learned, other(6), learned[random.randint(1, 4)], "At which evaluation is the target reached?", place)

    def between() -> None:
        learned = moves(5.0, *(-random.choice([0.3, 0.4, 0.5]) for _ in range(5)))
        at = random.randint(1, 4)
        ask(
            learned, other(6), round(learned[at] + 0.1, 2),
            "Which two evaluations lie around the target, and how far is it from the earlier one?", line,
        )  # fmt: skip

    def first() -> None:
        learned = moves(5.0, -0.5, -0.5, 0.4, 0.3, -0.6, -0.5)
        ask(
            learned, other(7), 4.3,
            "The loss falls, rises and falls again. When is a run that stops at the target over?",
            place + " np.interp wants values that only rise; losses do not.",
        )  # fmt: skip

    def never() -> None:
        learned = moves(5.0, -0.4, -0.3, 0.1)
        ask(learned, other(4), 4.0, "Does this run ever come that far?", "Return None if no learned loss is so low.")

    def at_once() -> None:
        learned = moves(3.9, -0.4, -0.2)
        ask(
            learned, other(3), 4.0,
            "How many steps does a model need that is below the target from the start?",
            "If learned[0] <= target, return other[0]: there is no evaluation before it.",
        )  # fmt: skip

    def recorded() -> None:
        for run in random.sample(read_record("smollm2_finetuning")["runs"], 12):
            curves, target = run["curves"], random.choice([3.7, 3.8, 3.9, 4.2])
            ask(curves["validation"], curves["plain"], target, "Does it work on 13 evaluations?", f"{place} {line}")

    steps: list[Step] = [
        ("a target that is met by an evaluation", on_an_evaluation),
        ("a target between two evaluations", between),
        ("the first time counts", first),
        ("None where it is never reached", never),
        ("below from the start", at_once),
        ("recorded curves", recorded),
    ]
    return run_steps("forgetting at equal quality", steps, hint)
