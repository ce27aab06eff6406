"""What tests of the graders share: the solutions' own calls, and whether a check names the mistake where it should."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from lora_edu.course import checks
from lora_edu.course.notebooks.stored import SOLUTIONS, list_notebooks, read


def calls() -> list:
    """(notebook, check, names of the learner's objects) for each cell tagged "check"."""
    found = []
    for path in list_notebooks(SOLUTIONS):
        for cell in read(path).cells:
            if "check" in cell.metadata.get("tags", []):
                check, objects = re.search(r"checks\.(\w+)\(([\w, ]+)\)", cell.source).groups()
                found.append(pytest.param(path.stem, check, re.split(r",\s*", objects), id=f"{path.stem[:2]} {check}"))
    return found


def drawn_seeds() -> list[str]:
    """Three seeds, of which the one that ``conftest.py`` sets is the first."""
    first = int(os.environ["LORA_EDU_CHECK_SEED"])
    return [str(first + more) for more in range(3)]


def assert_found(report: checks.Report, step: str, words: str) -> None:
    """The check failed at ``step``, and symptom, question or fix has the words; a bar stands for "or" in both."""
    assert report.status == "failed", report.text
    assert any(part in report.step for part in step.split("|")), report.text
    assert report.symptom, report.text
    assert report.question, report.text
    assert report.fix, report.text
    said = f"{report.symptom} {report.question} {report.fix}"
    assert any(part in said for part in words.split("|")), report.text


def each_is_found(
    check: Callable[..., checks.Report],
    mistakes: Mapping[str, tuple],
    step: str | None = None,
    words: str | None = None,
) -> Callable[[str], None]:
    """A test, with one case a mistake: with three draws, the check stops at the wrong answer each time and names it.

    Args:
        check: from ``lora_edu.course.checks``.
        mistakes: {name: (answer, step, words)}; a check of two objects has two answers in the row.
        step: where all of them are found; the rows then leave it out.
        words: what is said about all of them; the rows then leave it out.
    """

    @pytest.mark.parametrize("mistake", mistakes)
    def test(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = list(mistakes[mistake])
        said = answers.pop() if words is None else words
        where = answers.pop() if step is None else step
        for seed in drawn_seeds():
            monkeypatch.setenv("LORA_EDU_CHECK_SEED", seed)
            assert_found(check(*answers), where, said)

    return test


def each_passes(check: Callable[..., checks.Report], answers: Mapping[str, Any]) -> Callable[[str], None]:
    """A test, with one case a right answer written in another way: it passes, with three draws.

    Args:
        check: from ``lora_edu.course.checks``.
        answers: {name: answer}; a check of two objects has a tuple of two answers.
    """

    @pytest.mark.parametrize("right", answers)
    def test(right: str, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = answers[right]
        for seed in drawn_seeds():
            monkeypatch.setenv("LORA_EDU_CHECK_SEED", seed)
            report = check(*answer) if isinstance(answer, tuple) else check(answer)
            assert report.status == "passed", report.text

    return test


def by_class(mistakes: Mapping[type, tuple[str, str]]) -> dict[str, tuple[type, str, str]]:
    """{class: (step, words)} as :func:`each_is_found` wants it: wrong answers that are classes are their own names."""
    return {wrong.__name__: (wrong, *found) for wrong, found in mistakes.items()}


def assert_random_state_kept(check: Callable[[Any], checks.Report], answer: Any) -> None:
    """The answer passes, and afterwards Python's and PyTorch's generators go on as if it had not been checked."""

    def seed_all() -> None:
        torch.manual_seed(5)
        random.seed(5)

    seed_all()
    expected = torch.rand(3), random.random()
    seed_all()
    report = check(answer)
    assert report.status == "passed", report.text
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
