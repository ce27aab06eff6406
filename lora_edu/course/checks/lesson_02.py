"""The checks of lesson 02: the effective rank of an update (A1) and cutting updates (B1).

Those of B2 and C1 are in ``lesson_02_baselines``.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.lowrank import effective_rank, low_rank_approximation, singular_values


def between(low: int, high: int) -> int:
    """A random whole number, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding, shape included."""
    return a.shape == b.shape and bool((a - b).norm() <= 1e-6 * max(b.norm().item(), 1e-12))


def update_effective_rank(candidate: Callable[[Tensor, Tensor], float], hint: int = 1) -> Report:
    """Exercise A1 of lesson 02: ``candidate(before, after)`` is the effective rank of after − before."""
    rule = "Return torch.exp(-(p * p.log()).sum()).item(), with p = σ / Σσ of after − before."

    def compare(before: Tensor, after: Tensor, what: str) -> None:
        got = candidate(before, after)
        if not isinstance(got, float):
            raise Wrong(f"you return a {type(got).__name__}", "How does a tensor become a number?", "Add .item().")
        sigma = singular_values(after - before)
        p = sigma[sigma > 1e-12] / sigma.sum()
        entropy, right = -(p * p.log()).sum().item(), effective_rank(sigma)
        energy = p**2 / (p**2).sum()
        slips = {
            "this is the entropy itself": entropy,
            "you lost the minus sign": -entropy,
            "a minus sign is missing in the exponent": 1 / right,
            "you mixed logarithms: base 2 inside, e outside": right ** (1 / torch.tensor(2.0).log().item()),
            "your p are shares of the energy σ², not of σ": torch.exp(-(energy * energy.log()).sum()).item(),
            "this is the rank, which counts every value above zero": float(len(p)),
            "this is the stable rank ‖ΔW‖² / σ₁²": ((sigma / sigma[0]) ** 2).sum().item(),
            "this is 1 / Σp², another measure": 1 / (p**2).sum().item(),
            "this is the effective rank of the weight after training, not of the change": effective_rank(after),
        }
        if abs(got - right) > 1e-6 * right:
            note = next((text for text, value in slips.items() if abs(got - value) < 1e-6 * abs(value)), "")
            raise Wrong(
                f"{what} you return {got:.3f} instead of {right:.3f}" + (f": {note}" if note else ""),
                "What do you get for n equal shares p = 1/n, and what should it be?",
                rule,
            )

    def spread() -> None:
        before = torch.randn(between(9, 12), 7, dtype=torch.float64)
        compare(before, before + torch.randn(before.shape, dtype=torch.float64), "for a random update")

    def low() -> None:
        k = between(2, 4)
        before = torch.randn(8, 12, dtype=torch.float64)
        change = torch.randn(8, k, dtype=torch.float64) @ torch.randn(k, 12, dtype=torch.float64)
        compare(before, before + change, f"for an update of rank {k}")

    steps = [("a random update is measured", spread), ("an update of low rank is measured", low)]
    return run_steps("Effective rank of an update", steps, hint)


def truncated_updates(candidate: Callable[[nn.Module, nn.Module, int], nn.Module], hint: int = 1) -> Report:
    """Exercise B1 of lesson 02: ``candidate(before, after, r)`` is ``before`` plus its updates cut to rank r."""

    def pair() -> tuple[nn.Module, nn.Module]:
        width = between(10, 13)
        before = nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 8, bias=False)).double()
        after = copy.deepcopy(before)
        with torch.no_grad():
            for parameter in after.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, dtype=torch.float64))
        return before, after

    def cut(before: nn.Module, after: nn.Module, r: int) -> nn.Module:
        kept = copy.deepcopy(before).state_dict(), copy.deepcopy(after).state_dict()
        model = candidate(before, after, r)
        for name, module, state in (("before", before, kept[0]), ("after", after, kept[1])):
            if any(not torch.equal(value, module.state_dict()[key]) for key, value in state.items()):
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
        model = cut(before, after, between(1, 3))
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
            if parameter.ndim == 2 and not close(model.get_parameter(name), parameter):
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
    if close(got, before + part):
        return
    slips = {
        "you cut the weight after training instead of its change": low_rank_approximation(after, r),
        "you cut the weight before, and add the whole update": low_rank_approximation(before, r) + delta,
        "it is the update alone, without the weight before": part,
        "it is the weight before: nothing was added": before,
        "it is the weight after: nothing was cut": after,
        "the update has the wrong sign": before - part,
        "you added the cut update to the weight after": after + part,
        "you kept what should be cut off": after - part,
    }
    note = next((text for text, value in slips.items() if close(got, value)), "")
    rank = int(torch.linalg.matrix_rank(got - before, rtol=1e-9))
    if not note and rank != r:
        note = f"its update has rank {rank}"
    raise Wrong(
        f"with r={r} the matrix {name} is not right: {note or 'its update is of rank r, and not the best one'}",
        "Which matrix is cut to rank r, and to which one is it added?",
        "delta = after - before; add low_rank_approximation(delta, r) to the copy of before.",
    )
