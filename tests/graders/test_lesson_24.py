"""The checks of lesson 24 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from found import each_is_found, each_passes
from lora_edu.course import checks

pytestmark = pytest.mark.graders


def left(column: int = 2, of: int = 2, keep: bool = False) -> Callable[..., float]:
    """An answer to A1 by the column that is removed, and the one that it is divided by."""

    def share(rows: list, removed: list) -> float:
        gone = sum(row[column] for row in rows if row[0] in removed)
        whole = sum(row[of] for row in rows)
        return gone / whole if keep else 1 - gone / whole

    return share


def staying(rows: list, removed: list) -> float:
    times = {name: own for name, _, own, _ in rows}
    return sum(own for name, own in times.items() if name not in removed) / sum(times.values())


PROFILES = {
    "totals": (left(3, 3), "one operation less", "counts what a row calls a second time"),
    "totals of the removed": (left(3, 2), "calls others", "holds what they call"),
    "calls": (left(1, 1), "one operation less", "count calls"),
    "what goes": (left(keep=True), "one operation less", "the share that goes"),
    "milliseconds": (
        lambda rows, gone: sum(r[2] for r in rows if r[0] not in gone),
        "one operation less",
        "not a share",
    ),
    "a speed-up": (lambda rows, gone: 1 / left()(rows, gone), "one operation less", "how many times as fast"),
    "in per cent": (lambda rows, gone: 100 * left()(rows, gone), "one operation less", "none of the usual slips"),
    "a list": (lambda rows, gone: [left()(rows, gone)], "one operation less", "expected a number"),
}
test_other_shares_pass = each_passes(checks.time_left, {"one minus": left(), "what stays": staying})
test_time_left_names_the_mistake = each_is_found(checks.time_left, PROFILES)


def pieces(
    divisor: str = "counted", drop: bool = False, at_once: bool = False, means: bool = False, slope: float = 1
) -> Callable[..., tuple[Tensor, Tensor]]:
    """An answer to the cell of the lesson, with places to go wrong."""

    def loss_and_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        number = {"counted": (labels != -100).sum(), "tokens": len(labels), "none": 1}[divisor]
        loss, gradient = torch.zeros((), dtype=hidden.dtype), torch.zeros_like(hidden)
        step = len(hidden) if at_once else rows
        starts = range(0, len(hidden) // rows * rows if drop else len(hidden), step)
        for start in starts:
            own = slice(start, start + step)
            piece = hidden[own].detach().requires_grad_()
            divided = len(starts) * (labels[own] != -100).sum() if means else number
            part = F.cross_entropy(piece @ weight.T, labels[own], reduction="sum") / divided
            gradient[own] = slope * torch.autograd.grad(part, piece)[0]
            loss += part.detach()
        return loss, gradient

    return loss_and_gradient


def by_hand(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[float, Tensor]:
    """Without autograd: the gradient is softmax minus one-hot, times the weight."""
    counted, slopes, losses = labels != -100, [], []
    for x, y, known in zip(hidden.split(rows), labels.split(rows), counted.split(rows), strict=True):
        slope = (x @ weight.T).log_softmax(1)
        places = y.clamp(min=0)
        losses.append(float(-slope[range(len(y)), places][known].sum()))
        slope = slope.exp()
        slope[range(len(y)), places] -= 1
        slopes.append(known[:, None] * slope @ weight)
    return sum(losses) / int(counted.sum()), torch.cat(slopes) / counted.sum()


def writes(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    loss, gradient = pieces()(hidden, weight, labels, rows)
    labels[labels == -100] = 0
    return loss, gradient


LOSSES = {
    "a mean of means": (pieces(means=True), "the loss is", "a mean of the pieces' means"),
    "all tokens": (pieces(divisor="tokens"), "the loss is", "you divide by all tokens"),
    "the sum": (pieces(divisor="none"), "the loss is", "this is the sum"),
    "the last piece dropped": (pieces(drop=True), "the loss is", "the last piece"),
    "gradient of the sum": (
        lambda h, w, y, n: (pieces()(h, w, y, n)[0], pieces("none")(h, w, y, n)[1]),
        "so is its gradient",
        "it is that of the sum",
    ),
    "the other sign": (pieces(slope=-1), "so is its gradient", "the other sign"),
    "transposed": (
        lambda *given: (pieces()(*given)[0], pieces()(*given)[1].T),
        "so is its gradient",
        "the gradient is (",
    ),
    "all logits": (pieces(at_once=True), "no more logits", "numbers at once"),
    "writes into labels": (writes, "left as it was", "writes into labels"),
    "the loss alone": (lambda *given: pieces()(*given)[0], "the loss is", "expected the loss and the gradient"),
    "losses of tokens": (
        lambda h, w, y, n: (F.cross_entropy(h @ w.T, y, reduction="none"), h),
        "the loss is",
        "expected one number",
    ),
}
test_other_losses_pass = each_passes(checks.loss_by_pieces, {"by autograd": pieces(), "by hand": by_hand})
test_loss_by_pieces_names_the_mistake = each_is_found(checks.loss_by_pieces, LOSSES)


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
