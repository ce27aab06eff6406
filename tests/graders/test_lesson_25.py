"""The check of lesson 25 passes right plans, leaves the stub alone, and names the mistake in plausible wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest

from found import each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.course.checks.lesson_25 import best_plan

pytestmark = pytest.mark.graders


def answer(**mistake) -> Callable:
    """An answer of the learner's own with one of the known mistakes; right without any."""

    def plan(job: dict):
        return best_plan(job, **mistake)

    return plan


def simple(job: dict):
    """DDP if it fits at all, else FSDP, without checkpointing if that fits."""
    for ways in (("DDP",), ("FSDP",)):
        if found := best_plan(job, ways=ways):
            return found
    return None


PLANS = {
    "gathered once an update": (answer(each_piece=False), "a slow link", "gathered the weights once an update"),
    "gathered once for both passes": (answer(gathers=1), "both ways fit, a slow link", "once for both passes"),
    "its own part sent": (answer(own_part=True), "a little ahead", "own part"),
    "no block": (answer(block=False), "nothing fits", "no block had to be whole"),
    "no gradients": (answer(gradients=False), "more than its weights", "adapter's gradients|moments"),
    "no moments": (answer(moments=False), "more than its weights", "adapter's gradients|moments"),
    "all rows at once": (answer(at_once=True), "the base fits", "activations of all rows"),
    "checkpointing for nothing": (answer(again=1), "the base fits", "checkpointing cost no time"),
    "smallest micro-batch": (answer(largest=False), "the base fits", "largest micro-batch"),
    "always FSDP": (answer(ways=("FSDP",)), "the base fits", "without DDP"),
    "always DDP": (answer(ways=("DDP",)), "a slow link", "without FSDP"),
    "DDP if it fits at all": (simple, "both ways fit, a fast link", "without FSDP"),
    "a sentence": (lambda job: "take DDP", "the base fits", "expected None or"),
    "seconds": (lambda job: 1.5, "the base fits", "expected None or"),
    "never None": (lambda job: best_plan(job) or ("FSDP", True, 1), "nothing fits", "expected None"),
}
test_plan_names_the_mistake = each_is_found(checks.plan, PLANS)


def by_filter(job: dict):
    """The same search, written the other way round: seconds and memory as functions."""
    gpus, rows = job["gpus"], job["rows"]

    def memory(way: str, checkpointed: bool, size: int) -> float:
        states = job["base"] + 2 * job["adapter"] + job["moments"]
        activations = size * (job["row_checkpointed"] if checkpointed else job["row"])
        return activations + (states if way == "DDP" else states / gpus + job["block"])

    def seconds(way: str, checkpointed: bool, size: int) -> float:
        gathered = 2 * (rows // size) * (job["base"] + job["adapter"])
        sent = 2 * job["adapter"] if way == "DDP" else gathered + job["adapter"]
        return rows * job["row_seconds"] * (1.5 if checkpointed else 1) + sent * (1 - 1 / gpus) / job["link"]

    plans = [
        each
        for each in product(("DDP", "FSDP"), (False, True), [n for n in range(1, rows + 1) if rows % n == 0])
        if memory(*each) <= job["card"]
    ]
    return min(plans, key=lambda each: (round(seconds(*each), 12), -each[2]), default=None)


test_other_plans_pass = each_passes(
    checks.plan, {"by filter": by_filter, "as a list": lambda job: _list(answer()(job))}
)


def _list(plan):
    return plan if plan is None else list(plan)


def test_the_answer_of_the_library_is_not_the_learners_own() -> None:
    assert "library's own" in checks.plan(partial(best_plan)).text
