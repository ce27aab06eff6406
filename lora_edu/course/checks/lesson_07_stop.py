"""Check of lesson 07: early stopping (B2)."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.course.checks.report import Report, Step, Wrong, run_steps
from lora_edu.lab.recording.records import read_record

NAN = float("nan")


def lowest(losses: Sequence[float]) -> int:
    """The number of the first lowest loss; NaN is never lowest."""
    return min(range(len(losses)), key=lambda i: (losses[i] != losses[i], losses[i]))


def stop_of(losses: Sequence[float], patience: int) -> int | None:
    """The number of the evaluation after which to stop, or None."""
    return next((i for i in range(len(losses)) if i - lowest(losses[: i + 1]) >= patience), None)


def in_total(losses: Sequence[float], patience: int) -> int | None:
    """As :func:`stop_of`, but bad evaluations are never forgotten."""
    bad = [i for i in range(1, len(losses)) if not losses[i] < min(losses[:i])]
    return bad[patience - 1] if len(bad) >= patience else None


def against_previous(losses: Sequence[float], patience: int) -> int | None:
    """As :func:`stop_of`, but each loss is compared with the one before it."""
    since = 0
    for i in range(1, len(losses)):
        since = 0 if losses[i] < losses[i - 1] else since + 1
        if since >= patience:
            return i
    return None


def early_stopping(candidate: Callable[[list[Tensor], int], Any], hint: int = 1) -> Report:
    """Exercise B2: an object with ``see(loss) -> bool``, ``best`` and ``restore()``."""

    def run(losses: Sequence[float], patience: int) -> tuple[Any, list[nn.Parameter], list[list[Tensor]], int | None]:
        """Train until told to stop: (the object, the parameters, their values at each evaluation, where it stopped)."""
        parameters = [nn.Parameter(torch.randn(random.randint(2, 4), 3)), nn.Parameter(torch.randn(5))]
        stopper, values = candidate(list(parameters), patience), []
        for i, loss in enumerate(losses):
            values.append([p.detach().clone() for p in parameters])
            verdict = stopper.see(loss)
            if not isinstance(verdict, bool):
                raise Wrong(
                    f"see(…) returns {verdict!r}, expected True or False",
                    "What does the training loop ask? Does each way through see end in a return?",
                    "return self.since >= self.patience",
                )
            if verdict:
                return stopper, parameters, values, i
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(torch.randn_like(parameter))
        return stopper, parameters, values, None

    def ask(losses: list[float], patience: int, question: str, fix: str) -> None:
        got, right = run(losses, patience)[3], stop_of(losses, patience)
        if got == right:
            return
        notes: list[tuple[int | None, str]] = [
            (stop_of(losses, patience + 1), "one evaluation too late"),
            (stop_of(losses, patience - 1) if patience > 1 else -1, "one evaluation too early"),
            (in_total(losses, patience), "you count all evaluations without a new lowest loss, not those in a row"),
            (against_previous(losses, patience), "you compare with the evaluation before, not with the lowest so far"),
            (patience - 1, "no loss counts as the lowest; what does yours begin with?"),
            (stop_of(losses, 1), "you do not wait"),
        ]
        note = next((f": {words}" for at, words in notes if at == got), "")
        where = ["it never stops" if at is None else f"after evaluation {at}" for at in (got, right)]
        raise Wrong(f"losses {losses}, patience={patience}: {where[0]}, expected: {where[1]}{note}", question, fix)

    def rising() -> None:
        for patience in (random.choice([3, 4, 5]), 2, 1):
            falling = [round(5 - 0.3 * i, 1) for i in range(patience + random.randint(1, 3))]
            rise = [round(falling[-1] + 0.1 * i, 1) for i in range(1, 9)]
            ask(
                falling + rise, patience,
                "With patience=1, how many evaluations without a new lowest loss are enough?",
                "self.since counts evaluations since the lowest; return self.since >= self.patience.",
            )  # fmt: skip

    def forgiving() -> None:
        losses = [5.0, 4.5, 4.7, 4.6, 4.2, 4.4, 4.3, 4.1, 4.3, 3.9, 4.0, 4.1, 4.2, 4.3]
        ask(
            losses, 3,
            "A new lowest loss came: what should the counter be now?",
            "Set self.since = 0 with every new lowest loss.",
        )  # fmt: skip

    def against_the_lowest() -> None:
        question = "A loss falls for many evaluations without getting as low as it once was. Is that progress?"
        fix = "Keep the lowest loss in self.lowest, and compare with that."
        ask([5.0, 3.5, 4.6, 4.4, 4.2, 4.0, 3.9, 3.8, 3.7], random.choice([3, 4]), question, fix)
        ask(
            [140.0, 120.0, 130.0, 125.0, 128.0, 126.0],
            3,
            question,
            fix + " Before the first evaluation it is infinite.",
        )

    def ties() -> None:
        question = "Is a loss that only equals the lowest a new lowest? Is NaN one?"
        fix = "Improvement is loss < self.lowest and nothing else; NaN < x is False, but so is NaN >= x."
        ask([5.0, 4.0, 4.0, 4.0, 4.0, 4.0], random.choice([2, 3]), question, fix)
        ask([5.0, 4.0, NAN, NAN, NAN, NAN], random.choice([2, 3]), question, fix)

    def best() -> None:
        for losses in ([5.0, 4.1, 3.8, 4.0, 3.9, 4.2], [5.0, 4.6, 4.4, 4.4, 4.1], [4.0, 4.3, 4.4], [5.0, 4.0, NAN]):
            stopper, _, _, _ = run(losses, 9)
            if stopper.best != lowest(losses):
                raise Wrong(
                    f"losses {losses}: best is {stopper.best!r}, expected {lowest(losses)}",
                    "Evaluations are counted from 0. Which was the first to have the lowest loss?",
                    "When a new lowest loss comes, set self.best to the number of evaluations seen before it.",
                )

    def restores() -> None:
        for losses, patience in (([5.0, 4.2, 4.0, 4.3, 4.1, 4.4], 3), ([5.0, 4.5, 4.6, 4.1], 9)):
            stopper, parameters, values, _ = run(losses, patience)
            places = [(p, p.data_ptr()) for p in parameters]
            stopper.restore()
            right, seen = values[lowest(losses)], [p.detach() for p, _ in places]
            if any(p.data_ptr() != place for p, place in places):
                raise Wrong(
                    "after restore the parameters have other memory",
                    "Does assigning to .data write values?",
                    "Inside torch.no_grad(): parameter.copy_(kept).",
                )
            if not all(p.requires_grad for p, _ in places):
                raise Wrong("after restore a parameter is frozen", "Who asked for that?", "torch.no_grad() is enough.")
            if all(map(torch.equal, seen, right)):
                continue
            notes = [f"those of evaluation {i}" for i, v in enumerate(values) if all(map(torch.equal, seen, v))]
            raise Wrong(
                f"losses {losses}: after restore the weights are {notes[0] if notes else 'those of no evaluation'}, "
                f"expected those of evaluation {lowest(losses)}",
                "When did you keep them? Is what you kept a copy, or a second name for tensors that train on?",
                "With each new lowest loss, keep [p.detach().clone() for p in parameters]; restore copies them back.",
            )

    def replay() -> None:
        question, fix = "Does your object rely on anything but the losses it has seen?", "Print loss and counter."
        for _ in range(40):
            losses = [round(random.uniform(3, 5), 1) for _ in range(random.randint(3, 25))]
            ask(losses, random.randint(1, 5), question, fix)
        for line in read_record("smollm2_finetuning")["runs"]:
            ask(line["curves"]["validation"], random.randint(1, 3), question, fix)

    steps: list[Step] = [
        ("stops when patience is used up", rising),
        ("a new lowest loss starts the count again", forgiving),
        ("each loss is compared with the lowest so far", against_the_lowest),
        ("a tie is no improvement, and NaN is none", ties),
        ("best is the evaluation with the lowest loss", best),
        ("the best weights come back, in place", restores),
        ("drawn and recorded curves", replay),
    ]
    return run_steps("early stopping", steps, hint)
