"""The checks of lesson 24 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from found import assert_found, each_is_found, each_passes
from lora_edu.course import checks

pytestmark = pytest.mark.graders

BOUND = {
    "the shorter time": (lambda o, b, c, w: min(o / c, b / w), "arithmetic bounds", "that of the bytes"),
    "the sum": (lambda o, b, c, w: o / c + b / w, "arithmetic bounds", "the sum of the two times"),
    "arithmetic only": (lambda o, b, c, w: o / c, "bytes bound", "that of the arithmetic"),
    "bytes only": (lambda o, b, c, w: b / w, "arithmetic bounds", "the shorter of the two"),
    "exchanged": (lambda o, b, c, w: max(o / w, b / c), "arithmetic bounds", "operations belong to the ceiling"),
    "a rate": (lambda o, b, c, w: min(c / o, w / b), "arithmetic bounds", "how often it could run"),
    "nothing returned": (lambda o, b, c, w: None, "arithmetic bounds", "expected a number"),
}
RIGHT_BOUND = {
    "the longer one": lambda o, b, c, w: o / c if o / c > b / w else b / w,
    "by intensity": lambda o, b, c, w: o / min(c, o / b * w),
}
test_other_bounds_pass = each_passes(checks.bound_seconds, RIGHT_BOUND)
test_bound_seconds_names_the_mistake = each_is_found(checks.bound_seconds, BOUND)


def ratio(operations: float = 2, x: float = 1, w: float = 1, y: float = 1, wide: bool = True) -> Callable[..., float]:
    """An answer to A2 with places to go wrong."""

    def count(tokens: int, inputs: int, outputs: int, width: int) -> float:
        numbers = x * tokens * inputs + w * inputs * outputs + y * tokens * outputs
        return operations * tokens * inputs * outputs / (numbers * (width if wide else 1))

    return count


INTENSITY = {
    "one operation a pair": (ratio(operations=1), "two operations"),
    "numbers": (ratio(wide=False), "each has width bytes"),
    "result not written": (ratio(y=0), "the result is written"),
    "weight not read": (ratio(w=0), "the weight is read"),
    "input not read": (ratio(x=0), "the input is read"),
    "result read as well": (ratio(y=2), "written once"),
    "upside down": (lambda *sizes: 1 / ratio()(*sizes), "bytes per operation"),
}
test_other_intensities_pass = each_passes(
    checks.intensity, {"of inverses": lambda t, i, o, w: 2 / (w * (1 / t + 1 / i + 1 / o)), "with switches": ratio()}
)
test_intensity_names_the_mistake = each_is_found(checks.intensity, INTENSITY, step="wide product")


def test_four_bytes_for_every_number() -> None:
    answer = ratio()
    assert_found(checks.intensity(lambda t, i, o, width: answer(t, i, o, 4)), "thin product", "use width")


def sent(ddp: tuple[float, float] = (0, 2), fsdp: tuple[float, float] = (2, 3)) -> Callable[..., float]:
    """An answer to B2 by how often frozen and trained numbers travel."""

    def count(frozen: int, trained: int, processes: int, width: int = 2, sharded: bool = False) -> float:
        a, b = fsdp if sharded else ddp
        return width * (processes - 1) / processes * (a * frozen + b * trained)

    return count


def scaled(change: Callable[[float, int, int], float]) -> Callable[..., float]:
    """The right bytes, changed by (bytes, processes, width)."""

    def count(frozen: int, trained: int, processes: int, width: int = 2, sharded: bool = False) -> float:
        return change(sent()(frozen, trained, processes, width, sharded), processes, width)

    return count


def no_part_kept(frozen: int, trained: int, processes: int, width: int = 2, sharded: bool = False) -> float:
    return width * (2 * (frozen + trained) + trained if sharded else 2 * trained)


BYTES = {
    "frozen gradients averaged": (sent(ddp=(2, 2)), "DDP", "no gradients to average"),
    "sent once": (sent(ddp=(0, 1)), "DDP", "travels twice"),
    "weights without shards": (sent(ddp=(2, 3)), "DDP", "no weight travels"),
    "gathered once": (sent(fsdp=(1, 2)), "FSDP", "the backward pass gathers again"),
    "adapters not gathered": (sent(fsdp=(2, 1)), "FSDP", "the adapters are sharded"),
    "no gradients": (sent(fsdp=(2, 2)), "FSDP", "gradients of what trains are missing"),
    "gradients spread": (sent(fsdp=(2, 4)), "FSDP", "keeps its own part"),
    "frozen gradients summed": (sent(fsdp=(3, 3)), "FSDP", "no gradients to sum"),
    "sharded ignored": (sent(fsdp=(0, 2)), "FSDP", "the weights travel, too"),
    "all together": (scaled(lambda size, p, width: size * p), "DDP", "all processes send together"),
    "numbers": (scaled(lambda size, p, width: size / width), "DDP", "each has width bytes"),
    "own part sent": (no_part_kept, "DDP", "(P − 1)/P of it travels"),
    "no defaults": (lambda f, t, p, width, sharded: sent()(f, t, p, width, sharded), "LLaMA-7B", "raised"),
    "four bytes by default": (
        lambda f, t, p, width=4, sharded=False: sent()(f, t, p, width, sharded),
        "LLaMA-7B",
        "instead of",
    ),
}
test_bytes_sent_names_the_mistake = each_is_found(checks.bytes_sent, BYTES)


def predicted(operations: float = 1, traffic: float = 1, whole: bool = False) -> Callable[..., float]:
    """An answer to C1 that may look at operations or bytes alone, or at the sums only."""

    def expect(before: list, after: list, ceiling: float, bandwidth: float) -> float:
        def seconds(work: list) -> float:
            pairs = [(operations * o / ceiling, traffic * b / bandwidth) for o, b in work]
            return max(map(sum, zip(*pairs, strict=True))) if whole else sum(map(max, pairs))

        return seconds(after) / seconds(before)

    return expect


def added(before: list, after: list, ceiling: float, bandwidth: float) -> float:
    one, other = (sum(o / ceiling + b / bandwidth for o, b in work) for work in (before, after))
    return other / one


RATIO = {
    "larger of two sums": (predicted(whole=True), "the larger of two sums"),
    "operations only": (predicted(traffic=0), "the bytes are missing"),
    "bytes only": (predicted(operations=0), "the operations are missing"),
    "added": (added, "you add arithmetic and traffic"),
    "upside down": (lambda b, a, c, w: predicted()(a, b, c, w), "before over after"),
    "share saved": (lambda *work: 1 - predicted()(*work), "the share of the time that is saved"),
    "a list": (lambda *work: [predicted()(*work)], "expected a number"),
}
test_expected_ratio_names_the_mistake = each_is_found(checks.expected_ratio, RATIO, step="fewer bytes")


def backward(
    of_A: float = 1, of_B: float = 1, base: bool = True, of_x: float = 1, skip: bool = True
) -> Callable[..., tuple]:
    """An answer to B1 by the power of s in each gradient; right with 1 everywhere."""

    def answer(
        g: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, h: Tensor, s: float, need_x: bool = True
    ) -> tuple:
        up = B.T @ g.T
        gx = None
        if need_x or not skip:
            gx = (g @ W if base else 0 * x).addmm_((up * s**of_x).T, A)
        return gx if need_x else None, up @ x * s**of_A, (h @ g).T * s**of_B

    return answer


def no_update(g, x, W, A, B, h, s, need_x=True):
    return g @ W, *backward()(g, x, W, A, B, h, s)[1:]


def in_place(g, x, W, A, B, h, s, need_x=True):
    return backward()(g, x, W, A, B, h.mul_(s), s, need_x)[0], s * (B.T @ g.T) @ x, (h @ g).T


def scales_g(g, x, W, A, B, h, s, need_x=True):
    scaled_g = s * g
    up = B.T @ scaled_g.T
    return (g @ W).addmm_(up.T, A) if need_x else None, up @ x, scaled_g.T @ h.T


def two_parts(g, x, W, A, B, h, s, need_x=True):
    up = s * (B.T @ g.T)
    return g @ W + up.T @ A if need_x else None, up @ x, (h @ g).T * s


def dense(g, x, W, A, B, h, s, need_x=True):
    up = s * (B.T @ g.T)
    return g @ (W + s * B @ A) if need_x else None, up @ x, (h @ g).T * s


def again(g, x, W, A, B, h, s, need_x=True):
    return backward()(g, x, W, A, B, A @ x.T, s, need_x)


def always(g, x, W, A, B, h, s, need_x=True):
    return backward()(g, x, W, A, B, h, s)


def exchanged(*given):
    gx, gA, gB = backward()(*given)
    return gx, gB, gA


BACKWARD = {
    "no scale in A": (backward(of_A=0), "gradient of A", "the scale s is missing"),
    "scale twice in A": (backward(of_A=2), "gradient of A", "in it twice"),
    "A and B exchanged": (exchanged, "gradient of A", "and A is"),
    "no scale in B": (backward(of_B=0), "gradient of B", "the scale s is missing"),
    "scale twice in B": (backward(of_B=2), "gradient of B", "in it twice"),
    "B transposed": (lambda *t: (*backward()(*t)[:2], backward()(*t)[2].T), "gradient of B", "it is transposed"),
    "no adapter in x": (no_update, "gradient of x", "the adapter's part is missing"),
    "no frozen weight in x": (backward(base=False), "gradient of x", "the frozen weight's part is missing"),
    "no scale in x": (backward(of_x=0), "gradient of x", "the scale s is missing"),
    "scale twice in x": (backward(of_x=2), "gradient of x", "twice in the adapter's part"),
    "writes into h": (in_place, "left as it was", "writes into h"),
    "x not asked for": (always, "large product is skipped", "expected None"),
    "computed and thrown away": (backward(skip=False), "large product is skipped", "still compute"),
    "h again": (again, "too many", "multiplications"),
    "B A as a whole": (dense, "too many", "multiplications"),
    "the scale on g": (scales_g, "too many", "of g's size"),
    "two parts and a sum": (two_parts, "too many", "tensors of x's size"),
    "two gradients": (lambda *t: backward()(*t)[1:], "gradient of A", "expected three gradients"),
}


def by_autograd(g, x, W, A, B, h, s, need_x=True):
    x, A, B = (tensor.clone().requires_grad_() for tensor in (x, A, B))
    with torch.enable_grad():
        y = x @ W.T + s * (A @ x.T).T @ B.T
    gradients = torch.autograd.grad(y, (x, A, B) if need_x else (A, B), g)
    return gradients if need_x else (None, *gradients)


BACKWARD["autograd"] = (by_autograd, "gradient of A", "you let autograd")
test_other_backwards_pass = each_passes(checks.fused_backward, {"with switches": backward()})
test_fused_backward_names_the_mistake = each_is_found(checks.fused_backward, BACKWARD)
