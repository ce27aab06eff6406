"""The checks of lesson 17 pass the solutions, leave stubs alone, and name the mistake in plausible wrong answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from found import assert_found, assert_random_state_kept, drawn_seeds, each_is_found, each_passes
from lora_edu.course import checks
from lora_edu.course.notebooks.stored import find_notebook, read

pytestmark = pytest.mark.graders
NOTEBOOK = "17_other_shapes"
BUDGET = 78_336


def rows(matrix: Tensor) -> Tensor:
    return matrix.norm(dim=1, keepdim=True)


def dora(direction: Callable[..., Tensor], detached: bool = True, with_m: bool = True) -> Callable[..., Tensor]:
    """The function with one part of it exchanged: ``direction(W, update, norms)``."""

    def forward(x, W, b, A, B, s, m):
        update = s * (B @ A)
        norms = rows(W + update)
        weight = direction(W, update, norms.detach() if detached else norms)
        return x @ ((m[:, None] if with_m else 1) * weight).T + b

    return forward


def right_direction(W, update, norms):
    return (W + update) / norms


def scales_the_bias(x, W, b, A, B, s, m):
    turned = W + s * (B @ A)
    return (m / turned.norm(dim=1).detach()) * (x @ turned.T + b)


def no_scale(x, W, b, A, B, s, m):
    return dora(right_direction)(x, W, b, A, B, 1.0, m)


def no_gradient(x, W, b, A, B, s, m):
    with torch.no_grad():
        return dora(right_direction)(x, W, b, A, B, s, m)


def all_detached(x, W, b, A, B, s, m):
    turned = (W + s * (B @ A)).detach()
    return x @ (m[:, None] * turned / rows(turned)).T + b


def in_place(x, W, b, A, B, s, m):
    W += s * (B @ A)
    return x @ (m[:, None] * W / rows(W).detach()).T + b


DORA: dict[str, tuple[Callable[..., Any], str, str]] = {
    "norms of W alone": (dora(lambda W, update, norms: (W + update) / rows(W)), "m ⊙", "the norms of W alone"),
    "columns": (dora(lambda W, update, norms: (W + update) / (W + update).norm(dim=0)), "frozen layer", "divided"),
    "one norm": (dora(lambda W, update, norms: (W + update) / (W + update).norm()), "frozen layer", "divided"),
    "only W divided": (dora(lambda W, update, norms: W / rows(W) + update), "m ⊙", "only W is divided"),
    "no norm": (dora(lambda W, update, norms: W + update), "frozen layer", "divided"),
    "no m": (dora(right_direction, with_m=False), "frozen layer", "multiplied"),
    "no s": (no_scale, "m ⊙", "the scale s is missing"),
    "b scaled": (scales_the_bias, "m ⊙", "b is scaled, too"),
    "no b": (lambda x, W, b, A, B, s, m: dora(right_direction)(x, W, 0 * b, A, B, s, m), "frozen layer", "start at"),
    "LoRA": (lambda x, W, b, A, B, s, m: x @ (W + s * (B @ A)).T + b, "m ⊙", "that is LoRA"),
    "through the norm": (dora(right_direction, detached=False), "constants", "it goes through the norm"),
    "no gradient": (no_gradient, "constants", "no gradient reaches"),
    "all detached": (all_detached, "constants", "none at all reaches A"),
    "transposed": (lambda x, W, b, A, B, s, m: W, "frozen layer", "you return"),
    "in place": (in_place, "stays as it was", "writes into"),
}


def by_outputs(x, W, b, A, B, s, m):
    with torch.no_grad():
        norms = ((W + s * B @ A) ** 2).sum(-1).sqrt()
    return (x @ W.mT + s * ((x @ A.mT) @ B.mT)) * (m / norms) + b


def by_thin_norms(x, W, b, A, B, s, m):
    squares = (W**2).sum(1) + 2 * s * ((W @ A.T) * B).sum(1) + s**2 * ((B @ (A @ A.T)) * B).sum(1)
    g = m / squares.sqrt().detach()
    return torch.einsum("...i,oi->...o", x, g[:, None] * (W + s * (B @ A))) + b


RIGHT_DORA = {"plain": dora(right_direction), "outputs": by_outputs, "thin norms": by_thin_norms}


def largest(scores: dict[str, Tensor], shares: dict[str, int]) -> dict[str, Tensor]:
    """Masks of the largest scores of each tensor."""
    masks = {}
    for name, share in shares.items():
        mask = torch.zeros(scores[name].numel(), dtype=torch.bool)
        mask[scores[name].flatten().topk(share).indices] = True
        masks[name] = mask.view_as(scores[name])
    return masks


def equal_shares(model, budget: int = BUDGET) -> dict[str, int]:
    whole = sum(parameter.numel() for parameter in model.parameters())
    shares = {name: budget * each.numel() // whole for name, each in model.named_parameters()}
    shares["model.embed_tokens.weight"] += budget - sum(shares.values())
    return shares


def sizes_of_gradients(model, batches, squared: bool = False) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters, strict=True)}
    for parameter in parameters:
        parameter.requires_grad_(True)
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, parameters)
        for name, gradient in zip(names, gradients, strict=True):
            found[name] += gradient**2 if squared else gradient
    return {name: size.abs() for name, size in found.items()}


def random_entries(model, batches, rate: float = 2e-3, budget: int = BUDGET):
    """The lesson's mask: as many entries of each linear layer as LoRA has numbers there."""
    shares = {
        name: budget // 9792 * sum(each.shape)
        for name, each in model.named_parameters()
        if each.dim() == 2 and "embed" not in name
    }
    return largest({name: torch.rand(model.get_parameter(name).shape) for name in shares}, shares), rate


def changed(masks: Callable[[dict[str, Tensor]], Any], rate: float = 1e-3) -> Callable[..., Any]:
    """The lesson's mask with something done to it."""
    return lambda model, batches: (masks(random_entries(model, batches)[0]), rate)


def one_less(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    first = next(iter(masks.values()))
    first.view(-1)[first.flatten().nonzero()[0]] = False
    return masks


def trains(model, batches):
    answer = random_entries(model, batches)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    return answer


MASKS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "masks alone": (lambda model, batches: random_entries(model, batches)[0], "masks for", "you return"),
    "a rate of zero": (changed(lambda masks: masks, rate=0.0), "masks for", "above 0"),
    "floats": (changed(lambda masks: {name: mask.float() for name, mask in masks.items()}), "masks for", "float32"),
    "transposed": (changed(lambda masks: {name: mask.T for name, mask in masks.items()}), "masks for", "expected"),
    "names of modules": (
        changed(lambda masks: {name.removesuffix(".weight"): mask for name, mask in masks.items()}),
        "masks for",
        "no parameter of the model",
    ),
    "indices": (changed(lambda masks: {name: mask.nonzero() for name, mask in masks.items()}), "masks for", "int64"),
    "changes the model": (trains, "masks for", "has changed the model"),
    "one less": (changed(one_less), "78,336 weights", "78,335"),
    "one in each hundred": (lambda model, batches: random_entries(model, batches, budget=9792), "78,336", "9,792"),
    "nothing": (changed(lambda masks: {}), "78,336", "you choose 0"),
}


def with_squares(model, batches):
    return largest(sizes_of_gradients(model, batches, squared=True), equal_shares(model)), 1e-3


def without_norms(model, batches):
    shares = {name: share for name, share in equal_shares(model).items() if "norm" not in name}
    shares["model.embed_tokens.weight"] += BUDGET - sum(shares.values())
    return largest(sizes_of_gradients(model, batches), shares), 8e-4


TOO_FAST = (lambda model, batches: (with_squares(model, batches)[0], 1e-2), "ahead of LoRA", "Is the rate right")
SLOW: dict[str, tuple[Callable[..., Any], str, str]] = {
    "random": (random_entries, "ahead of LoRA", "random weights"),
    "right places, ten times the rate": TOO_FAST,
}
RIGHT_MASKS = {"squares": with_squares, "without norms": without_norms}

test_forwards_are_found = each_is_found(checks.dora_forward, DORA)
test_other_forwards_pass = each_passes(checks.dora_forward, RIGHT_DORA)
test_masks_are_found = each_is_found(checks.better_mask, MASKS)


# Each of these trains for some seconds, so that each has one draw, another one.
@pytest.mark.parametrize("mistake", SLOW)
def test_masks_that_train_worse_are_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", drawn_seeds()[list(SLOW).index(mistake)])
    answer, step, words = SLOW[mistake]
    assert_found(checks.better_mask(answer), step, words)


@pytest.mark.parametrize("right", RIGHT_MASKS)
def test_other_masks_pass(right: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", drawn_seeds()[1 + list(RIGHT_MASKS).index(right)])
    report = checks.better_mask(RIGHT_MASKS[right])
    assert report.status == "passed", report.text


@pytest.mark.parametrize(("which", "status"), [("source", "passed"), ("stub", "not done")])
def test_your_turn_of_the_lesson(which: str, status: str) -> None:
    cell = next(cell for cell in read(find_notebook(NOTEBOOK)).cells if "your-turn" in cell.metadata.get("tags", []))
    space: dict = {"torch": torch}
    exec(cell.source if which == "source" else cell.metadata["stub"], space)
    report = checks.dora_forward(space["dora"])
    assert report.status == status, report.text
    assert (report.passed == []) == (which == "stub")


def test_checks_leave_the_random_state_alone() -> None:
    assert_random_state_kept(checks.dora_forward, by_outputs)
