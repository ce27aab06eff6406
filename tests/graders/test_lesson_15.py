"""The checks of lesson 15 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from found import assert_random_state_kept, each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.course.notebooks.stored import find_notebook, read

pytestmark = pytest.mark.graders
NOTEBOOK = "15_rivals"


def in_place(h, D, d, U, u):
    h += torch.relu(h @ D.T + d) @ U.T + u
    return h


def returns_wide(h, D, d, U, u):
    return torch.relu(h @ D.T + d)


BOTTLENECK: dict[str, tuple[Callable[..., Any], str, str]] = {
    "linear": (lambda h, D, d, U, u: h + (h @ D.T + d) @ U.T + u, "relu", "could be merged"),
    "relu at the end": (lambda h, D, d, U, u: h + torch.relu((h @ D.T + d) @ U.T + u), "relu", "after U"),
    "no d": (lambda h, D, d, U, u: h + torch.relu(h @ D.T) @ U.T + u, "relu", "d is missing"),
    "no u": (lambda h, D, d, U, u: h + torch.relu(h @ D.T + d) @ U.T, "relu", "u is missing"),
    "d after relu": (lambda h, D, d, U, u: h + (torch.relu(h @ D.T) + d) @ U.T + u, "relu", "d is added after"),
    "replaces h": (lambda h, D, d, U, u: torch.relu(h @ D.T + d) @ U.T + u, "gives back h", "start at the base"),
    "stays narrow": (returns_wide, "gives back h", "you return"),
    "in place": (in_place, "stays as it was", "writes into"),
}
RIGHT_BOTTLENECK = {
    "plain": lambda h, D, d, U, u: h + torch.relu(h @ D.T + d) @ U.T + u,
    "functional": lambda h, D, d, U, u: F.linear(F.relu(F.linear(h, D, d)), U, u) + h,
    "einsum": lambda h, D, d, U, u: u + h + torch.einsum("wm,btm->btw", U, (h @ D.T + d).clamp(min=0)),
}
PREFIX: dict[str, tuple[Callable[..., Any], str, str]] = {
    "keys alone": (lambda t, n, h, kv, w: n * kv * w * t, "as many", "keys alone"),
    "query heads": (lambda t, n, h, kv, w: 2 * n * h * w * t, "fewer", "query has that many"),
    "one layer": (lambda t, n, h, kv, w: 2 * kv * w * t, "as many", "one layer"),
    "one head": (lambda t, n, h, kv, w: 2 * n * w * t, "as many", "one head"),
    "one token": (lambda t, n, h, kv, w: 2 * n * kv * w, "as many", "one token"),
    "text": (lambda t, n, h, kv, w: "2", "as many", ""),
}
RIGHT_PREFIX = {
    "product": lambda t, n, h, kv, w: 2 * n * kv * w * t,
    "sum": lambda t, n, h, kv, w: sum(kv * w + kv * w for _ in range(n) for _ in range(t)),
}


def scaled(rows=True, columns=True, with_bias=True, bias_inside=False, empty=True, shift=0.0, by_shape=False):
    """The function with switches for its mistakes."""

    def merged(weight, bias, scale, feedforward):
        scale = scale + shift
        if by_shape:
            feedforward = len(scale) != weight.shape[0]
        if feedforward:
            return (weight * scale if columns else weight), (bias * 2 if bias_inside and bias is not None else bias)
        if bias is None:
            return scale[:, None] * weight, None if empty else torch.zeros(len(weight))
        return (scale[:, None] * weight if rows else weight), (scale * bias if with_bias else bias)

    return merged


def writes(weight, bias, scale, feedforward):
    weight *= scale if feedforward else scale[:, None]
    return weight, bias if feedforward or bias is None else scale * bias


SCALE: dict[str, tuple[Callable[..., Any], str, str]] = {
    "weight left": (scaled(rows=False), "scaled outputs", "as it was"),
    "bias left": (scaled(with_bias=False), "scaled outputs", "the bias is not scaled"),
    "one plus l": (scaled(shift=1.0), "scaled outputs", "1 was added"),
    "columns left": (scaled(columns=False), "scaled inputs", "columns scaled"),
    "bias scaled with inputs": (scaled(bias_inside=True), "scaled inputs", "the bias has changed"),
    "by shape": (scaled(by_shape=True), "square", "confused"),
    "a bias from nothing": (scaled(empty=False), "without a bias", "you return one"),
    "weight alone": (lambda weight, bias, scale, feedforward: weight, "scaled outputs", "you return"),
    "in place": (writes, "stays as it was", "writes into"),
}


def by_diagonals(weight, bias, scale, feedforward):
    diagonal = torch.diag(scale)
    if feedforward:
        return weight @ diagonal, bias
    return diagonal @ weight, None if bias is None else diagonal @ bias


RIGHT_SCALE = {"switches": scaled(), "diagonals": by_diagonals}


test_networks_are_found = each_is_found(checks.bottleneck, BOTTLENECK)
test_counts_are_found = each_is_found(checks.prefix_numbers, PREFIX)
test_merges_are_found = each_is_found(checks.merged_scale, SCALE)
test_other_networks_pass = each_passes(checks.bottleneck, RIGHT_BOTTLENECK)
test_other_counts_pass = each_passes(checks.prefix_numbers, RIGHT_PREFIX)
test_other_merges_pass = each_passes(checks.merged_scale, RIGHT_SCALE)


@pytest.mark.parametrize(("which", "status"), [("source", "passed"), ("stub", "not done")])
def test_your_turn_of_the_lesson(which: str, status: str) -> None:
    cell = next(cell for cell in read(find_notebook(NOTEBOOK)).cells if "your-turn" in cell.metadata.get("tags", []))
    space: dict = {"torch": torch}
    exec(cell.source if which == "source" else cell.metadata["stub"], space)
    report = checks.bottleneck(space["bottleneck"])
    assert report.status == status, report.text
    assert (report.passed == []) == (which == "stub")


def test_checks_leave_the_random_state_alone(from_solution: Callable) -> None:
    assert_random_state_kept(checks.merged_scale, from_solution(NOTEBOOK, "merged_scale"))
