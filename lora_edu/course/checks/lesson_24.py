"""The checks of lesson 24: a bound (A1), intensity (A2), a backward pass (B1), bytes sent (B2), a ratio (C1)."""

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
    normal,
    off_by,
    scale_slips,
    shape_or_type,
)

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


def bound_seconds(candidate: Callable[[float, float, float, float], float], hint: int = 1) -> Report:
    """Exercise A1: ``candidate(operations, size, ceiling, bandwidth)`` is the least time of one operation."""

    def compare(by_bytes: bool) -> None:
        ceiling, bandwidth = random.uniform(50e9, 90e9), random.uniform(5e9, 20e9)
        operations = random.uniform(1e8, 9e8)
        size = operations / ceiling * bandwidth * (random.uniform(2, 5) if by_bytes else random.uniform(0.2, 0.5))
        arithmetic, traffic = operations / ceiling, size / bandwidth
        slips = {
            arithmetic + traffic: "this is the sum of the two times; arithmetic and traffic can overlap",
            arithmetic: "this is the shorter of the two times, that of the arithmetic; the bytes take longer",
            traffic: "this is the shorter of the two times, that of the bytes; the arithmetic takes longer",
            max(operations / bandwidth, size / ceiling): "operations belong to the ceiling, bytes to the bandwidth",
            min(ceiling / operations, bandwidth / size): "this is how often it could run in a second, not how long",
        }
        require(
            candidate(operations, size, ceiling, bandwidth),
            max(arithmetic, traffic),
            slips,
            f"with {operations:.2e} operations, {size:.2e} bytes, a ceiling of {ceiling:.2e} and a bandwidth of "
            f"{bandwidth:.2e} a second",
            "How long would the arithmetic take if bytes were free, and the bytes if arithmetic were?",
            "Return max(operations / ceiling, size / bandwidth).",
        )

    steps = [
        ("an operation that the arithmetic bounds", lambda: compare(False)),
        ("an operation that the bytes bound", lambda: compare(True)),
    ]
    return run_steps("the roofline's bound", steps, hint)


def intensity(candidate: Callable[[int, int, int, int], float], hint: int = 1) -> Report:
    """Exercise A2: ``candidate(tokens, inputs, outputs, width)`` is the operations per byte of x Wᵀ."""

    def compare(width: int, thin: bool) -> None:
        tokens, inputs = random.randint(200, 900), random.randint(100, 400)
        outputs = random.randint(2, 16) if thin else inputs + random.randint(50, 200)
        pairs, x, w, y = tokens * inputs * outputs, tokens * inputs, inputs * outputs, tokens * outputs
        right = 2 * pairs / (width * (x + w + y))
        slips = {
            right / 2: "a multiplication and an addition are two operations",
            right * width / 4: "a number does not always have 4 bytes: use width",
            right * width: "you count numbers, and each has width bytes",
            2 * pairs / (width * (x + w)): "the result is written, too",
            2 * pairs / (width * (x + y)): "the weight is read, too",
            2 * pairs / (width * (w + y)): "the input is read, too",
            2 * pairs / (width * (x + w + 2 * y)): "the result is written once; nothing reads it here",
            1 / right: "these are bytes per operation",
        }
        require(
            candidate(tokens, inputs, outputs, width),
            right,
            slips,
            f"for {tokens} tokens, {inputs} → {outputs}, {width} bytes a number",
            "Which three matrices pass between memory and arithmetic, and how many numbers has each?",
            "Divide 2 * tokens * inputs * outputs by width * (tokens * inputs + inputs * outputs + tokens * outputs).",
        )

    steps = [
        ("a wide product in float32", lambda: compare(4, False)),
        ("a thin product in float64", lambda: compare(8, True)),
    ]
    return run_steps("operations per byte", steps, hint)


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


def bytes_sent(candidate: Callable[..., float], hint: int = 1) -> Report:
    """Exercise B2: ``candidate(frozen, trained, processes, width=2, sharded=False)``, each process's bytes a step."""
    rule = (
        "With part = width * (processes - 1) / processes: DDP sends 2 * part * trained, "
        "FSDP 2 * part * (frozen + trained) + part * trained."
    )

    def compare(frozen: int, trained: int, processes: int, width: int, sharded: bool) -> None:
        part = width * (processes - 1) / processes
        ddp = 2 * part * trained
        fsdp = 2 * part * (frozen + trained) + part * trained
        right = fsdp if sharded else ddp
        slips = {
            right * processes: "this is what all processes send together, not each",
            right / width: "you count numbers, and each has width bytes",
            right * processes / max(1, processes - 1): "its own part a process need not send: (P − 1)/P of it travels",
        }
        if sharded:
            slips |= {
                fsdp - part * (frozen + trained): "you gather once; the backward pass gathers again",
                fsdp - 2 * part * trained: "the adapters are sharded and gathered, too",
                2 * part * (frozen + trained): "the gradients of what trains are missing",
                fsdp + part * trained: "after the sum each process keeps its own part: nothing is spread",
                3 * part * (frozen + trained): "frozen weights have no gradients to sum",
                ddp: "with sharded=True the weights travel, too",
            }
        else:
            slips |= {
                2 * part * (frozen + trained): "frozen weights have no gradients to average",
                part * trained: "an average is a sum and then a spreading: it travels twice",
                fsdp: "without shards no weight travels",
            }
        require(
            candidate(frozen, trained, processes, width, sharded),
            right,
            slips,
            f"with frozen={frozen:,}, trained={trained:,}, processes={processes}, width={width}, sharded={sharded}",
            "What does each process lack, before the forward pass, before the backward pass, before the update?",
            rule,
        )

    def drawn(sharded: bool) -> None:
        sizes = random.randint(50_000, 90_000), random.randint(1000, 9000)
        compare(*sizes, random.randint(3, 9), random.choice([4, 8]), sharded)

    def alone() -> None:
        for sharded in (False, True):
            compare(random.randint(50_000, 90_000), random.randint(1000, 9000), 1, 4, sharded)

    def defaults() -> None:
        got, part = candidate(6_738_415_616, 39_976_960, 8), 2 * 7 / 8
        require(
            got,
            2 * part * 39_976_960,
            {},
            "for LLaMA-7B, r = 16 on all linear layers, 8 processes, width and sharded left out",
            "Which width and which way does the task name as defaults?",
            "Give the function's last two arguments the defaults width=2, sharded=False.",
        )

    steps = [
        ("DDP sends the gradients of what trains", lambda: drawn(False)),
        ("FSDP gathers the weights twice", lambda: drawn(True)),
        ("one process sends nothing", alone),
        ("LLaMA-7B on 8 GPUs", defaults),
    ]
    return run_steps("bytes between GPUs", steps, hint)


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
