"""Check of lesson 21: the backward pass of the fused layer (B1), its values and what it moves."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_edu.course.checks.report import Report, Wrong, run_steps

Backward = Callable[..., tuple[Tensor | None, Tensor, Tensor]]
FIX = "gh = (B.T @ g.T).mul_(s); then (g @ W).addmm_(gh.T, A) if need_x, gh @ x, and (h @ g).T * s."


@dataclass
class Case:
    """One layer with its saved tensors, and the right gradients."""

    g: Tensor
    x: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    h: Tensor
    s: float

    @property
    def up(self) -> Tensor:
        """The gradient of h without the scale, (r, tokens)."""
        return self.B.T @ self.g.T

    def arguments(self) -> tuple[Any, ...]:
        return self.g, self.x, self.W, self.A, self.B, self.h, self.s


def draw() -> Case:
    """A layer of random shape: r < tokens < in ≠ out. With few tokens, forming B A always costs more than it saves."""
    r, tokens = random.randint(2, 3), random.randint(4, 5)
    inputs, outputs = random.sample(range(6, 13), 2)
    shapes = [(tokens, outputs), (tokens, inputs), (outputs, inputs), (r, inputs), (outputs, r)]
    g, x, W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return Case(g, x, W, A, B, A @ x.T, random.uniform(1.3, 2.7))


class Results(TorchDispatchMode):
    """Keeps what each operation inside the block produces, and counts the multiplications of its products."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []  # held, so that no address is used twice
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.kept.append(result)
            if function._schema.name.removeprefix("aten::") in ("mm", "addmm", "addmm_", "bmm"):
                self.products += result.numel() * [a for a in args if isinstance(a, Tensor)][-1].shape[-2]
        return result

    def new(self, rows: int, columns: int, known: tuple[Any, ...]) -> int:
        """How many matrices of this shape, or transposed, were written beside the known tensors."""
        own = {tensor.untyped_storage().data_ptr() for tensor in known if isinstance(tensor, Tensor)}
        shapes = ((rows, columns), (columns, rows))
        return len({t.untyped_storage().data_ptr() for t in self.kept if tuple(t.shape) in shapes} - own)


def called(candidate: Backward, case: Case, need_x: bool = True) -> tuple[Any, Tensor, Tensor]:
    """What the learner's function returns, if it is three things."""
    got = candidate(*case.arguments(), need_x)
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise Wrong(f"you return {type(got).__name__}: expected three gradients", "For which three tensors?", FIX)
    return got[0], got[1], got[2]


def fused_backward(candidate: Backward, hint: int = 1) -> Report:
    """Exercise B1: ``candidate(g, x, W, A, B, h, s, need_x=True)`` returns the gradients of x, A and B."""

    def compare(name: str, got: Tensor | None, right: Tensor, slips: list[tuple[Tensor, str]], question: str) -> None:
        if not isinstance(got, Tensor) or got.shape != right.shape:
            shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            turned = isinstance(got, Tensor) and got.shape == right.shape[::-1]
            note = ": it is transposed" if turned else ""
            raise Wrong(f"the gradient of {name} is {shape}, and {name} is {tuple(right.shape)}{note}", question, FIX)
        if not torch.allclose(got, right, rtol=1e-9, atol=1e-12):
            known = (words for value, words in slips if torch.allclose(got, value, rtol=1e-9, atol=1e-12))
            off = float((got - right).norm() / right.norm())
            note = next(known, "it is none of the usual slips")
            raise Wrong(f"the gradient of {name} is off by {off:.0%} of its size: {note}", question, FIX)

    def of_A() -> None:
        case = draw()
        s, right = case.s, case.s * case.up @ case.x
        slips = [(right / s, "the scale s is missing"), (right * s, "the scale s is in it twice")]
        compare("A", called(candidate, case)[1], right, slips, "∂L/∂A = s · (Bᵀ gᵀ) x: where does s come in, once?")

    def of_B() -> None:
        case = draw()
        s, right = case.s, case.s * case.g.T @ case.h.T
        slips = [(right / s, "the scale s is missing"), (right * s, "the scale s is in it twice")]
        compare("B", called(candidate, case)[2], right, slips, "∂L/∂B = s · gᵀ hᵀ, with h as (r, tokens). And yours?")

    def of_x() -> None:
        case = draw()
        base, update = case.g @ case.W, case.up.T @ case.A
        slips = [
            (base, "the adapter's part is missing"),
            (case.s * update, "the frozen weight's part is missing"),
            (base + update, "the scale s is missing in the adapter's part"),
            (base + case.s**2 * update, "the scale s is twice in the adapter's part"),
            (case.s * (base + update), "the frozen weight's part is not scaled"),
        ]
        right = base + case.s * update
        compare("x", called(candidate, case)[0], right, slips, "Through which two paths did x reach the output?")

    def finite_differences() -> None:
        case = draw()

        class Layer(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
                h = A @ x.T
                ctx.save_for_backward(x, A, B, h)
                return (x @ case.W.T).addmm_(h.T, B.T, alpha=case.s)

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Any:
                x, A, B, h = ctx.saved_tensors
                return tuple(candidate(g, x, case.W, A, B, h, case.s, True))

        leaves = [tensor.clone().requires_grad_() for tensor in (case.x, case.A, case.B)]
        if not torch.autograd.gradcheck(Layer.apply, leaves, raise_exception=False):
            raise Wrong(
                "as the backward pass of an autograd function it fails torch.autograd.gradcheck",
                "Does your function give the same when it is called a second time?",
                FIX,
            )

    def unchanged() -> None:
        case = draw()
        before = [tensor.clone() for tensor in case.arguments()[:-1]]
        called(candidate, case)
        for name, old, new in zip("gxWABh", before, case.arguments()[:-1], strict=True):
            if not torch.equal(old, new):
                raise Wrong(
                    f"your function writes into {name}, which it was given: a second backward pass would get it wrong",
                    "Which of your in-place operations has a tensor on its left that you did not make?",
                    FIX,
                )

    def skipped() -> None:
        case = draw()
        with Results() as seen:
            gx, _, _ = called(candidate, case, need_x=False)
        (tokens, inputs), outputs, r = case.x.shape, len(case.W), len(case.A)
        question = "Who asks for the gradient of the first layer's input?"
        if gx is not None:
            raise Wrong("with need_x=False you return a gradient for x: expected None", question, FIX)
        if seen.products >= tokens * inputs * outputs + tokens * r * (inputs + 2 * outputs):
            raise Wrong("with need_x=False you still compute the large product g @ W", question, FIX)

    def moved() -> None:
        case = draw()
        with Results() as seen:
            called(candidate, case)
        (tokens, inputs), outputs, r = case.x.shape, len(case.W), len(case.A)
        enough = tokens * inputs * outputs + tokens * r * (2 * inputs + 2 * outputs)
        if seen.products > enough:
            raise Wrong(
                f"your products take {seen.products:,} multiplications; {enough:,} are enough",
                "Do you compute h again, or B A as a whole?",
                FIX,
            )
        if seen.new(tokens, outputs, case.arguments()):
            raise Wrong(
                f"you write a tensor of g's size, {tokens} × {outputs}: that is traffic which a smaller one spares",
                "Which tensor with r numbers a token could take the scale s?",
                FIX,
            )
        if (number := seen.new(tokens, inputs, case.arguments())) > 1:
            raise Wrong(
                f"you write {number} tensors of x's size, {tokens} × {inputs}: one is enough",
                "Which operation adds a product onto a tensor that is already there?",
                FIX,
            )

    steps = [
        ("the gradient of A", of_A),
        ("the gradient of B", of_B),
        ("the gradient of x", of_x),
        ("what was given is left as it was", unchanged),
        ("against finite differences", finite_differences),
        ("without a gradient of x the large product is skipped", skipped),
        ("no product and no large tensor too many", moved),
    ]
    return run_steps("fused backward pass", steps, hint)
