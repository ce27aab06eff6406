"""The checks of lesson 15: count a prefix (A1), merge a scale (B1);
in the lesson itself the small network behind a layer."""

import random
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    close,
    is_several,
    is_tensor,
    known_slip,
    need_untouched,
    need_whole,
    normal,
    shape_or_type,
    with_note,
)


def bottleneck(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """*Your turn* in lesson 15: ``candidate(h, D, d, U, u)`` is h + relu(h Dᵀ + d) Uᵀ + u."""
    whole = "h + torch.relu(h @ D.T + d) @ U.T + u"

    def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        m, width = random.randint(2, 5), random.randint(7, 12)
        rows = random.randint(2, 4), random.randint(5, 6)
        return normal(*rows, width), normal(m, width), normal(m), normal(width, m), normal(width)

    def ask(h: Tensor, *network: Tensor) -> Tensor:
        got = candidate(h.clone(), *(each.clone() for each in network))
        if not is_tensor(got, h.shape):
            raise Wrong(
                f"for h of shape {tuple(h.shape)} you return {shape_or_type(got)}",
                "D is (m, width). Which product takes h from width numbers to m?",
                "h @ D.T has m numbers for each token, and (…) @ U.T has width numbers again.",
            )
        return got

    def start() -> None:
        h, D, d, U, u = drawn()
        if not close(ask(h, D, d, 0 * U, 0 * u), h):
            raise Wrong(
                "with U and u at zero your layer does not give back h, so training would not start at the base model",
                "What does the network do to h: does it replace it, or add to it?",
                whole,
            )

    def value() -> None:
        h, D, d, U, u = drawn()
        got, inner = ask(h, D, d, U, u), h @ D.T + d
        if close(got, h + inner.clamp_min(0) @ U.T + u):
            return
        slips = [
            (h + inner @ U.T + u, "there is no relu in it, so it is a linear layer, and could be merged"),
            (h + (inner.clamp_min(0) @ U.T + u).clamp_min(0), "relu comes once more, after U"),
            (h + (inner @ U.T + u).clamp_min(0), "relu comes after U instead of before it"),
            (h + (h @ D.T).clamp_min(0) @ U.T + u, "d is missing"),
            (h + ((h @ D.T).clamp_min(0) + d) @ U.T + u, "d is added after relu"),
            (h + inner.clamp_min(0) @ U.T, "u is missing"),
            (inner.clamp_min(0) @ U.T + u, "h itself is missing"),
            (h.clamp_min(0) + inner.clamp_min(0) @ U.T + u, "relu is taken of h, too"),
        ]
        note = known_slip(got, slips, close)
        raise Wrong(
            with_note("the output is not h + U relu(D h + d) + u", note),
            "In which order do D, d, relu, U and u come?",
            whole,
        )

    def untouched() -> None:
        given = drawn()
        need_untouched(
            lambda: candidate(*given),
            given,
            "your function writes into what it was given, and the model still needs it",
            "Use h + …, which makes a new tensor, not h += ….",
        )

    steps = [
        ("with U and u at zero it gives back h", start),
        ("h + U relu(D h + d) + u", value),
        ("what it was given stays as it was", untouched),
    ]
    return run_steps("a small network behind a layer", steps, hint)


def prefix_numbers(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """How many numbers a prefix trains. Exercise A1 of lesson 15."""
    question = "Which two things does each attention layer find for each token of the prefix, and how long are they?"
    fix = "2 * layers * key_value_heads * head_width * tokens: a key and a value for each head in each layer."

    def ask(tokens: int, layers: int, heads: int, kv: int, width: int) -> None:
        got = need_whole(candidate(tokens, layers, heads, kv, width), question, fix)
        right = 2 * layers * kv * width * tokens
        if got == right:
            return
        slips = {
            layers * heads * width * tokens: "that is the queries",
            right // 2: "that is the keys alone, or the values",
            2 * layers * heads * width * tokens: "the query has that many heads; keys and values may have fewer",
            2 * kv * width * tokens: "that is one layer",
            2 * layers * width * tokens: "that is one head",
            2 * layers * kv * width: "that is one token",
        }
        note = slips.get(got, "")
        raise Wrong(
            with_note(f"{tokens} tokens, {layers} layers, {kv} key heads of {width}: you count {got:,}", note),
            question,
            fix,
        )

    def equal_heads() -> None:
        for _ in range(5):
            heads = random.randint(3, 9)
            ask(random.randint(5, 30), random.randint(2, 12), heads, heads, random.randint(7, 40))

    def grouped() -> None:
        for _ in range(5):
            kv = random.randint(2, 4)
            ask(random.randint(5, 30), random.randint(2, 12), kv * random.randint(2, 4), kv, random.randint(7, 40))

    steps = [("as many key heads as query heads", equal_heads), ("fewer key heads than query heads", grouped)]
    return run_steps("the numbers of a prefix", steps, hint)


def merged_scale(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """(IA)³'s vector in a weight and a bias. Exercise B1 of lesson 15."""

    def drawn(bias: bool = True) -> tuple[Tensor, Tensor | None, int, int]:
        outputs, inputs = random.sample(range(5, 12), 2)
        return normal(outputs, inputs), normal(outputs) if bias else None, outputs, inputs

    def ask(weight: Tensor, bias: Tensor | None, scale: Tensor, feedforward: bool) -> tuple[Tensor, Tensor | None]:
        got = candidate(weight.clone(), None if bias is None else bias.clone(), scale.clone(), feedforward)
        if not is_several(got, 2) or not is_tensor(got[0], weight.shape):
            what = f"{shape_or_type(got[0])} first" if is_several(got, 2) else shape_or_type(got)
            raise Wrong(
                f"for a weight {tuple(weight.shape)} you return {what}",
                "What are the two things that a linear layer holds?",
                "Return (weight, bias), each in the shape in which it came.",
            )
        if bias is None and got[1] is not None:
            raise Wrong(
                "the layer had no bias, and you return one",
                "What is l times nothing?",
                "Return None for the bias where there is none.",
            )
        if bias is not None and not is_tensor(got[1], bias.shape):
            raise Wrong(
                f"for a bias {tuple(bias.shape)} you return {shape_or_type(got[1])}",
                "Does the bias have one number for each output?",
                "The bias keeps its shape, (out,).",
            )
        return got[0], got[1]

    def outputs() -> None:
        weight, bias, out, _ = drawn()
        scale = normal(out)
        got, got_bias = ask(weight, bias, scale, False)
        if not close(got, scale[:, None] * weight):
            slips = [(weight, "it is the weight as it was"), ((1 + scale)[:, None] * weight, "1 was added to l")]
            raise Wrong(
                with_note("the weight does not become l ⊙ W, row by row", known_slip(got, slips, close)),
                "y_i is scaled by l_i. Which row or column of W makes y_i?",
                "scale[:, None] * weight",
            )
        if got_bias is None or bias is None or not close(got_bias, scale * bias):
            raise Wrong(
                "the bias is not scaled as it should be: y = l ⊙ (W x + b)",
                "What stands in the brackets that l multiplies?",
                "scale * bias",
            )

    def inputs() -> None:
        weight, bias, _, inside = drawn()
        scale = normal(inside)
        got, got_bias = ask(weight, bias, scale, True)
        if not close(got, weight * scale):
            raise Wrong(
                "with feedforward=True the weight does not become W with its columns scaled",
                "x_j is scaled by l_j before W reads it. Which row or column of W meets x_j?",
                "weight * scale scales column j by l_j.",
            )
        if got_bias is None or bias is None or not close(got_bias, bias):
            raise Wrong(
                "with feedforward=True the bias has changed: y = W (l ⊙ x) + b",
                "Does b stand inside what l multiplies?",
                "Return the bias as it was.",
            )

    def square() -> None:
        size = random.randint(5, 9)
        weight, bias, scale = normal(size, size), normal(size), normal(size)
        for feedforward, right in ((False, scale[:, None] * weight), (True, weight * scale)):
            if not close(ask(weight, bias, scale, feedforward)[0], right):
                raise Wrong(
                    f"for a square weight and feedforward={feedforward} rows and columns are confused",
                    "Does your answer look at the shapes instead of feedforward?",
                    "Let feedforward decide: rows for outputs, columns for inputs.",
                )

    def bare() -> None:
        weight, _, out, inside = drawn(bias=False)
        ask(weight, None, normal(out), False)
        ask(weight, None, normal(inside), True)

    def untouched() -> None:
        weight, bias, out, _ = drawn()
        scale = normal(out)
        assert bias is not None
        given = weight, bias, scale
        need_untouched(
            lambda: candidate(*given, False),
            given,
            "your function writes into what it was given, so that nothing could be unmerged",
            "Use *, not *=.",
        )

    steps = [
        ("scaled outputs: the rows of W, and b", outputs),
        ("scaled inputs: the columns of W, and not b", inputs),
        ("a square weight", square),
        ("a layer without a bias", bare),
        ("what it was given stays as it was", untouched),
    ]
    return run_steps("a scale, merged", steps, hint)
