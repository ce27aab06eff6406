"""The checks of lesson 03: forward pass, gradients by hand, a tolerated rate; and what its other checks share."""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lora_edu.course.checks.report import Report, Step, Wrong, run_steps


def lora_forward(candidate: Callable[..., Tensor], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(x, W, A, B, lora_alpha, r)`` is x Wᵀ + s · (x Aᵀ) Bᵀ with s = lora_alpha / r."""

    def compare(*leading: int) -> None:
        inputs, outputs, r, alpha = _sizes()
        x, W, A, B = (_normal(*shape) for shape in ((*leading, inputs), (outputs, inputs), (r, inputs), (outputs, r)))
        y = candidate(x, W, A, B, alpha, r)
        if y.shape != (*leading, outputs):
            raise Wrong(
                f"x of shape {tuple(x.shape)} gives {tuple(y.shape)}, not {(*leading, outputs)}",
                "Which way do A and B stand when the rows of x are the inputs?",
                "x @ A.T has r columns, and (x @ A.T) @ B.T has one for each output.",
            )
        base, update = x @ W.T, x @ A.T @ B.T
        _same_scale(y - base, update, alpha, r)

    steps: list[Step] = [
        ("a batch of inputs", lambda: compare(5)),
        ("one input without a batch", compare),
        ("a batch of sequences", lambda: compare(2, 3)),
    ]
    return run_steps("forward pass", steps, hint)


def lora_gradients(candidate: Callable[..., Sequence[Tensor]], hint: int = 1) -> Report:
    """Exercise B2: ``candidate(g, x, W, A, B, s)`` is (∂L/∂A, ∂L/∂B, ∂L/∂x) for g = ∂L/∂y, without autograd."""

    def gradients(*leading: int) -> tuple[Sequence[Tensor], Sequence[Tensor], dict[str, Tensor]]:
        inputs, outputs, r, alpha = _sizes()
        shapes = {"x": (*leading, inputs), "W": (outputs, inputs), "A": (r, inputs), "B": (outputs, r)}
        t = {name: _normal(*shape) for name, shape in shapes.items()} | {"g": _normal(*leading, outputs)}
        a, b, x = (t[name].clone().requires_grad_() for name in "ABx")
        y = x @ t["W"].T + alpha / r * (x @ a.T @ b.T)
        right = torch.autograd.grad(y, (a, b, x), t["g"])
        with torch.no_grad():
            return (
                candidate(t["g"], t["x"], t["W"], t["A"], t["B"], alpha / r),
                right,
                t | {"s": torch.tensor(alpha / r, dtype=torch.float64)},
            )

    def shapes() -> None:
        got, right, _ = gradients(4)
        if len(got) != 3:
            raise Wrong(f"you return {len(got)} tensors, not 3", "Which gradients are asked for?", "return dA, dB, dx")
        for name, ours, other in zip("ABx", got, right, strict=True):
            if ours.shape != other.shape:
                raise Wrong(
                    f"your gradient of {name} has the shape {tuple(ours.shape)}, {name} has {tuple(other.shape)}",
                    "A gradient has the shape of what it belongs to. Are the three in the order A, B, x?",
                    "With G = gᵀ x of shape (out, in): dA = s Bᵀ G, dB = s G Aᵀ, dx = g (W + s B A).",
                )

    def value(index: int, fix: str) -> Callable[[], None]:
        name = "ABx"[index]

        def step() -> None:
            got, right, t = gradients(5)
            _same_gradient(name, got[index], right[index], t, fix)

        return step

    def sequences() -> None:
        for leading in ((2, 3), ()):
            got, right, t = gradients(*leading)
            for name, ours, other in zip("ABx", got, right, strict=True):
                _same_gradient(name, ours, other, t, "Flatten first: g.reshape(-1, out) and x.reshape(-1, in).")

    steps = [
        ("each gradient has the shape of what it belongs to", shapes),
        ("∂L/∂B as autograd has it", value(1, "dB = s * G @ A.T with G = g.T @ x.")),
        ("∂L/∂A as autograd has it", value(0, "dA = s * B.T @ G with G = g.T @ x.")),
        ("∂L/∂x as autograd has it", value(2, "dx = g @ (W + s * B @ A).")),
        ("also for sequences and for a single input", sequences),
    ]
    return run_steps("gradients by hand", steps, hint)


def _same_gradient(name: str, ours: Tensor, right: Tensor, t: Mapping[str, Tensor], fix: str) -> None:
    if ours.shape == right.shape and _close(ours, right):
        return
    note, s = "", t["s"].item()
    if ours.shape != right.shape:
        note = f": its shape is {tuple(ours.shape)} instead of {tuple(right.shape)}"
    elif name == "x" and _close(ours, t["g"] @ t["W"]):
        note = ": this is the frozen path's alone, the adapter's term is missing"
    elif name == "x" and _close(ours, right - t["g"] @ t["W"]):
        note = ": this is the adapter's term alone, the frozen path's is missing"
    elif name == "x" and _close(ours, t["g"] @ (t["W"] + t["B"] @ t["A"])):
        note = ": the adapter's term lacks the scale s"
    elif _close(ours * s, right):
        note = ": the scale s is missing"
    elif _close(ours, right * s):
        note = ": the scale s is in it twice"
    elif _close(ours, -right):
        note = ": the sign is turned; the step goes against the gradient, the gradient itself does not"
    raise Wrong(
        f"your gradient of {name} is off by {((ours - right).norm() / right.norm()).item():.0%}{note}"
        if ours.shape == right.shape
        else f"your gradient of {name} does not fit{note}",
        f"Which terms of y = x Wᵀ + s (x Aᵀ) Bᵀ contain {name}?",
        fix,
    )


def tolerated_rate(
    candidate: Callable[[Mapping[float, Sequence[float]], float], float | None], hint: int = 1
) -> Report:
    """Exercise C1: the largest rate up to which every rate ends all its runs at or below ``limit``, or None."""
    nan = math.nan

    def expect(results: Mapping[float, Sequence[float]], right: float | None, question: str, fix: str) -> None:
        got = candidate(dict(results), 1.0)
        if got != right:
            raise Wrong(f"for {dict(results)} and limit=1.0 you return {got}, not {right}", question, fix)

    one = random.choice([0.01, 0.02])

    def plain() -> None:
        expect(
            {one: [0.5, 0.6], 2 * one: [0.4, 0.9], 4 * one: [3.0, 2.5]}, 2 * one,
            "Which rates end all their runs at or below the limit?", "all(loss <= limit for loss in losses)",
        )  # fmt: skip

    def every_draw() -> None:
        expect(
            {one: [0.5, 0.6, 0.7], 2 * one: [0.4, 0.5, 1.9]}, one,
            "One draw of three fails at the larger rate. Is that tolerated?", "Ask all draws, not the median.",
        )  # fmt: skip

    def diverged() -> None:
        expect(
            {one: [0.5, 0.6], 2 * one: [0.4, nan]}, one,
            "What does a comparison with NaN give?", "loss <= limit is False for NaN; max() and sorted() are not safe.",
        )  # fmt: skip

    def gap() -> None:
        expect(
            {one: [0.5, 0.6], 2 * one: [2.0, 0.6], 4 * one: [0.9, 0.8]}, one,
            "A rate fails and a larger one gets through. Up to where may you raise the rate?",
            "Walk up from the smallest rate, and stop at the first failure.",
        )  # fmt: skip

    def order() -> None:
        expect(
            {4 * one: [0.4, 0.3], one: [0.5, 0.6], 2 * one: [0.6, 0.7]}, 4 * one,
            "In which order do you meet the rates?", "for rate in sorted(results)",
        )  # fmt: skip

    def none() -> None:
        expect({one: [2.0, 0.5], 2 * one: [0.6, 0.7]}, None, "What if the smallest rate fails?", "Return None.")

    steps = [
        ("the largest rate at which the runs end below the limit", plain),
        ("every draw counts", every_draw),
        ("NaN is a failure", diverged),
        ("nothing beyond the first failure", gap),
        ("in any order", order),
        ("None if no rate is tolerated", none),
    ]
    return run_steps("tolerated rate", steps, hint)


def _sizes() -> tuple[int, int, int, float]:
    """in, out, r and alpha at which wrong answers differ: in ≠ out, and no two of the usual slips give one scale."""
    inputs, outputs = random.sample(range(7, 15), 2)
    return inputs, outputs, random.randint(2, 4), random.choice([5, 7, 10])


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def _same_scale(got: Tensor, update: Tensor, alpha: float, r: int) -> None:
    """Raise unless ``got`` is lora_alpha / r times ``update``."""
    factor = ((got * update).sum() / (update * update).sum()).item()
    where = f"with r={r} and lora_alpha={alpha}"
    if not _close(got, factor * update):
        raise Wrong(
            f"{where} what you add to x Wᵀ + b is no multiple of x Aᵀ Bᵀ",
            "Print the shapes from left to right. Is the frozen path there once, and is the order A, then B?",
            "y = x @ W.T + (lora_alpha / r) * (x @ A.T @ B.T), plus the bias if there is one.",
        )
    right = alpha / r
    if abs(factor - right) <= 1e-9:
        return
    slips = {
        1.0: "it is not scaled at all",
        alpha: "lora_alpha is there, r is not",
        1 / r: "r is there, lora_alpha is not",
        r / alpha: "the fraction stands upside down",
        alpha / math.sqrt(r): "you divide by √r: that is rsLoRA",
        alpha * r: "you multiply by r",
        right**2: "the scale is applied twice",
        0.0: "it is zero",
    }
    note = next((text for slip, text in slips.items() if abs(factor - slip) < 1e-9), "no known slip")
    raise Wrong(
        f"{where} your update is {factor / right:.3g} × what it should be: {note}",
        "Which number stands between lora_alpha and the update?",
        "The scale is s = lora_alpha / r.",
    )
