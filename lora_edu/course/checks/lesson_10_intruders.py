"""Check of lesson 10: intruder dimensions from scratch (B2)."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_edu.course.checks.lesson_10 import named
from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.lowrank import intruder_dimensions

Case = tuple[Tensor, Tensor, int, float]


def rotation(n: int) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def shape(tall: bool = True) -> tuple[int, int]:
    """(out, in): about 40 rows, so that a random direction has no cosine near 1 with any of W's."""
    large, small = random.randint(38, 46), random.randint(26, 32)
    return (large, small) if tall else (small, large)


def parts(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of a matrix whose singular values are well apart, so that its directions are unique."""
    n = min(size)
    S = torch.linspace(9, 1, n, dtype=torch.float64) + 0.1 * torch.rand(n, dtype=torch.float64)
    return rotation(size[0])[:, :n], S, rotation(size[1])[:n]


def rotated_inputs(tall: bool) -> Case:
    """Every output direction is known, no input direction is."""
    U, S, Vh = parts(shape(tall))
    W = (U * S) @ Vh
    return W, W @ rotation(W.shape[1]), random.randint(6, 12), 0.6


def rotated_outputs(tall: bool) -> Case:
    """Every input direction is known, no output direction is."""
    U, S, Vh = parts(shape(tall))
    W = (U * S) @ Vh
    return W, rotation(W.shape[0]) @ W, random.randint(6, 12), random.uniform(0.3, 0.45)


def reordered(tall: bool) -> Case:
    """All directions are known, and the weakest have become the strongest."""
    U, S, Vh = parts(shape(tall))
    return (U * S) @ Vh, (U * S.flip(0)) @ Vh, random.randint(5, 9), 0.5


def planted(tall: bool) -> Case:
    """A few new directions, stronger than the known ones."""
    U, S, Vh = parts(shape(tall))
    W, some = (U * S) @ Vh, random.randint(2, 4)
    tuned = W + random.uniform(9, 14) * rotation(W.shape[0])[:, :some] @ rotation(W.shape[1])[:some]
    return W, tuned, random.randint(some + 2, some + 5), random.uniform(0.45, 0.65)


def weak(tall: bool) -> Case:
    """The weaker half of the directions is new, the stronger half is as it was."""
    U, S, Vh = parts(shape(tall))
    half = len(S) // 2
    other = torch.linalg.qr(torch.cat([U[:, :half], torch.randn(U.shape[0], len(S) - half, dtype=U.dtype)], 1)).Q
    other[:, :half] = U[:, :half]
    return (U * S) @ Vh, (other * S) @ Vh, random.randint(5, 9), random.uniform(0.45, 0.65)


def outside(tall: bool) -> Case:
    """A new direction that the pretrained weight maps nothing to: the only one, with one output more than inputs."""
    n = random.randint(26, 34)
    frame = rotation(n + 1)
    _, S, Vh = parts((n + 1, n))
    W = (frame[:, :n] * S) @ Vh
    return W, W + 14 * frame[:, n:] @ rotation(n)[:1], random.randint(4, 8), random.uniform(0.5, 0.7)


def update(tall: bool) -> Case:
    """An update of low rank, as LoRA's."""
    out, inputs = shape(tall)
    W, r = torch.randn(out, inputs, dtype=torch.float64), random.randint(2, 4)
    delta = torch.randn(out, r, dtype=torch.float64) @ torch.randn(r, inputs, dtype=torch.float64)
    return W, W + random.uniform(0.4, 1.2) * delta, random.randint(5, 10), random.uniform(0.3, 0.8)


KINDS = {
    rotated_inputs: ("rotated inputs: every direction is known", "Which side's vectors? What is a sign worth?"),
    reordered: ("the order has changed: every direction is known", "With which pretrained vectors do you compare?"),
    rotated_outputs: ("rotated outputs: most directions are new", "When does the pretrained weight know a direction?"),
    planted: ("new directions at the top", "Whose directions do you count, and which of them fit none?"),
    weak: ("new directions too weak for the top", "How many of the tuned weight's directions do you look at?"),
    outside: ("a direction that W maps nothing to is new", "How many left singular vectors does W really have?"),
    update: ("updates of low rank", "What makes a direction of the tuned weight an intruder?"),
}


def cosines(W: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """Left against left: a row for each of W's vectors, a column for each of the tuned weight's."""
    return np.linalg.svd(W, full_matrices=False)[0].T @ np.linalg.svd(tuned, full_matrices=False)[0]


def counted(W: np.ndarray, tuned: np.ndarray, top_k: int, threshold: float) -> int:
    """The right number, with NumPy."""
    return int((np.abs(cosines(W, tuned)[:, :top_k]).max(0) < threshold).sum())


def clear(case: Case) -> bool:
    """No cosine that decides lies so near the threshold that rounding could move it over."""
    largest = np.abs(cosines(case[0].numpy(), case[1].numpy())).max(0)
    return bool(np.abs(largest - case[3]).min() > 1e-4)


def other_counts(W: Tensor, tuned: Tensor, top_k: int, threshold: float) -> dict[str, int]:
    """What usual mistakes would give here."""
    (U, _, Vh), (new_U, _, new_Vh) = (torch.linalg.svd(each, full_matrices=False) for each in (W, tuned))
    signed = U.T @ new_U[:, :top_k]
    left, top = signed.abs(), (U[:, :top_k].T @ new_U[:, :top_k]).abs()
    whole = (torch.linalg.svd(W)[0].T @ new_U[:, :top_k]).abs()
    delta_U = torch.linalg.svd(tuned - W, full_matrices=False)[0]

    def below(values: Tensor) -> int:
        return int((values < threshold).sum())

    return {
        "a sign is arbitrary: a cosine of −0.99 is a known direction, too": below(signed.amax(0)),
        "these are the right singular vectors, directions of the input": below((Vh @ new_Vh[:top_k].T).abs().amax(0)),
        "you compare with the pretrained weight's top directions only, not with all of them": below(top.amax(0)),
        "you compare number i with number i; the order may have changed": below(top.diagonal()),
        "one pretrained vector that fits is enough, so neither the mean nor the smallest tells": below(left.mean(0)),
        "you count pretrained directions that were lost, not new ones": below(left.amax(1)),
        "you count pretrained top directions that were lost, not new ones": below(top.amax(1)),
        "you count the known ones": top_k - below(left.amax(0)),
        "you look at all directions of the tuned weight, not at its top": below((U.T @ new_U).abs().amax(0)),
        "you look at the weakest directions of the tuned weight": below((U.T @ new_U[:, -top_k:]).abs().amax(0)),
        "directions that the pretrained weight maps nothing to are in your comparison": below(whole.amax(0)),
        "these are the directions of the update, not those of the tuned weight": below(
            (U.T @ delta_U[:, :top_k]).abs().amax(0)
        ),
        "you count pairs, not directions": below(left),
        "these are squared cosines": below((left**2).amax(0)),
        "your threshold stays at 0.5": int((left.amax(0) < 0.5).sum()),
    }


def intruders(candidate: Callable[[Tensor, Tensor, int, float], int], hint: int = 1) -> Report:
    """Exercise B2 of lesson 10: ``candidate(W, tuned, top_k, threshold)`` counts intruder dimensions."""
    fix = (
        "U of both from torch.linalg.svd(…, full_matrices=False); cosines = (U_W.T @ U_tuned[:, :top_k]).abs(); "
        "count the columns whose largest value is below the threshold."
    )

    def draw(make: Callable[[bool], Case], tall: bool) -> tuple[int, int, Case]:
        """The learner's count, the right one, and the case."""
        while not clear(case := make(tall)):
            continue
        W, tuned, top_k, threshold = case
        got = number(candidate(W.clone(), tuned.clone(), top_k, threshold))
        return got, counted(W.numpy(), tuned.numpy(), top_k, threshold), case

    def compare(make: Callable[[bool], Case], question: str) -> None:
        for tall in (True, False, True, False):
            got, right, (W, _, top_k, threshold) = draw(make, tall)
            if got == right:
                continue
            # One case may fit several mistakes, so the mistake is told by a case of every kind.
            told = [draw(kind, tall) for kind in KINDS for tall in (True, False)]
            note = named([each[0] for each in told], [other_counts(*case) for *_, case in told])
            sizes = f"W {tuple(W.shape)}, top_k = {top_k}, threshold = {threshold:.2f}"
            raise Wrong(
                f"{sizes}: you count {got} instead of {right}; {note or 'not the new directions'}", question, fix
            )

    def number(value: Any) -> int:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise Wrong(
                f"you return {type(value).__name__}: expected a whole number",
                "Do you return the cosines, a share, or a count?",
                fix,
            )
        return int(value)

    def library() -> None:
        while not (clear(case := update(tall=False)) and clear((*case[:2], 10, 0.5))):
            continue
        got, right = number(candidate(*case[:2], 10, 0.5)), intruder_dimensions(*case[:2], 10, 0.5)
        if got != right:
            raise Wrong(f"you count {got}, the library {right}", "Does your function do the same at every call?", fix)

    steps: list[Step] = [(words, partial(compare, make, question)) for make, (words, question) in KINDS.items()]
    return run_steps("intruder dimensions", [*steps, ("equal to the library", library)], hint)
