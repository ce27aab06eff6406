"""The checks of lesson 02 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from found import each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.lowrank import effective_rank, low_rank_approximation, singular_values, stable_rank

pytestmark = pytest.mark.graders


def shares(before, after):
    sigma = singular_values(after - before)
    p = sigma / sigma.sum()
    return p[p > 1e-12]


def energies(before, after):
    return singular_values(after - before) ** 2 / (after - before).norm() ** 2


def entropy(p):
    return -(p * p.log()).sum()


RANK = {
    "entropy only": (lambda b, a: entropy(shares(b, a)).item(), "the entropy itself"),
    "minus sign lost": (lambda b, a: (-entropy(shares(b, a))).exp().item(), "minus sign"),
    "no exp, no minus": (lambda b, a: -entropy(shares(b, a)).item(), "minus sign"),
    "log2 inside exp": (
        lambda b, a: torch.exp(-(shares(b, a) * shares(b, a).log2()).sum()).item(),
        "mixed logarithms",
    ),
    "shares of energy": (lambda b, a: entropy(energies(b, a)).exp().item(), "energy σ²"),
    "counts the values": (lambda b, a: float(len(shares(b, a))), "this is the rank"),
    "stable rank": (lambda b, a: stable_rank(a - b), "stable rank"),
    "participation ratio": (lambda b, a: 1 / (shares(b, a) ** 2).sum().item(), "1 / Σp²"),
    "of the weight, not the update": (
        lambda b, a: entropy(shares(torch.zeros_like(a), a)).exp().item(),
        "weight after training",
    ),
    "the library's": (lambda b, a: effective_rank(a - b), "the library's effective_rank"),
    "a tensor": (lambda b, a: entropy(shares(b, a)).exp(), "you return a Tensor"),
}
test_effective_rank_mistake = each_is_found(checks.update_effective_rank, RANK, step="random update")


def overwriting(b, a):
    a.sub_(b)
    sigma = torch.linalg.svdvals(a)
    return entropy(sigma[sigma > 1e-12] / sigma.sum()).exp().item()


RIGHT_RANK = {
    "in place": overwriting,
    "in bits": lambda b, a: 2.0 ** -(shares(b, a) * shares(b, a).log2()).sum().item(),
    "a product": lambda b, a: (shares(b, a) ** -shares(b, a)).prod().item(),
    "with NumPy": lambda b, a: np.exp(-np.sum(shares(b, a).numpy() * np.log(shares(b, a).numpy()))),
    "a float of the math module": lambda b, a: math.exp(-sum(p * math.log(p) for p in shares(b, a).tolist())),
}
test_other_effective_ranks_pass = each_passes(checks.update_effective_rank, RIGHT_RANK)


def cutter(change, start="before", vectors=False, edge=True):
    """A cut_updates that writes change(W before, W after, r) into a copy of one of the two models."""

    def wrong(before, after, r):
        model = copy.deepcopy(before if start == "before" else after)
        old, new = dict(before.named_parameters()), dict(after.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and r > 0:
                    rank = min(r, *parameter.shape) if edge else r
                    parameter.copy_(change(old[name].detach(), new[name].detach(), rank))
                elif parameter.ndim == 2:
                    parameter.copy_(old[name])
                elif vectors:
                    parameter.copy_(new[name])
        return model

    return wrong


def right(b, a, r):
    return b + low_rank_approximation(a - b, r)


def in_place(before, after, r):
    tuned = dict(after.named_parameters())
    with torch.no_grad():
        for name, parameter in before.named_parameters():
            if parameter.ndim == 2:
                parameter.add_(low_rank_approximation(tuned[name] - parameter, max(1, min(r, *parameter.shape))))
    return before


def linear_layers_only(before, after, r):
    model = copy.deepcopy(before)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and r > 0:
            delta = after.get_submodule(name).weight - module.weight
            with torch.no_grad():
                module.weight.add_(low_rank_approximation(delta, min(r, *delta.shape)))
    return model


def first_rows(b, a, r):
    keep = (torch.arange(len(b)) < r)[:, None]
    return b + keep * (a - b)


CUTS = {
    "changes before": (in_place, "untouched", "changed the model `before`"),
    "returns before": (lambda b, a, r: b, "untouched", "one of the two models"),
    "returns a state dict": (lambda b, a, r: b.state_dict(), "untouched", "you return a"),
    "r = 0 keeps everything": (lambda b, a, r: copy.deepcopy(a), "untouched", "not the one before"),
    "trained biases stay": (cutter(right, vectors=True), "biases and norms", "is no matrix"),
    "starts from after": (cutter(right, start="after"), "biases and norms", "is no matrix"),
    "cuts the weight": (cutter(lambda b, a, r: low_rank_approximation(a, r)), "every matrix", "instead of its change"),
    "cuts the weight before": (
        cutter(lambda b, a, r: low_rank_approximation(b, r) + a - b),
        "every matrix",
        "cut the weight before",
    ),
    "update alone": (cutter(lambda b, a, r: low_rank_approximation(a - b, r)), "every matrix", "without the weight"),
    "wrong sign": (cutter(lambda b, a, r: b + low_rank_approximation(b - a, r)), "every matrix", "wrong sign"),
    "added to after": (cutter(lambda b, a, r: a + low_rank_approximation(a - b, r)), "every matrix", "weight after"),
    "keeps the tail": (cutter(lambda b, a, r: a - low_rank_approximation(a - b, r)), "every matrix", "should be cut"),
    "nothing cut": (cutter(lambda b, a, r: a), "every matrix", "nothing was cut"),
    "nothing added": (cutter(lambda b, a, r: b), "every matrix", "nothing was added"),
    "rank off by one": (cutter(lambda b, a, r: right(b, a, r - 1)), "every matrix", "has rank"),
    "linear layers only": (linear_layers_only, "every matrix", "nothing was added"),
    "first rows": (cutter(first_rows), "every matrix", "not the best one"),
    "large r fails": (cutter(right, edge=False), "a rank above", "ValueError"),
}
test_cut_mistake = each_is_found(checks.truncated_updates, CUTS)


def through_the_state(before, after, r):
    state, tuned = before.state_dict(), after.state_dict()
    for name, value in state.items():
        if value.ndim == 2:
            U, S, Vh = torch.linalg.svd(tuned[name] - value, full_matrices=False)
            state[name] = value + (U[:, :r] * S[:r]) @ Vh[:r]
    model = copy.deepcopy(before)
    model.load_state_dict(state)
    return model


def side_by_side(before, after, r):
    model = copy.deepcopy(after)
    for ours, old, new in zip(model.parameters(), before.parameters(), after.parameters(), strict=True):
        ours.data = old.data.clone()
        if old.dim() == 2 and r:
            ours.data += low_rank_approximation((new - old).detach(), min(r, min(old.shape)))
    return model


RIGHT_CUTS = {"through the state dict": through_the_state, "from a copy of after": side_by_side}
test_other_cuts_pass = each_passes(checks.truncated_updates, RIGHT_CUTS)


def top(delta, r):
    return (energies(torch.zeros_like(delta), delta)[:r]).sum().item()


def directions(size, r):
    return torch.linalg.qr(torch.randn(size, r, dtype=torch.float64)).Q


def chance(delta, r):
    return ((delta @ directions(delta.shape[1], r)).norm() ** 2 / delta.norm() ** 2).item()


def not_orthonormal(delta, r):
    return top(delta, r), ((delta @ torch.randn(delta.shape[1], r).double()).norm() ** 2 / delta.norm() ** 2).item()


def normalised_only(delta, r):
    Q = torch.nn.functional.normalize(torch.randn(delta.shape[1], r).double(), dim=0)
    return top(delta, r), ((delta @ Q).norm() ** 2 / delta.norm() ** 2).item()


def output_side(delta, r):
    Q = directions(delta.shape[0], min(r, delta.shape[0]))
    return top(delta, r), ((Q.T @ delta).norm() ** 2 / delta.norm() ** 2).item()


def fixed_draw(delta, r):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(delta.shape[1], r, dtype=torch.float64, generator=generator)).Q
    return top(delta, r), ((delta @ Q).norm() ** 2 / delta.norm() ** 2).item()


def axes(delta, r):
    chosen = delta[:, torch.randperm(delta.shape[1])[:r]]
    return top(delta, r), (chosen.norm() ** 2 / delta.norm() ** 2).item()


def singular_directions(delta, r):
    V = torch.linalg.svd(delta)[2].T
    chosen = V[:, torch.randperm(len(V))[:r]]
    return top(delta, r), ((delta @ chosen).norm() ** 2 / delta.norm() ** 2).item()


def smallest(delta, r):
    return energies(torch.zeros_like(delta), delta)[-r:].sum().item()


def sum_of_values(delta, r):
    return (singular_values(delta)[:r].sum() / singular_values(delta).sum()).item()


SHARES = {
    "σ instead of σ²": (lambda d, r: (sum_of_values(d, r), chance(d, r)), "top directions", "not σ²"),
    "square root": (lambda d, r: (top(d, r) ** 0.5, chance(d, r)), "top directions", "square root"),
    "left over": (lambda d, r: (1 - top(d, r), chance(d, r)), "top directions", "left over"),
    "smallest": (lambda d, r: (smallest(d, r), chance(d, r)), "top directions", "smallest"),
    "no share": (lambda d, r: ((singular_values(d)[:r] ** 2).sum().item(), chance(d, r)), "top", "not its share"),
    "one number": (lambda d, r: top(d, r), "top directions", "two floats"),
    "not orthonormal": (not_orthonormal, "orthonormal", "should hold everything"),
    "unit length only": (normalised_only, "orthonormal", "should hold everything"),
    "output side": (output_side, "r/k", "output directions"),
    "coordinate axes": (axes, "every side", "everything or nothing"),
    "singular directions": (singular_directions, "every side", "everything or nothing"),
    "formula and noise": (
        lambda d, r: (top(d, r), 1.0 if r == d.shape[1] else r / d.shape[1] + 0.01 * torch.randn(()).item()),
        "orthonormal",
        "hold the same",
    ),
    "fixed draw": (fixed_draw, "r/k", "same at each call"),
    "formula": (lambda d, r: (top(d, r), r / d.shape[1]), "r/k", "same at each call"),
    "the top ones again": (lambda d, r: (top(d, r), top(d, r)), "r/k", "same at each call"),
}
test_share_mistake = each_is_found(checks.top_against_random, SHARES)


def orthogonal(delta, r):
    Q = torch.nn.init.orthogonal_(torch.empty(delta.shape[1], r, dtype=delta.dtype))
    return [top(delta, r), (Q.T @ delta.T @ delta @ Q).trace().item() / (delta**2).sum().item()]


def from_an_svd(delta, r):
    Q = torch.linalg.svd(torch.randn(delta.shape[1], delta.shape[1], dtype=delta.dtype))[0][:, :r]
    return top(delta, r), ((delta @ Q).square().sum() / delta.square().sum()).item()


def gram_schmidt(delta, r):
    found = []
    for _ in range(r):
        q = torch.randn(delta.shape[1], dtype=delta.dtype)
        for _ in range(2):
            q = q - sum((q @ other) * other for other in found)
        found.append(q / q.norm())
    return top(delta, r), sum((delta @ q).norm().item() ** 2 for q in found) / delta.norm().item() ** 2


RIGHT_SHARES = {"orthogonal_": orthogonal, "an SVD of noise": from_an_svd, "Gram–Schmidt": gram_schmidt}
test_other_shares_pass = each_passes(checks.top_against_random, RIGHT_SHARES)


def loop(loss=torch.mean, clear=True, copied=True, result=lambda W, W0: W.detach() - W0, always=None):
    def wrong(W0, X, Y, make_optimizer, steps):
        W = torch.nn.Parameter(W0.clone() if copied else W0)
        optimizer = (always or make_optimizer)([W])
        for _ in range(steps):
            if clear:
                optimizer.zero_grad()
            loss((X @ W.T - Y) ** 2).backward()
            optimizer.step()
        return result(W, W0)

    return wrong


UPDATES = {
    "W instead of ΔW": (loop(result=lambda W, W0: W.detach()), "one step", "instead of its change"),
    "W0 changed": (loop(copied=False), "one step", "changed W0"),
    "sum of errors": (loop(loss=torch.sum), "one step", "not their mean"),
    "wrong sign": (loop(result=lambda W, W0: W0 - W.detach()), "one step", "sign"),
    "still in the graph": (loop(result=lambda W, W0: W - W0), "one step", "plain tensor"),
    "nothing trained": (loop(result=lambda W, W0: 0 * W0), "one step", "nothing was trained"),
    "gradients pile up": (loop(clear=False), "several steps", "pile up"),
    "its own optimizer": (
        loop(always=lambda p: torch.optim.SGD(p, lr=0.1)),
        "the optimizer that is given",
        "not right",
    ),
}


def nothing_to_learn(W0, X, Y, make_optimizer, steps):
    """Makes the targets those that W0 has already, so that a loop which runs later finds no error."""
    Y.copy_(X @ W0.T)
    return torch.zeros_like(W0)


UPDATES["targets overwritten"] = (nothing_to_learn, "one step", "nothing was trained")


def with_a_layer(W0, X, Y, make_optimizer, steps):
    layer = torch.nn.Linear(*W0.T.shape, bias=False, dtype=W0.dtype)
    layer.load_state_dict({"weight": W0})
    optimizer = make_optimizer(list(layer.parameters()))
    for _ in range(steps):
        torch.nn.functional.mse_loss(layer(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (layer.weight - W0).detach()


def of_the_change(W0, X, Y, make_optimizer, steps):
    change = torch.zeros_like(W0, requires_grad=True)
    optimizer = make_optimizer([change])
    for _ in range(steps):
        error = X @ (W0 + change).T - Y
        change.grad = (2 / error.numel() * error.T @ X).detach()
        optimizer.step()
    return change.detach()


RIGHT_UPDATES = {"a layer": with_a_layer, "the change alone, its gradient by hand": of_the_change}
test_other_updates_pass = each_passes(checks.optimizer_update, RIGHT_UPDATES)
test_update_mistake = each_is_found(checks.optimizer_update, UPDATES)


@pytest.mark.parametrize("hint", [1, 2, 3])
def test_help_comes_in_three_sizes(hint: int) -> None:
    report = checks.truncated_updates(CUTS["cuts the weight"][0], hint=hint)
    assert (report.question in report.text) == (hint >= 2)
    assert (report.fix in report.text) == (hint == 3)
