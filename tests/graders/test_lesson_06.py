"""The checks of lesson 06 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from found import each_is_found, each_passes
from lora_edu.counting.memory import training_memory
from lora_edu.course import checks

pytestmark = pytest.mark.graders


def states(total: Callable[..., float]) -> Callable[..., float]:
    """An answer to A1 from a formula in (frozen, trained, frozen_bytes, weight, gradient, moment, master)."""
    return lambda f, t, b, w, g, m, master=0: total(f, t, b, w, g, m, master)


STATE_BYTES = {
    "one moment": (states(lambda f, t, b, w, g, m, k: f * b + t * (w + g + m + k)), "full", "two moments"),
    "no gradients": (states(lambda f, t, b, w, g, m, k: f * b + t * (w + 2 * m + k)), "full", "gradients are missing"),
    "no moments": (states(lambda f, t, b, w, g, m, k: f * b + t * (w + g + k)), "full", "moments are missing"),
    "no weights": (states(lambda f, t, b, w, g, m, k: f * b + t * (g + 2 * m + k)), "full", "numbers themselves"),
    "frozen forgotten": (states(lambda f, t, b, w, g, m, k: t * (w + g + 2 * m + k)), "frozen base", "stay in memory"),
    "everything trains": (
        states(lambda f, t, b, w, g, m, k: (f + t) * (w + g + 2 * m + k)),
        "frozen base",
        "a gradient and moments",
    ),
    "frozen as wide as trained": (
        states(lambda f, t, b, w, g, m, k: f * w + t * (w + g + 2 * m + k)),
        "frozen base",
        "take frozen_bytes",
    ),
    "no master": (states(lambda f, t, b, w, g, m, k: f * b + t * (w + g + 2 * m)), "master copy", "master copy is"),
    "master has no default": (lambda f, t, b, w, g, m, k: f * b + t * (w + g + 2 * m + k), "equal to the", "raised"),
}
STATE_BYTES["nothing returned"] = (lambda *given: None, "full fine-tuning", "expected a number")


def in_turn(frozen: int, trained: int, frozen_bytes: float, weight: int, gradient: int, moment: int, master: int = 0):
    return sum([frozen * frozen_bytes, *(trained * each for each in (weight, gradient, moment, moment, master))])


RIGHT_BYTES = {"in turn": in_turn, "in NumPy's floats": lambda *given: np.float64(in_turn(*given))}
test_other_sums_pass = each_passes(checks.state_bytes, RIGHT_BYTES)
test_state_bytes_names_the_mistake = each_is_found(checks.state_bytes, STATE_BYTES)


READ = {"asked": 0.25, "live": 132.55, "cached": 6.45, "outside": 0.74, "phase": "forward", "helps": "cdf"}


def reading(**changed: object) -> Callable[[], dict]:
    """The right answers to A2 with some of them changed."""
    return lambda: READ | changed


def without_outside() -> dict:
    return {name: value for name, value in READ.items() if name != "outside"}


OUT_OF_MEMORY = {
    "MiB": (reading(asked=256), "asked for", "GiB"),
    "thousands": (reading(asked=0.256), "asked for", "1024 MiB"),
    "all of the process": (reading(live=139.74), "is live", "all that the process holds"),
    "reserved as live": (reading(live=139.0), "is live", "reserved and unused"),
    "live as cached": (reading(cached=132.55), "is cached", "what tensors hold"),
    "cached counted as outside": (reading(outside=7.19), "does not hold", "reserved is still in it"),
    "free as outside": (reading(outside=139.80 - 139.74), "does not hold", "this is what is free"),
    "backward": (reading(phase="backward"), "where the step stopped", "autograd's"),
    "what the message suggests": (reading(helps="acdf"), "changes help", "what is cached and no more"),
    "a lower rank": (reading(helps="bcdf"), "changes help", "rank hardly enters"),
    "a loss in pieces": (reading(helps="cdef"), "changes help", "small part"),
    "one change forgotten": (reading(helps="cd"), "changes help", "leave it out"),
    "another letter": (reading(helps="cdfg"), "changes help", "none of the letters"),
    "no list": (reading(helps=None), "changes help", "leave it out"),
    "an entry missing": (without_outside, "does not hold", "expected a dictionary"),
    "no dictionary": (lambda: (0.25, 132.55), "asked for", "expected a dictionary"),
}
RIGHT_READINGS = {
    "computed": lambda: READ | {"asked": 256 / 1024, "outside": 139.74 - 132.55 - 6.45, "helps": ["c", "d", "f"]},
    "in words": reading(helps="c, d and f"),
    "in NumPy's floats": lambda: READ | {name: np.float64(READ[name]) for name in ("asked", "live", "cached")},
}
test_other_readings_pass = each_passes(checks.out_of_memory, RIGHT_READINGS)
test_out_of_memory_names_the_mistake = each_is_found(checks.out_of_memory, OUT_OF_MEMORY)


def listener(
    skip_own: bool = True,
    once: bool = True,
    size: Callable[[Tensor], int] = lambda tensor: tensor.untyped_storage().nbytes(),
    trainable_only: bool = False,
) -> Callable[[nn.Module, Callable[[], Tensor]], int]:
    """A right answer to B1 with places to go wrong."""

    def kept(model: nn.Module, forward: Callable[[], Tensor]) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad or not trainable_only}
        seen: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
            forward()
        if skip_own:
            seen = [tensor for tensor in seen if tensor.untyped_storage().data_ptr() not in own]
        if once:
            seen = list({tensor.untyped_storage().data_ptr(): tensor for tensor in seen}.values())
        return sum(map(size, seen))

    return kept


def by_identity(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    own = {id(parameter) for parameter in model.parameters()}
    seen: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(id(t), t), lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in own)


def outputs_only(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    return forward().untyped_storage().nbytes()


KEPT_BYTES = {
    "parameters counted": (listener(skip_own=False), "small network", "own parameters are in your sum"),
    "everything added": (
        listener(skip_own=False, once=False),
        "small network",
        "own parameters are in your sum|add every",
    ),
    "numbers, not bytes": (listener(size=lambda t: t.numel()), "small network", "numbers, not bytes"),
    "by the tensor's identity": (by_identity, "small network", "bytes, autograd keeps"),
    "the output only": (outputs_only, "small network", "the result of forward"),
    "repetitions counted": (listener(once=False), "small network", "count it once"),
    "a view's own size": (listener(size=lambda t: t.numel() * t.element_size()), "view", "whole memory behind it"),
    "frozen weights counted": (listener(trainable_only=True), "a frozen layer", "own parameters are in your sum"),
}
KEPT_BYTES["nothing returned"] = (lambda model, forward: None, "small network", "expected a whole number")
test_kept_bytes_names_the_mistake = each_is_found(checks.kept_bytes, KEPT_BYTES)


def test_listener_without_a_mistake_passes() -> None:
    assert checks.kept_bytes(listener())


def planner(
    reserve: float = 2,
    unit: float = 2**30,
    orders: Sequence[bool] = (False, True),
    adds_up: bool = True,
    pieces: int | None = 512,
    nothing: object = None,
    smallest_first: bool = False,
) -> Callable[..., dict | None]:
    """A right answer to B2 with places to go wrong."""

    def plan(model: nn.Module, method: str, gib: float, tokens: int, rows: int) -> dict | None:
        loss_rows, precision = (None, "bf16") if method == "full" else (pieces, "fp32-adapter")
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        for checkpointing in orders:
            for micro in divisors if smallest_first else divisors[::-1]:
                options = {"batch": micro, "tokens": tokens, "checkpointing": checkpointing, "loss_rows": loss_rows}
                e = training_memory(model, method, precision, r=16, target_modules="all-linear", **options)
                peak = e.states + e.activations if adds_up and micro < rows else e.peak
                if peak <= (gib - reserve) * unit:
                    found = {"micro_batch": micro, "accumulation": rows // micro}
                    return found | {"checkpointing": checkpointing, "loss_rows": loss_rows}
        return nothing

    return plan


def changed_plan(**changed: object) -> Callable[..., dict | None]:
    """The right plan with some entries changed, where there is one."""

    def plan(*job: object) -> dict | None:
        right = planner()(*job)
        return right and right | changed

    return plan


SIZE_JOB = {
    "reserve forgotten": (planner(reserve=0), "before checkpointing", "stay free"),
    "GB for GiB": (planner(unit=1e9), "just fits", "2**30"),
    "checkpointing always": (planner(orders=(True,)), "just fits", "without it"),
    "never checkpointing": (planner(orders=(False,)), "Llama-3-8B", "you find nothing"),
    "the larger of gradients and activations": (planner(adds_up=False), "full fine-tuning", "are there together"),
    "all logits at once": (planner(pieces=None), "just fits|Llama-3-8B", "pieces"),
    "one row at a time": (planner(smallest_first=True), "just fits", "micro-batches of 8 fit"),
    "no accumulation": (changed_plan(accumulation=1), "before checkpointing", "are not"),
    "less than nothing": (changed_plan(micro_batch=-1, accumulation=-8), "just fits", "are not"),
    "zero for nothing": (planner(nothing=0), "does not fit at all", "nothing fits"),
    "pieces with a head that trains": (changed_plan(loss_rows=512), "full fine-tuning", "frozen head"),
    "half a row": (changed_plan(micro_batch=0.5), "just fits", "half a row"),
    "a tuple": (lambda *job: (8, 1, False, 512), "just fits", "expected a dictionary"),
}


def by_hand(model: nn.Module, method: str, gib: float, tokens: int, rows: int) -> dict | None:
    """All plans, the best one by sorting; pieces of another size."""
    full = method == "full"
    plans = []
    for checkpointing, micro in itertools.product((False, True), range(1, rows + 1)):
        if rows % micro:
            continue
        e = training_memory(
            model, method, "bf16" if full else "fp32-adapter", r=16, target_modules="all-linear", batch=micro,
            tokens=tokens, checkpointing=checkpointing, loss_rows=None if full else 256,
        )  # fmt: skip
        held = e.states - e.gradients
        top = max(e.gradients, e.activations) if micro == rows else e.gradients + e.activations
        if (held + top) / 2**30 + 2 <= gib:
            plans.append((checkpointing, -micro))
    if not plans:
        return None
    checkpointing, micro = min(plans)
    found = {"micro_batch": -micro, "accumulation": rows // -micro, "checkpointing": checkpointing}
    return found | {"loss_rows": None if full else 256}


test_other_plans_pass = each_passes(checks.size_job, {"from the top": planner(), "all plans": by_hand})
test_size_job_names_the_mistake = each_is_found(checks.size_job, SIZE_JOB)


def quartiles(ratios: Sequence[float], method: str = "inclusive") -> tuple[float, float]:
    low, _, high = statistics.quantiles(ratios, n=4, method=method)
    return low, high


def ratio_answer(first: Callable, ends: Callable = quartiles, flip: bool = False) -> Callable:
    """An answer to C1: the first number from (a, b, ratios), the others from the ratios."""

    def answer(a: Sequence[float], b: Sequence[float]) -> tuple:
        a, b = (b, a) if flip else (a, b)
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        return (first(a, b, ratios), *ends(ratios))

    return answer


def right(a: Sequence[float], b: Sequence[float], ratios: Sequence[float]) -> float:
    return statistics.median(ratios)


PAIRED_RATIO = {
    "ratio of medians": (
        ratio_answer(lambda a, b, q: statistics.median(a) / statistics.median(b)),
        "different speed",
        "no longer paired",
    ),
    "ratio of means": (
        ratio_answer(lambda a, b, q: statistics.mean(a) / statistics.mean(b)),
        "different speed",
        "ratio of the two means",
    ),
    "mean of the ratios": (ratio_answer(lambda a, b, q: statistics.mean(q)), "different speed", "mean of the ratios"),
    "fastest times": (ratio_answer(lambda a, b, q: min(a) / min(b)), "different speed", "two fastest times"),
    "upside down": (ratio_answer(right, flip=True), "different speed", "b over a"),
    "whole range": (ratio_answer(right, lambda q: (min(q), max(q))), "different speed", "smallest and the largest"),
    "quartiles exchanged": (
        ratio_answer(right, lambda q: quartiles(q)[::-1]),
        "different speed",
        "lower quartile comes first",
    ),
    "exclusive quartiles": (
        ratio_answer(right, lambda q: quartiles(q, "exclusive")),
        "different speed",
        "not the quartiles",
    ),
    "lower middle value": (
        ratio_answer(lambda a, b, q: statistics.median_low(q)),
        "even number",
        "not the median of a[i]/b[i]",
    ),
    "one number": (lambda a, b: statistics.median(a), "different speed", "expected three numbers"),
}
PAIRED_RATIO["tensors"] = (lambda a, b: (torch.ones(3),) * 3, "different speed", "expected a number")
RIGHT_RATIO = {
    "NumPy's percentiles": lambda a, b: tuple(np.percentile(np.divide(a, b), [50, 25, 75])),
    "a list from PyTorch": lambda a, b: [
        (torch.tensor(a, dtype=torch.float64) / torch.tensor(b, dtype=torch.float64)).quantile(q).item()
        for q in (0.5, 0.25, 0.75)
    ],
}
test_other_ratios_pass = each_passes(checks.paired_ratio, RIGHT_RATIO)
test_paired_ratio_names_the_mistake = each_is_found(checks.paired_ratio, PAIRED_RATIO)
