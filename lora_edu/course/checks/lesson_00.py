"""Checks of lesson 00: a softmax that does not overflow (A1) and the masked cross-entropy (B1)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_edu.course.checks import tools
from lora_edu.course.checks.candidates import without
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import between, normal
from lora_edu.lab.datasets import IGNORED

READY_MADE = ("softmax", "log_softmax", "cross_entropy", "nll_loss")
close = partial(tools.close, rtol=1e-5)  # an answer in float32 is right, too


def draw(*shape: int) -> Tensor:
    """Random logits, spread enough that no two formulas agree by accident."""
    return 2 * normal(*shape)


def mean_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The oracle of B1: PyTorch's own cross-entropy over the labels other than −100."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def need_tensor(value: Any, shape: tuple[int, ...], what: str) -> Tensor:
    """The learner's value, if it is a tensor of that shape."""
    if not isinstance(value, Tensor):
        raise Wrong(
            f"{what} is a {type(value).__name__}, expected a tensor",
            "What does your function return? A function without return gives None.",
            "Return the tensor itself, without .item() or float().",
        )
    if tuple(value.shape) != shape:
        raise Wrong(
            f"{what} has shape {tuple(value.shape)}, expected {shape}",
            "Over which dimensions do you sum, and what is left?",
            "Print the shape of every intermediate result.",
        )
    return value


@without(
    *READY_MADE,
    symptom="you call {name}; this exercise wants the formula itself",
    question="Which formula stands in question 6 of the lesson?",
    fix="Divide exponentials by their sum over the row: torch.exp and .sum(dim=-1, keepdim=True).",
)
def softmax_by_hand(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise A1 of lesson 00: ``candidate(logits)`` is the softmax of each row, for logits of any size."""

    def asked(logits: Tensor) -> Tensor:
        return need_tensor(candidate(logits.clone()), tuple(logits.shape), "your result")

    def shape() -> None:
        p = asked(draw(between(2, 4), between(5, 8)))
        if (p < 0).any():
            question = "What makes every logit positive before you divide?"
            raise Wrong("some of your probabilities are negative", question, "Divide exponentials: torch.exp(logits).")

    def rows() -> None:
        p = asked(draw(between(2, 4), between(5, 8)))
        if close(p.sum(dim=-1), torch.ones(len(p))):
            return
        if close(p.sum(), torch.ones(())):
            where = "all rows together sum to 1"
        elif close(p.sum(dim=0), torch.ones(p.shape[1])):
            where = "the columns sum to 1, not the rows"
        else:
            where = f"the first row sums to {p[0].sum().item():.3f}"
        raise Wrong(where, "Which dimension are the classes?", "Sum over the last one: .sum(dim=-1, keepdim=True).")

    def square() -> None:
        n = between(4, 6)
        logits = draw(n, n)
        p = asked(logits)
        if not close(p, torch.softmax(logits, dim=-1)) and close(p, torch.exp(logits) / torch.exp(logits).sum(dim=-1)):
            raise Wrong(
                f"for logits of shape ({n}, {n}) each number is divided by the sum of another row",
                "A sum of shape (rows,) meets a matrix (rows, classes): which dimension does it line up with?",
                "Keep the summed dimension: .sum(dim=-1, keepdim=True) has shape (rows, 1).",
            )
        compare(p, logits)

    def large() -> None:
        # The largest logit lies far above the mean and the median of its row, so that subtracting these is no help.
        for top in (1000.0, 9000.0):
            for dtype in (torch.float64, torch.float32):
                logits = torch.tensor([[top, top - 1, 0, 0, 0], [0, 2, 0, top, top - 2]], dtype=dtype)
                p = asked(logits)
                if not p.isfinite().all():
                    raise Wrong(
                        f"for the logits ({top:.0f}, {top - 1:.0f}, 0, 0, 0) your probabilities are not numbers",
                        "exp(1000) is too large for any float. What may you add to all logits of a row for free, and "
                        "how much must it be for the largest of them?",
                        "Subtract the largest logit first: logits - logits.max(dim=-1, keepdim=True).values.",
                    )
                compare(p, logits, 1e-5 if dtype is torch.float64 else 2e-3)  # exp turns rounding of 9000 into a share

    def far_apart() -> None:
        logits = draw(3, 5) + torch.tensor([[1000.0], [0.0], [-1000.0]], dtype=torch.float64)
        p = asked(logits)
        if not p.isfinite().all():
            raise Wrong(
                "with one row of logits near 1000 and another near −1000, one row is not a number",
                "Is the number that you subtract the largest of its own row, or of the whole matrix?",
                "Take the largest of each row: logits.max(dim=-1, keepdim=True).values.",
            )
        compare(p, logits)

    def compare(p: Tensor, logits: Tensor, tolerance: float = 1e-5) -> None:
        right = torch.softmax(logits, dim=-1)
        if not close(p, right, rtol=tolerance):
            raise Wrong(
                f"your result differs from torch.softmax by up to {(p - right).abs().max().item():.2g}",
                "Which formula stands in question 6 of the lesson?",
                "exp(z) of each logit, divided by the sum of exp(z) over its row.",
            )

    steps = [
        ("as many probabilities as logits, none below 0", shape),
        ("each row sums to 1", rows),
        ("equal to torch.softmax, also for a square matrix", square),
        ("no overflow for large logits", large),
        ("no overflow when rows lie far apart", far_apart),
    ]
    return run_steps("Softmax", steps, hint)


@without(
    *READY_MADE,
    symptom="you call {name}; this exercise wants the loss without it",
    question="What is −ln p of one token, written with the logits of its row?",
    fix="−ln p = torch.logsumexp(z, dim=-1) minus the logit of the right token.",
)
def masked_cross_entropy(candidate: Callable[..., Any], hint: int = 1) -> Report:
    """Exercise B1 of lesson 00: ``candidate(logits, labels)`` is the mean loss over labels other than −100."""

    def batch(masked: bool = True) -> tuple[Tensor, Tensor]:
        """Logits (3, length, vocabulary) and labels; the rows keep different numbers of labels."""
        length, vocabulary = between(8, 12), between(15, 30)
        logits, labels = draw(3, length, vocabulary), torch.randint(vocabulary, (3, length))
        if masked:
            for row, given in enumerate((1, length // 2, length - 1)):
                labels[row, :given] = IGNORED
        return logits, labels

    def asked(logits: Tensor, labels: Tensor, **options: int) -> Tensor:
        return need_tensor(candidate(logits.clone(), labels.clone(), **options), (), "your loss")

    def plain() -> None:
        logits, labels = batch(masked=False)
        loss, right = asked(logits, labels), mean_of_losses(logits, labels)
        if close(loss, right):
            return
        name = f"your loss is {loss.item():.3f}, PyTorch's is {right.item():.3f}"
        if close(loss, -right):
            raise Wrong(
                f"{name}: the sign is wrong",
                "Is ln p of a probability above or below 0?",
                "The loss is −ln p: logsumexp minus the logit of the right token.",
            )
        if close(loss, right * labels.numel()):
            raise Wrong(f"{name}: {labels.numel()} times as much", "How many labels are there?", "Take the mean.")
        if close(loss, right / torch.log(torch.tensor(2.0, dtype=torch.float64))):
            raise Wrong(f"{name}: yours is in bits", "Which logarithm gives nats?", "torch.log, or logsumexp.")
        raise Wrong(
            name,
            "Which number do you take from each row of logits, and what do you subtract from it?",
            "−ln p = logsumexp(z) − z[right token], both over the last dimension.",
        )

    def ignores() -> None:
        logits, labels = batch()
        loss, right = asked(logits, labels), mean_of_losses(logits, labels)
        if close(loss, right):
            return
        kept = labels != IGNORED
        name = f"with {int((~kept).sum())} of {labels.numel()} labels at −100 your loss is {loss:.3f}, not {right:.3f}"
        if close(loss, right * kept.sum() / labels.numel()):
            raise Wrong(
                f"{name}: you divide by all labels",
                "How many tokens count?",
                "Divide by the number of labels that are not −100.",
            )
        rows = torch.stack([mean_of_losses(z[None], y[None]) for z, y in zip(logits, labels, strict=True)])
        if close(loss, rows.mean()):
            raise Wrong(
                f"{name}: you average each row first, so that a token in a short row weighs more",
                "How much does each token that counts weigh in the mean?",
                "Put the tokens of all rows together before the mean: logits[labels != ignored].",
            )
        for stand_in in (0, IGNORED % logits.shape[-1]):
            if close(loss, mean_of_losses(logits, labels.where(kept, stand_in))):
                raise Wrong(
                    f"{name}: the masked places count as if their right token were number {stand_in}",
                    "What happens to a label of −100 before it is used as an index?",
                    "Select first: counts = labels != ignored, then logits[counts] and labels[counts].",
                )
        raise Wrong(name, "Which tokens should count?", "Only those whose label is not −100: labels != ignored.")

    def other_mark() -> None:
        logits, labels = batch()
        other = labels.where(labels != IGNORED, -1)
        loss, right = asked(logits, other, ignored=-1), mean_of_losses(logits, labels)
        if not close(loss, right):
            raise Wrong(
                f"with ignored=-1 your loss is {loss.item():.3f}, not {right.item():.3f}",
                "Which value marks what does not count, and where does it come from?",
                "Compare with the argument: labels != ignored, not labels != -100.",
            )

    def large() -> None:
        logits, labels = batch()
        loss, right = asked(1000 * logits, labels), mean_of_losses(1000 * logits, labels)
        if not close(loss, right):
            raise Wrong(
                f"for logits in the thousands your loss is {loss.item():.4g}, not {right.item():.4g}",
                "What is exp(1000), and what is ln 0?",
                "Let torch.logsumexp take the logarithm of the sum; it subtracts the largest logit itself.",
            )

    def untouched() -> None:
        logits, labels = batch()
        before = logits.clone(), labels.clone()
        candidate(logits, labels)
        if not (torch.equal(logits, before[0]) and torch.equal(labels, before[1])):
            changed = "labels" if torch.equal(logits, before[0]) else "logits"
            raise Wrong(
                f"your function changes the {changed} that it is given",
                "Which of your lines writes into its input?",
                "Make a copy before you write into it, e.g. with .clone() or .where(...).",
            )

    def gradients() -> None:
        logits, labels = batch()
        logits.requires_grad_()
        loss = need_tensor(candidate(logits, labels), (), "your loss")
        if not loss.requires_grad:
            raise Wrong(
                "no gradient flows from your loss to the logits",
                "Which of your lines leaves PyTorch's record: .item(), .detach(), torch.tensor(...)?",
                "Compute with tensors from the first line to the last.",
            )
        (yours,) = torch.autograd.grad(loss, logits)
        (right,) = torch.autograd.grad(mean_of_losses(logits, labels), logits)
        if not tools.close_in_norm(yours, right, 1e-5):
            raise Wrong(
                "the loss is right, its gradient is not",
                "Is a part of the formula computed without gradients?",
                "Both logsumexp(z) and z[right token] must keep theirs.",
            )

    steps = [
        ("right when every label counts", plain),
        ("labels of −100 do not count", ignores),
        ("the mark is the argument ignored", other_mark),
        ("no overflow for large logits", large),
        ("leaves logits and labels as they are", untouched),
        ("the gradient is PyTorch's", gradients),
    ]
    return run_steps("Masked cross-entropy", steps, hint)
