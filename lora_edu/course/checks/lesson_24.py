"""The checks of lesson 24: a profile (A1), a backward pass (B1), a ratio (C1), and a loss in pieces (your turn)."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_edu.course.checks.candidates import AUTOGRAD, without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import (
    Operations,
    close,
    close_number,
    is_number,
    is_several,
    is_tensor,
    is_transposed,
    known_slip,
    need_several,
    normal,
    off_by,
    scale_slips,
    shape_or_type,
)

Row = tuple[str, int, float, float]  # (name, calls, self_ms, total_ms)
Work = list[tuple[float, float]]  # (operations, bytes) of one operation after another
CEILING, BANDWIDTH = 60e9, 12e9
Backward = Callable[..., tuple[Tensor | None, Tensor, Tensor]]
FIX = "gh = (B.T @ g.T).mul_(s); then (g @ W).addmm_(gh.T, A) if need_x, gh @ x, and (h @ g).T * s."


def require(got: float, right: float, slips: Mapping[float, str], case: str, question: str, fix: str) -> None:
    """Raise ``Wrong`` unless the number is right; name the mistake if it is one of the known ones."""
    if not is_number(got):
        raise Wrong(f"{case} you return {got!r}: expected a number", question, fix)
    if not close_number(got, right):
        note = known_slip(got, slips.items(), otherwise="this is none of the usual slips")
        raise Wrong(f"{case} you get {got:,.6g} instead of {right:,.6g}: {note}", question, fix)


def time_left(candidate: Callable[[list[Row], list[str]], float], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(rows, removed)`` is the share of a step that stays if some rows took no time."""

    def compare(removed: list[str], case: str) -> None:
        own = {name: random.uniform(2, 9) for name in ("mm", "mul", "add", "bernoulli_", "copy_")}
        rows = [(name, random.randint(2, 40), self_ms, self_ms) for name, self_ms in own.items()]
        # As in the table of PyTorch's profiler: a row's total holds the rows that it called, its own time does not.
        for name, called in (("linear", "mm"), ("dropout", "mul")):
            self_ms = random.uniform(0.2, 0.9)
            rows.append((name, random.randint(2, 40), self_ms, self_ms + own[called]))
        random.shuffle(rows)
        whole, gone = sum(row[2] for row in rows), sum(row[2] for row in rows if row[0] in removed)
        totals, gone_totals = sum(row[3] for row in rows), sum(row[3] for row in rows if row[0] in removed)
        calls, gone_calls = sum(row[1] for row in rows), sum(row[1] for row in rows if row[0] in removed)
        right = 1 - gone / whole
        slips = {
            1 - gone_totals / totals: "the column total counts what a row calls a second time, in the called row",
            1 - gone_totals / whole: "of the removed rows you take the total, which holds what they call",
            1 - gone_calls / calls: "you count calls, and they do not all take equally long",
            gone / whole: "this is the share that goes",
            whole - gone: "these are milliseconds, not a share",
            whole / (whole - gone): "this is how many times as fast the step gets",
        }
        require(
            candidate(list(rows), list(removed)),
            right,
            slips,
            case,
            "Which of the two columns of times adds up to the whole step?",
            "Divide the sum of self_ms over the rows that stay by the sum of self_ms over all rows.",
        )

    steps = [
        ("one operation less", lambda: compare(["bernoulli_"], "without bernoulli_")),
        ("a row that calls others", lambda: compare(["dropout", "bernoulli_"], "without dropout and bernoulli_")),
        ("nothing is removed", lambda: compare([], "without taking anything away")),
    ]
    return run_steps("what a profile allows at most", steps, hint)


def loss_by_pieces(candidate: Callable[..., tuple[Tensor, Tensor]], hint: int = 1) -> Report:
    """Your turn: ``candidate(hidden, weight, labels, rows)`` is the mean loss and its gradient, piece by piece."""

    def inputs() -> tuple[Tensor, Tensor, Tensor, int]:
        rows, vocabulary, width = random.randint(3, 4), random.randint(23, 31), random.randint(5, 8)
        tokens = 3 * rows + random.randint(1, rows - 1)  # the last piece is shorter
        labels = torch.randint(vocabulary, (tokens,))
        labels[: rows - 1] = -100  # one piece has fewer labels that count
        return normal(tokens, width), normal(vocabulary, width), labels, rows

    def oracle(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(leaf @ weight.T, labels)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def called(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        got = candidate(hidden, weight, labels, rows)
        need_several(
            got, 2, "the loss and the gradient of hidden", "Which two things does the cell's docstring name?", fix
        )
        return got[0], got[1]

    fix = "Sum F.cross_entropy(..., reduction='sum') / number over the pieces, with number = (labels != -100).sum()."

    def value() -> None:
        hidden, weight, labels, rows = inputs()
        loss, _ = oracle(hidden, weight, labels)
        counted = int((labels != -100).sum())
        each = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
        means = [
            part.sum() / (own != -100).sum() for part, own in zip(each.split(rows), labels.split(rows), strict=True)
        ]
        whole = len(labels) // rows * rows
        slips = {
            float(
                sum(means) / len(means)
            ): "a mean of the pieces' means weighs a piece with few labels like a full one",
            float(sum(means)): "the pieces' means are added up",
            float(loss) * counted: "this is the sum over the labels, not the mean",
            float(loss) * counted / len(labels): "you divide by all tokens, and labels of -100 do not count",
            float(each[:whole].sum() / counted): "the last piece, which is shorter, is missing",
        }
        got, _ = called(hidden.clone(), weight.clone(), labels.clone(), rows)
        if not (is_number(got) or is_tensor(got, ())):
            raise Wrong(f"the loss is {shape_or_type(got)}: expected one number", "Over what is the mean taken?", fix)
        case = f"for {len(labels)} tokens of which {counted} count, {rows} at a time,"
        require(float(got), float(loss), slips, case, "By which number, for all pieces alike, is the sum divided?", fix)

    def gradient() -> None:
        hidden, weight, labels, rows = inputs()
        _, right = oracle(hidden, weight, labels)
        counted = int((labels != -100).sum())
        _, got = called(hidden.clone(), weight.clone(), labels.clone(), rows)
        question = "Of which number is it the gradient: of the sum, of a piece's mean, or of the mean over all?"
        if not is_tensor(got, right.shape):
            symptom = f"the gradient is {shape_or_type(got)}, and hidden is {tuple(right.shape)}"
            raise Wrong(symptom, "Of what is it the gradient?", fix)
        if not close(got, right):
            slips = [
                (counted * right, "it is that of the sum; divide by the number of labels that count"),
                (right * counted / len(labels), "it is divided by all tokens, and labels of -100 do not count"),
                (-right, "it has the other sign"),
            ]
            note = known_slip(got, slips, close, "it is none of the usual slips")
            raise Wrong(f"the gradient is off by {off_by(got, right):.0%} of its size: {note}", question, fix)

    def pieces() -> None:
        hidden, weight, labels, rows = inputs()
        with Operations() as seen:
            called(hidden, weight, labels, rows)
        most = max((t.numel() for _, _, t in seen.seen if isinstance(t, Tensor) and len(weight) in t.shape), default=0)
        if most > max(rows * len(weight), weight.numel()):
            raise Wrong(
                f"you hold {most:,} numbers at once; the logits of {rows} tokens are {rows * len(weight):,}",
                "How many rows of hidden go into your product with the weight?",
                "Take hidden[start : start + rows] for start in range(0, len(hidden), rows).",
            )

    def unchanged() -> None:
        given = inputs()
        before = [tensor.clone() for tensor in given[:3]]
        called(*given)
        for name, old, new in zip(("hidden", "weight", "labels"), before, given[:3], strict=True):
            if not torch.equal(old, new):
                raise Wrong(f"your function writes into {name}, which it was given", "Which tensor is yours?", fix)

    steps = [
        ("the loss is that of all logits at once", value),
        ("so is its gradient", gradient),
        ("no more logits than those of one piece", pieces),
        ("what was given is left as it was", unchanged),
    ]
    return run_steps("loss in pieces", steps, hint)


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
    g, x, W, A, B = (normal(*shape) for shape in shapes)
    return Case(g, x, W, A, B, A @ x.T, random.uniform(1.3, 2.7))


def multiplications(operations: Operations) -> int:
    """How many multiplications the matrix products took."""
    products = [seen for seen in operations.seen if seen[0] in ("mm", "addmm", "addmm_", "bmm")]
    factors = [[arg for arg in args if isinstance(arg, Tensor)] for _, args, _ in products]
    return sum(result.numel() * each[-1].shape[-2] for each, (_, _, result) in zip(factors, products, strict=True))


def written(operations: Operations, rows: int, columns: int, known: tuple[Any, ...]) -> int:
    """How many matrices of this shape, or transposed, were written beside the known tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in known if isinstance(tensor, Tensor)}
    results = [result for _, _, result in operations.seen if isinstance(result, Tensor)]
    fitting = [result for result in results if tuple(result.shape) in ((rows, columns), (columns, rows))]
    return len({result.untyped_storage().data_ptr() for result in fitting} - own)


def called(candidate: Backward, case: Case, need_x: bool = True) -> tuple[Any, Tensor, Tensor]:
    """What the learner's function returns, if it is three things."""
    got = candidate(*case.arguments(), need_x)
    if not is_several(got, 3):
        raise Wrong(f"you return {type(got).__name__}: expected three gradients", "For which three tensors?", FIX)
    return got[0], got[1], got[2]


@without(
    *AUTOGRAD,
    symptom="you let autograd differentiate; this exercise is the backward pass itself",
    question="∂L/∂h = s · Bᵀ gᵀ. Which products lead from it to A and to x, and which from h to B?",
    fix=FIX,
)
def fused_backward(candidate: Backward, hint: int = 1) -> Report:
    """Exercise B1: ``candidate(g, x, W, A, B, h, s, need_x=True)`` returns the gradients of x, A and B."""

    def compare(name: str, got: Tensor | None, right: Tensor, slips: list[tuple[Tensor, str]], question: str) -> None:
        if not is_tensor(got, right.shape):
            symptom = f"the gradient of {name} is {shape_or_type(got)}, and {name} is {tuple(right.shape)}"
            turned = isinstance(got, Tensor) and is_transposed(got.shape, right.shape)
            raise Wrong(symptom + (": it is transposed" if turned else ""), question, FIX)
        if not close(got, right):
            note = known_slip(got, slips, close, "it is none of the usual slips")
            raise Wrong(f"the gradient of {name} is off by {off_by(got, right):.0%} of its size: {note}", question, FIX)

    def of_A() -> None:
        case = draw()
        right = case.s * case.up @ case.x
        slips = scale_slips(right, case.s)
        compare("A", called(candidate, case)[1], right, slips, "∂L/∂A = s · (Bᵀ gᵀ) x: where does s come in, once?")

    def of_B() -> None:
        case = draw()
        right = case.s * case.g.T @ case.h.T
        slips = scale_slips(right, case.s)
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
        with Operations() as seen:
            gx, _, _ = called(candidate, case, need_x=False)
        (tokens, inputs), outputs, r = case.x.shape, len(case.W), len(case.A)
        question = "Who asks for the gradient of the first layer's input?"
        if gx is not None:
            raise Wrong("with need_x=False you return a gradient for x: expected None", question, FIX)
        if multiplications(seen) >= tokens * inputs * outputs + tokens * r * (inputs + 2 * outputs):
            raise Wrong("with need_x=False you still compute the large product g @ W", question, FIX)

    def moved() -> None:
        case = draw()
        with Operations() as seen:
            called(candidate, case)
        (tokens, inputs), outputs, r = case.x.shape, len(case.W), len(case.A)
        enough = tokens * inputs * outputs + tokens * r * (2 * inputs + 2 * outputs)
        if (taken := multiplications(seen)) > enough:
            raise Wrong(
                f"your products take {taken:,} multiplications; {enough:,} are enough",
                "Do you compute h again, or B A as a whole?",
                FIX,
            )
        if written(seen, tokens, outputs, case.arguments()):
            raise Wrong(
                f"you write a tensor of g's size, {tokens} × {outputs}: that is traffic which a smaller one spares",
                "Which tensor with r numbers a token could take the scale s?",
                FIX,
            )
        if (number := written(seen, tokens, inputs, case.arguments())) > 1:
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


def expected_ratio(candidate: Callable[[Work, Work, float, float], float], hint: int = 1) -> Report:
    """Exercise C1: ``candidate(before, after, ceiling, bandwidth)`` is the predicted time after / before."""

    def compare(before: Work, after: Work) -> None:
        def time(work: Work, mode: str = "each") -> float:
            arithmetic, traffic = [o / CEILING for o, _ in work], [b / BANDWIDTH for _, b in work]
            if mode == "each":
                return sum(map(max, arithmetic, traffic))
            both = {"operations": [sum(arithmetic)], "bytes": [sum(traffic)], "whole": [sum(arithmetic), sum(traffic)]}
            return sum(arithmetic) + sum(traffic) if mode == "sum" else max(both[mode])

        right = time(after) / time(before)
        slips = {
            time(after, "whole") / time(before, "whole"): "you take the larger of two sums; each operation has a bound "
            "of its own, and one waits for bytes while another computes",
            time(after, "operations") / time(before, "operations"): "the bytes are missing",
            time(after, "bytes") / time(before, "bytes"): "the operations are missing",
            time(after, "sum") / time(before, "sum"): "you add arithmetic and traffic; the longer one counts",
            1 / right: "this is before over after",
            1 - right: "this is the share of the time that is saved",
            time(after): "this is the time after, not the ratio",
            time(before) - time(after): "this is the time that is saved, in seconds",
        }
        require(
            candidate(before, after, CEILING, BANDWIDTH),
            right,
            slips,
            f"for {len(before)} operations before and {len(after)} after",
            "Which of its two times does each single operation take?",
            "Sum max(operations / ceiling, size / bandwidth) over the operations of each list; divide after by before.",
        )

    def work(number: int) -> Work:
        """Operations bound by arithmetic and by bytes in turns."""
        return [
            (random.uniform(2e8, 9e8), random.uniform(1e6, 9e6))
            if index % 2 == 0
            else (random.uniform(1e6, 9e6), random.uniform(2e7, 9e7))
            for index in range(number)
        ]

    def less() -> None:
        before = work(5)
        # In sum the bytes take a fifth longer before, and less after: no mistake then looks like another.
        longer = 1.2 * sum(o / CEILING for o, _ in before) / sum(b / BANDWIDTH for _, b in before)
        before = [(o, longer * b) for o, b in before]
        compare(before, [(o, 0.6 * b) for o, b in before])

    def fewer() -> None:
        before = work(6)
        compare(before, before[:-1])

    steps = [("the same operations, fewer bytes", less), ("one operation less", fewer)]
    return run_steps("the expected ratio", steps, hint)
