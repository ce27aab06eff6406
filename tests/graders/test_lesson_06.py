"""The checks of lesson 06 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from found import each_is_found, each_passes
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


def operations(frozen: int, trained: int, again_frozen: int = 2, again_trained: int = 2) -> Callable[..., int]:
    """An answer to A2 with its four factors."""

    def count(f: int, t: int, tokens: int, checkpointing: bool = False) -> int:
        more = checkpointing * (again_frozen * f + again_trained * t)
        return tokens * (frozen * f + trained * t + more)

    return count


OPERATIONS = {
    "frozen weights forward only": (operations(2, 6), "frozen weights", "the gradient crosses"),
    "six for all": (operations(6, 6), "frozen weights", "no gradient of its own"),
    "frozen weights for nothing": (operations(0, 6, 0), "frozen weights", "work in the forward pass"),
    "two for LoRA, four for full": (operations(2, 4), "full fine-tuning", "leave out the forward pass"),
    "a multiply-add as one": (operations(2, 3, 1, 1), "full fine-tuning", "two operations"),
    "no second forward": (operations(4, 6, 0, 0), "checkpointing", "a second time"),
    "second forward of the trained only": (operations(4, 6, 0, 2), "checkpointing", "frozen weights a second time"),
    "second forward of the frozen only": (operations(4, 6, 2, 0), "checkpointing", "trained weights a second time"),
    "the whole step twice": (operations(4, 6, 4, 6), "checkpointing", "not the whole step"),
    "tokens forgotten": (lambda f, t, tokens, checkpointing=False: 4 * f + 6 * t, "full", "grow with the tokens"),
}
OPERATIONS["nothing returned"] = (lambda *given: None, "full fine-tuning", "expected a number")


def pass_by_pass(frozen: int, trained: int, tokens: int, checkpointing: bool = False) -> int:
    forward = 2 * tokens * (frozen + trained)
    of_inputs, of_weights = forward, 2 * tokens * trained
    return forward * (1 + checkpointing) + of_inputs + of_weights


test_other_operations_pass = each_passes(checks.step_operations, {"pass by pass": pass_by_pass})
test_step_operations_names_the_mistake = each_is_found(checks.step_operations, OPERATIONS)


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


def search(
    unit: float = 2**30,
    fits: Callable[[float, float], bool] = lambda p, room: p <= room,
    keep: bool = True,
    low: int = 0,
) -> Callable[..., int]:
    """A right answer to B2 with places to go wrong."""

    def largest(peak: Callable[[int], float], gib: float, reserve: float = 1.0, limit: int = 65_536) -> int:
        room = (gib - (reserve if keep else 0)) * unit
        good, bad = low, limit + 1
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if fits(peak(middle), room) else (good, middle)
        return good

    return largest


def extrapolate(peak: Callable[[int], float], gib: float, reserve: float = 1.0, limit: int = 65_536) -> int:
    one, two = peak(1), peak(2)
    slope = max(two - one, 1e-9)
    return max(0, min(limit, int(((gib - reserve) * 2**30 - one) / slope) + 1))


def one_by_one(peak: Callable[[int], float], gib: float, reserve: float = 1.0, limit: int = 65_536) -> int:
    batch = 0
    while batch < limit and peak(batch + 1) <= (gib - reserve) * 2**30:
        batch += 1
    return batch


def doubling(peak: Callable[[int], float], gib: float, reserve: float = 1.0, limit: int = 65_536) -> int:
    batch = 1
    while 2 * batch <= limit and peak(2 * batch) <= (gib - reserve) * 2**30:
        batch *= 2
    return batch if peak(batch) <= (gib - reserve) * 2**30 else 0


def no_limit(peak: Callable[[int], float], gib: float, reserve: float = 1.0, limit: int = 65_536) -> int:
    return search()(peak, gib, reserve, 65_536)


LARGEST_BATCH = {
    "GB for GiB": (search(unit=1e9), "grows evenly", "2**30"),
    "reserve forgotten": (search(keep=False), "grows evenly", "for the CUDA context"),
    "one by one": (one_by_one, "grows evenly", "more than 40 times"),
    "powers of two": (doubling, "grows evenly", "would fit, too"),
    "extrapolated from two batches": (extrapolate, "flat at first", "instead of"),
    "at least one row": (search(low=1), "nothing fits", "instead of 0"),
    "no limit": (no_limit, "everything fits", "above the limit"),
    "strictly below": (search(fits=lambda p, room: p < room), "exactly full", "would fit, too"),
}
LARGEST_BATCH["a float"] = (lambda *given, **options: search()(*given, **options) / 1, "grows evenly", "half a row")


def from_the_top(peak: Callable[[int], float], gib: float, reserve: float = 1.0, limit: int = 65_536) -> int:
    step, fits = 1 << limit.bit_length(), 0
    while step := step // 2:
        if fits + step <= limit and peak(fits + step) <= (gib - reserve) * 2**30:
            fits += step
    return fits


test_other_searches_pass = each_passes(checks.largest_batch, {"bisection": search(), "bit by bit": from_the_top})
test_largest_batch_names_the_mistake = each_is_found(partial(checks.largest_batch, hint=3), LARGEST_BATCH)


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
