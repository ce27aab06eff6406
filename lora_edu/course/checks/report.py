"""How a check of an exercise talks to the learner: step by step, in sentences, with help in three sizes.

A check is a function that takes the learner's object, tries it in small named steps, and returns a ``Report``. A step
raises ``Wrong`` with a symptom, a question and the fix; ``run_steps`` prints as much of it as ``hint`` asks for.
Every check in ``lora_edu.course.checks`` is written on top of this module.
"""

import os
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lora_edu.course.checks import autograding

Step = tuple[str, Callable[[], None]]
LIBRARY = Path(__file__).resolve().parents[2]
_given_seed: ContextVar[int | None] = ContextVar("seed", default=None)


class Wrong(Exception):
    """A step found a mistake. The three texts are shown for hint=1, 2 and 3.

    Args:
        symptom: what is wrong, with the numbers seen, e.g. "with r=4 and lora_alpha=8 your update is 4.0 × too large".
        question: the question that leads the learner to the cause.
        fix: what to write instead.
    """

    def __init__(self, symptom: str, question: str, fix: str):
        super().__init__(symptom)
        self.symptom, self.question, self.fix = symptom, question, fix


@dataclass
class Report:
    """What a check found. True in an ``if`` when everything is right.

    ``status`` is "passed", "failed" or "not done". ``passed`` lists the steps that were right; ``step`` is the one
    that stopped the check, and ``symptom``, ``question``, ``fix`` say why. ``text`` is what was printed.
    """

    title: str
    status: Literal["passed", "failed", "not done"] = "passed"
    passed: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    step: str = ""
    symptom: str = ""
    question: str = ""
    fix: str = ""
    text: str = ""

    def __bool__(self) -> bool:
        return self.status == "passed"

    def __repr__(self) -> str:
        return f"<{self.title}: {self.status}>"

    def _ipython_display_(self) -> None:
        """Show nothing when a cell ends with a check: its sentences have been printed already."""


def run_steps(title: str, steps: Sequence[Step], hint: int = 1) -> Report:
    """Try the steps in order, print what was found, and stop at the first mistake.

    The learner's random state is left as it was. Inside, the generators of Python, NumPy and PyTorch start from a
    fresh seed each time, or from the environment's ``LORA_EDU_CHECK_SEED``, so that nobody passes by a lucky draw.

    Args:
        title: what is checked, e.g. "LoRA layer".
        steps: pairs of a sentence that is true when the step is right, and a function that raises ``Wrong`` if not.
        hint: how much help a mistake gets: 1 the symptom, 2 also a question, 3 also the fix.

    Raises:
        ValueError: if hint is not 1, 2 or 3, or if there is no step.
    """
    if hint not in (1, 2, 3):
        raise ValueError(f"hint={hint!r}: expected 1 (the symptom), 2 (a question) or 3 (the fix)")
    if not steps:
        raise ValueError(f"the check {title!r} has no steps")
    report = Report(title)
    with _forked_randomness():
        for index, (name, step) in enumerate(steps):
            try:
                step()
            except NotImplementedError:
                report.status, report.step = "not done", name
            except Wrong as wrong:
                report.status, report.step = "failed", name
                report.symptom, report.question, report.fix = wrong.symptom, wrong.question, wrong.fix
            except Exception as error:
                report.status, report.step = "failed", name
                report.symptom, report.question, report.fix = _explain(error)
            if report.status != "passed":
                report.waiting = [later for later, _ in steps[index + 1 :]]
                break
            report.passed.append(name)
    report.text = "\n".join(_lines(report, hint))
    print(report.text)
    if autograding.is_on():
        autograding.settle(title, len(report.passed), len(steps), report.symptom or "not done yet")
    return report


def _lines(report: Report, hint: int) -> Iterator[str]:
    yield from (f"✓ {name}" for name in report.passed)
    if report.status == "not done":
        yield f"○ {report.step}: not done yet" if report.passed else "○ not done yet"
    if report.status == "failed":
        yield f"✗ {report.symptom}"
        if hint >= 2:
            yield f"  {report.question}"
        if hint >= 3:
            yield f"  {report.fix}"
        else:
            yield ("  (hint=2 asks a question that leads on)", "  (hint=3 gives the fix)")[hint - 1]
        yield from (f"○ {name}: checked once the point above is right" for name in report.waiting)


def _explain(error: Exception) -> tuple[str, str, str]:
    """Symptom, question and fix for an exception that the learner's own code raised."""
    text = str(error).strip().split("\n")[0]
    symptom = f"your code raised {type(error).__name__}" + (f": {text}" if text else "")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(LIBRARY) and "site-packages" not in frame.filename
    ]
    if not frames:
        return symptom, "Does your object take the arguments that the task names?", "Compare its signature to the task."
    place = f"line {frames[-1].lineno} of your {frames[-1].name}" + (f": {frames[-1].line}" if frames[-1].line else "")
    return symptom, f"It happened in {place}", "Run that line alone, and print the shapes and types that enter it."


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Checks in this ``with`` draw from this seed, which a grader keeps in its table, whatever the environment says."""
    token = _given_seed.set(seed)
    try:
        yield
    finally:
        _given_seed.reset(token)


@contextmanager
def _forked_randomness() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    seed, fixed = _given_seed.get(), os.environ.get("LORA_EDU_CHECK_SEED")
    if seed is None:
        seed = int(fixed) if fixed else random.SystemRandom().randrange(2**32)
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it would also reseed a GPU
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
