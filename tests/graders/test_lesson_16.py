"""The checks of lesson 16 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from found import assert_random_state_kept, each_is_found, each_passes
from lora_edu.core.config import LoraConfig
from lora_edu.course import checks
from lora_edu.course.notebooks.stored import find_notebook, read
from lora_edu.lowrank import truncated_svd

pytestmark = pytest.mark.graders
NOTEBOOK = "16_better_starts"


def start(W, r, s, power=0.5, divided=True):
    """The function with switches for its mistakes."""
    U, S, Vh = truncated_svd(W, r)
    root = (S / s if divided else S) ** power
    return root[:, None] * Vh, U * root


def all_in_b(W, r, s):
    U, S, Vh = truncated_svd(W, r)
    return Vh, U * S / s


def smallest(W, r, s):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[-r:] / s).sqrt()
    return root[:, None] * Vh[-r:], U[:, -r:] * root


def takes_it_out(W, r, s):
    A, B = start(W, r, s)
    W -= s * B @ A
    return A, B


START: dict[str, tuple[Callable[..., Any], str, str]] = {
    "without s": (lambda W, r, s: start(W, r, s, divided=False), "nearest", "s multiplies it once more"),
    "no root": (lambda W, r, s: start(W, r, s, power=1), "nearest", "square root"),
    "no singular values": (lambda W, r, s: start(W, r, s, power=0), "nearest", "singular values are missing"),
    "all in B": (all_in_b, "evenly", "not shared evenly"),
    "the smallest": (smallest, "nearest", ""),
    "the other order": (lambda W, r, s: start(W, r, s)[::-1], "nearest", "you return"),
    "V for its transpose": (lambda W, r, s: (start(W, r, s)[0].T, start(W, r, s)[1]), "nearest", "you return"),
    "in place": (takes_it_out, "stays as it was", "writes into W"),
}


def by_eigenvectors(W, r, s):
    values, V = torch.linalg.eigh(W.T @ W)
    V, S = V[:, -r:], values[-r:].clamp_min(0).sqrt()
    return (S / s).sqrt()[:, None] * V.T, W @ V / S * (S / s).sqrt()


def by_svd(W, r, s):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    half = torch.diag((S[:r] / s) ** 0.5)
    return half @ Vh[:r], U[:, :r] @ half


RIGHT_START = {"lesson's": start, "eigenvectors": by_eigenvectors, "whole SVD": by_svd}


def twin(config, lr, ratio, alpha=lambda ratio: ratio, rate=lambda lr, ratio: lr, patterns=True):
    """The function with switches for its mistakes."""
    own = {name: value * (alpha(ratio) if patterns else 1) for name, value in config.alpha_pattern.items()}
    changed = dataclasses.replace(config, lora_alpha=config.lora_alpha * alpha(ratio), alpha_pattern=own)
    return changed, rate(lr, ratio)


def written_into(config, lr, ratio):
    config.lora_alpha *= ratio
    for name in config.alpha_pattern:
        config.alpha_pattern[name] *= ratio
    return config, lr


def pattern_written_into(config, lr, ratio):
    for name in config.alpha_pattern:
        config.alpha_pattern[name] *= ratio
    return dataclasses.replace(config, lora_alpha=config.lora_alpha * ratio), lr


def anew(config, lr, ratio):
    return LoraConfig(r=config.r, lora_alpha=config.lora_alpha * ratio, target_modules=config.target_modules), lr


TWIN: dict[str, tuple[Callable[..., Any], str, str]] = {
    "A's rate alone": (lambda c, lr, ratio: (c, lr), "the same losses", "at A's rate"),
    "B's rate alone": (lambda c, lr, ratio: (c, lr * ratio), "the same losses", "at B's rate"),
    "both": (lambda c, lr, n: twin(c, lr, n, rate=lambda lr, n: lr * n), "the same losses", "differ"),
    "alpha divided": (lambda c, lr, n: twin(c, lr, n, alpha=lambda n: 1 / n), "the same losses", "differ"),
    "the root": (lambda c, lr, n: twin(c, lr, n, alpha=lambda n: n**0.5), "the same losses", "differ"),
    "no rsLoRA": (anew, "rsLoRA", "differ"),
    "no patterns": (lambda c, lr, n: twin(c, lr, n, patterns=False), "alpha of their own", "differ"),
    "more rank": (
        lambda c, lr, n: (dataclasses.replace(c, r=int(c.r * n), lora_alpha=c.lora_alpha * n), lr),
        "the same losses",
        "other ranks",
    ),
    "config alone": (lambda c, lr, n: twin(c, lr, n)[0], "the same losses", "you return"),
    "in place": (written_into, "stays as it was", "writes into"),
    "pattern in place": (pattern_written_into, "stays as it was", "writes into"),
}


def by_copy(config, lr, ratio):
    changed = copy.deepcopy(config)
    changed.lora_alpha = config.lora_alpha * ratio
    changed.alpha_pattern = {name: ratio * value for name, value in config.alpha_pattern.items()}
    return [changed, lr]


def by_fields(config, lr, ratio):
    fields = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.init}
    own = {name: value * ratio for name, value in fields["alpha_pattern"].items()}
    return type(config)(**fields | {"lora_alpha": ratio * config.lora_alpha, "alpha_pattern": own}), lr


RIGHT_TWIN = {"replace": twin, "copy": by_copy, "fields": by_fields}


test_starts_are_found = each_is_found(checks.pissa_start, START)
test_twins_are_found = each_is_found(checks.plain_twin, TWIN)
test_other_starts_pass = each_passes(checks.pissa_start, RIGHT_START)
test_other_twins_pass = each_passes(checks.plain_twin, RIGHT_TWIN)


@pytest.mark.parametrize(("which", "status"), [("source", "passed"), ("stub", "not done")])
def test_your_turn_of_the_lesson(which: str, status: str) -> None:
    cell = next(cell for cell in read(find_notebook(NOTEBOOK)).cells if "your-turn" in cell.metadata.get("tags", []))
    space: dict = {"truncated_svd": truncated_svd}
    exec(cell.source if which == "source" else cell.metadata["stub"], space)
    report = checks.pissa_start(space["pissa_start"])
    assert report.status == status, report.text
    assert (report.passed == []) == (which == "stub")


def test_checks_leave_the_random_state_alone(from_solution: Callable) -> None:
    assert_random_state_kept(checks.plain_twin, from_solution(NOTEBOOK, "plain_twin"))
