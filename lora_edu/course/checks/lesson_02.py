"""The checks of lesson 02: effective rank (A1), updates cut to rank r (B1), top directions (B2), an update (C1)."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    between,
    changed,
    close_in_norm,
    close_number,
    is_several,
    is_tensor,
    known_slip,
    low_rank,
    normal,
    values_of,
    with_note,
)
from lora_edu.lowrank import effective_rank, low_rank_approximation, singular_values

same_number = partial(close_number, tolerance=1e-6)


@without(
    "lora_edu.lowrank.effective_rank",
    symptom="you call the library's {name}",
    question="What do you get for n equal shares p = 1/n, and what should it be?",
    fix="Return torch.exp(-(p * p.log()).sum()).item().",
)
def update_effective_rank(candidate: Callable[[Tensor, Tensor], float], hint: int = 1) -> Report:
    """Exercise A1 of lesson 02: ``candidate(before, after)`` is the effective rank of after − before."""
    rule = "Return torch.exp(-(p * p.log()).sum()).item(), with p = σ / Σσ of after − before."

    def compare(before: Tensor, after: Tensor, what: str) -> None:
        got = candidate(before.clone(), after.clone())
        if not isinstance(got, float):
            raise Wrong(f"you return a {type(got).__name__}", "How does a tensor become a number?", "Add .item().")
        sigma = singular_values(after - before)
        p = sigma[sigma > 1e-12] / sigma.sum()
        entropy, right = -(p * p.log()).sum().item(), effective_rank(sigma)
        energy = p**2 / (p**2).sum()
        slips = [
            (entropy, "this is the entropy itself"),
            (-entropy, "you lost the minus sign"),
            (1 / right, "a minus sign is missing in the exponent"),
            (right ** (1 / torch.tensor(2.0).log().item()), "you mixed logarithms: base 2 inside, e outside"),
            (torch.exp(-(energy * energy.log()).sum()).item(), "your p are shares of the energy σ², not of σ"),
            (float(len(p)), "this is the rank, which counts every value above zero"),
            (((sigma / sigma[0]) ** 2).sum().item(), "this is the stable rank ‖ΔW‖² / σ₁²"),
            (1 / (p**2).sum().item(), "this is 1 / Σp², another measure"),
            (effective_rank(after), "this is the effective rank of the weight after training, not of the change"),
        ]
        if not same_number(got, right):
            raise Wrong(
                with_note(f"{what} you return {got:.3f} instead of {right:.3f}", known_slip(got, slips, same_number)),
                "What do you get for n equal shares p = 1/n, and what should it be?",
                rule,
            )

    def spread() -> None:
        before = normal(between(9, 12), 7)
        compare(before, before + normal(*before.shape), "for a random update")

    def low() -> None:
        k = between(2, 4)
        before = normal(8, 12)
        compare(before, before + low_rank(8, 12, k), f"for an update of rank {k}")

    steps = [("a random update is measured", spread), ("an update of low rank is measured", low)]
    return run_steps("Effective rank of an update", steps, hint)


def truncated_updates(candidate: Callable[[nn.Module, nn.Module, int], nn.Module], hint: int = 1) -> Report:
    """Exercise B1 of lesson 02: ``candidate(before, after, r)`` is ``before`` plus its updates cut to rank r."""

    def pair() -> tuple[nn.Module, nn.Module]:
        width, rows = between(10, 13), between(14, 17)
        layers = nn.Embedding(rows, 6), nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 8, bias=False)
        before = nn.Sequential(*layers).double()
        after = copy.deepcopy(before)
        with torch.no_grad():
            for parameter in after.parameters():
                parameter.add_(0.5 * normal(*parameter.shape))
        return before, after

    def cut(before: nn.Module, after: nn.Module, r: int) -> nn.Module:
        kept = values_of(before), values_of(after)
        model = candidate(before, after, r)
        for name, module, values in (("before", before, kept[0]), ("after", after, kept[1])):
            if changed(module, values):
                raise Wrong(
                    f"with r={r} your function changed the model `{name}`",
                    "On which object do you write?",
                    "Start from copy.deepcopy(before) and write only to the copy.",
                )
        if not isinstance(model, nn.Module):
            raise Wrong(f"you return a {type(model).__name__}", "What should come back?", "Return the new model.")
        if model is before or model is after:
            raise Wrong("you return one of the two models", "Is it a new one?", "Return a changed copy of before.")
        return model

    def nothing() -> None:
        before, after = pair()
        model = cut(before, after, 0)
        for name, old in before.named_parameters():
            if old.ndim == 2 and not torch.equal(model.get_parameter(name), old):
                raise Wrong(
                    f"with r=0 the matrix {name} is not the one before fine-tuning",
                    "What is an update of rank 0?",
                    "At r = 0 add nothing: every matrix stays as it was before.",
                )

    def vectors() -> None:
        before, after = pair()
        model = cut(before, after, between(2, 4))
        for name, old in before.named_parameters():
            if old.ndim != 2 and not torch.equal(model.get_parameter(name), old):
                raise Wrong(
                    f"{name} is no matrix, and it is not at its value before fine-tuning",
                    "Which parameters have an update that can be cut to a rank?",
                    "Touch only parameters with ndim == 2, and start from a copy of before.",
                )

    def matrices() -> None:
        before, after = pair()
        r = between(2, 4)
        model = cut(before, after, r)
        for name, old in before.named_parameters():
            if old.ndim == 2:
                new, got = after.get_parameter(name).detach(), model.get_parameter(name).detach()
                _explain_cut(name, r, old.detach(), new, got)

    def everything() -> None:
        before, after = pair()
        r = between(20, 30)
        model = cut(before, after, r)
        for name, parameter in after.named_parameters():
            if parameter.ndim == 2 and not close_in_norm(model.get_parameter(name), parameter):
                raise Wrong(
                    f"with r={r}, more than {name} has singular values, its update is not kept whole",
                    "What is the largest rank that an update of this shape can have?",
                    "Use min(r, *delta.shape).",
                )

    steps = [
        ("r = 0 gives the matrices before, and both models stay untouched", nothing),
        ("biases and norms go back to their values before", vectors),
        ("every matrix is the one before plus the best rank-r part of its update", matrices),
        ("a rank above the matrix's keeps the whole update", everything),
    ]
    return run_steps("Cut updates", steps, hint)


def _explain_cut(name: str, r: int, before: Tensor, after: Tensor, got: Tensor) -> None:
    delta = after - before
    part = low_rank_approximation(delta, r)
    if close_in_norm(got, before + part):
        return
    slips = [
        (low_rank_approximation(after, r), "you cut the weight after training instead of its change"),
        (low_rank_approximation(before, r) + delta, "you cut the weight before, and add the whole update"),
        (part, "it is the update alone, without the weight before"),
        (before, "it is the weight before: nothing was added"),
        (after, "it is the weight after: nothing was cut"),
        (before - part, "the update has the wrong sign"),
        (after + part, "you added the cut update to the weight after"),
        (after - part, "you kept what should be cut off"),
    ]
    note = known_slip(got, slips, close_in_norm)
    rank = int(torch.linalg.matrix_rank(got - before, rtol=1e-9))
    if not note and rank != r:
        note = f"its update has rank {rank}"
    raise Wrong(
        f"with r={r} the matrix {name} is not right: {note or 'its update is of rank r, and not the best one'}",
        "Which matrix is cut to rank r, and to which one is it added?",
        "delta = after - before; add low_rank_approximation(delta, r) to the copy of before.",
    )


def top_against_random(candidate: Callable[[Tensor, int], tuple[float, float]], hint: int = 1) -> Report:
    """Exercise B2 of lesson 02: ``candidate(delta, r)`` gives the energy shares of the top and of random directions."""

    def call(delta: Tensor, r: int) -> tuple[float, float]:
        got: Any = candidate(delta.clone(), r)
        if not is_several(got, 2) or not all(isinstance(share, float) for share in got):
            raise Wrong(
                f"you return {type(got).__name__}: expected two floats",
                "Which two shares are asked for?",
                "Return (top, random), each made a number with .item().",
            )
        return got[0], got[1]

    def top() -> None:
        delta, r = normal(9, between(12, 14)), between(2, 4)
        got, sigma = call(delta, r)[0], singular_values(delta)
        right = ((sigma[:r] ** 2).sum() / (sigma**2).sum()).item()
        if not same_number(got, right):
            slips = [
                ((sigma[:r].sum() / sigma.sum()).item(), "you added σ, not σ²"),
                (right**0.5, "this is its square root"),
                (1 - right, "this is what is left over"),
                (((sigma[-r:] ** 2).sum() / (sigma**2).sum()).item(), "these are the r smallest"),
                ((sigma[:r] ** 2).sum().item(), "this is the energy itself, not its share"),
            ]
            note = known_slip(got, slips, same_number, "expected another share")
            raise Wrong(
                f"with r={r} you say the top directions hold {got:.3f} of the energy, it is {right:.3f}: {note}",
                "What is ‖ΔW‖² in terms of the singular values?",
                "(σ[:r] ** 2).sum() / (σ ** 2).sum()",
            )

    def everything() -> None:
        delta = normal(5, 7)
        share = call(delta, 7)[1]
        if not same_number(share, 1):
            raise Wrong(
                f"all 7 directions of a 7-dimensional input space should hold everything; yours hold {share:.3f}",
                "Do your random directions have length 1, and are they orthogonal to each other?",
                "Q, _ = torch.linalg.qr(torch.randn(k, r)), then (delta @ Q).norm() ** 2 / delta.norm() ** 2.",
            )
        r = between(2, 5)
        share = call(3 * torch.linalg.qr(normal(7, 7)).Q, r)[1]
        if not same_number(share, r / 7):
            raise Wrong(
                f"where all 7 directions hold the same, {r} of them should hold {r / 7:.4f}; yours hold {share:.4f}",
                "Do you measure the share of this ΔW?",
                "Q, _ = torch.linalg.qr(torch.randn(k, r)), then (delta @ Q).norm() ** 2 / delta.norm() ** 2.",
            )

    def chance() -> None:
        d, k, r = 8, 30, between(4, 6)
        delta = normal(d, k)
        draws = [call(delta, r)[1] for _ in range(400)]
        mean = sum(draws) / len(draws)
        if max(draws) - min(draws) < 1e-9:
            raise Wrong(
                "the random directions are the same at each call, or not drawn at all",
                "Do you measure the share, or compute what it should be?",
                "Draw Q inside the function, without setting a seed, and measure ‖ΔW Q‖².",
            )
        if abs(mean - r / k) > 0.03:
            note = "these are output directions" if abs(mean - r / d) < 0.05 else f"expected about {r / k:.2f}"
            raise Wrong(
                f"r={r} random directions of {k} inputs hold {mean:.2f} of the energy on average: {note}",
                "Which side of ΔW (d, k) do inputs enter?",
                "Inputs have k entries: Q is (k, r), and the energy is that of delta @ Q.",
            )

    def every_side() -> None:
        k, r = 30, between(4, 6)
        one_input = torch.eye(k, dtype=torch.float64)[between(0, k - 1)]
        for direction, words in ((one_input, "one input"), (normal(k), "one direction of the inputs")):
            delta = normal(8, 1) * direction
            shares = [call(delta, r)[1] for _ in range(20)]
            if any(share < 1e-9 or share > 1 - 1e-9 for share in shares):
                raise Wrong(
                    f"where all of the energy lies in {words}, your random directions hold everything or nothing",
                    "Is a random choice among fixed directions, such as the axes, a random direction?",
                    "Q, _ = torch.linalg.qr(torch.randn(k, r)): directions from every side.",
                )

    steps = [
        ("the top directions' share of the energy is right", top),
        ("random directions are orthonormal: all of them hold everything", everything),
        ("random input directions hold r/k on average", chance),
        ("they come from every side, not from a few fixed ones", every_side),
    ]
    return run_steps("Top directions against random ones", steps, hint)


def optimizer_update(candidate: Callable[..., Tensor], hint: int = 1) -> Report:
    """Exercise C1 of lesson 02: ``candidate(W0, X, Y, make_optimizer, steps)`` trains W and returns ΔW."""

    def problem(n: int) -> tuple[Tensor, Tensor, Tensor]:
        return normal(6, 9), normal(n, 9), normal(n, 6)

    def compare(make: Callable[..., torch.optim.Optimizer], steps: int) -> None:
        W0, X, Y = problem(between(3, 5))
        kept = W0.clone()
        got = candidate(W0, X.clone(), Y.clone(), make, steps)
        if not torch.equal(W0, kept):
            raise Wrong("your loop changed W0", "Do W and W0 share memory?", "Make the parameter from W0.clone().")
        if not is_tensor(got, W0.shape) or got.requires_grad:
            raise Wrong(
                "expected ΔW as a plain tensor of W0's shape",
                "What should the function return?",
                "Return W.detach() - W0.",
            )
        right, summed, grown = (_reference(W0, X, Y, make, steps, kind) for kind in ("mean", "sum", "grow"))
        if close_in_norm(got, right):
            return
        slips = [
            (W0 + right, "you return W instead of its change"),
            (summed, "your loss is the sum of the squared errors, not their mean"),
            (grown, "gradients of earlier steps pile up"),
            (-right, "you return W0 − W: the sign is wrong"),
            (torch.zeros_like(W0), "nothing was trained"),
        ]
        note = known_slip(got, slips, close_in_norm, "it differs from the reference loop")
        raise Wrong(
            f"after {steps} step{'s' * (steps > 1)} your ΔW is not right: {note}",
            "Which four things does a training step do, in which order?",
            "zero_grad, loss = ((X @ W.T - Y) ** 2).mean(), backward, step; at the end W.detach() - W0.",
        )

    def one() -> None:
        compare(lambda parameters: torch.optim.SGD(parameters, lr=0.1), 1)

    def many() -> None:
        compare(lambda parameters: torch.optim.SGD(parameters, lr=0.1), between(4, 7))

    def adam() -> None:
        compare(lambda parameters: torch.optim.Adam(parameters, lr=0.01), between(4, 7))

    steps = [
        ("one step of gradient descent", one),
        ("several steps of gradient descent", many),
        ("the optimizer that is given does the steps", adam),
    ]
    return run_steps("An optimizer's update", steps, hint)


def _reference(W0: Tensor, X: Tensor, Y: Tensor, make: Callable[..., Any], steps: int, kind: str) -> Tensor:
    """ΔW of the right loop ("mean"), with a summed loss ("sum"), or with gradients never cleared ("grow")."""
    W = nn.Parameter(W0.clone())
    optimizer = make([W])
    for _ in range(steps):
        if kind != "grow":
            optimizer.zero_grad()
        errors = (X @ W.T - Y) ** 2
        (errors.sum() if kind == "sum" else errors.mean()).backward()
        optimizer.step()
    return W.detach() - W0
