"""``lora-edu check``: what the checks say about one notebook, one's own or a stranger's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_edu.course.grading import isolation
from lora_edu.course.grading.classroom import missing
from lora_edu.course.grading.client import Verdict
from lora_edu.course.grading.recognise import recognise
from lora_edu.course.grading.runner import Runner
from lora_edu.course.grading.submissions import Check, checks_of, code_cells, line_up
from lora_edu.course.grading.texts import plain
from lora_edu.course.grading.watch import Limits
from lora_edu.course.notebooks.stored import EXERCISES, LESSONS, NotebookError
from lora_edu.course.notebooks.work import WORK

LIMITS = Limits(seconds=600, memory=64 * 1024**3, file_bytes=4 * 1024**3)  # of one's own notebooks
LONGEST = 1000  # characters of a line


@dataclass(frozen=True)
class Result:
    """What one check says: the task and its title, the status, what is wrong, the hints that the notebook asks for."""

    title: str
    status: str
    words: str
    hints: list[str]


@dataclass(frozen=True)
class Checked:
    """One notebook: what its checks say, and one line for each thing that went wrong in its other cells.

    ``why_none`` says why there is no check to call, where there is none.
    """

    results: list[Result]
    troubles: list[str]
    why_none: str = ""


def check_notebook(path: Path, say: Callable[[str], None] = print, require_isolation: bool = False) -> Checked:
    """Run an exercise notebook, going on after errors. The file is not changed.

    A notebook in ``work/``, or of the course itself, runs where it lies and sees the environment as it is. Any other
    runs as ``lora-edu grade`` runs it.

    Args:
        path: the notebook.
        say: prints the one line about isolation, where there is none.
        require_isolation: refuse to run somebody else's notebook without.

    Raises:
        NotebookError: if it is none.
        RuntimeError: if isolation is required and cannot be had.
    """
    cells = code_cells(path)
    own = is_own(path)
    try:
        exercise, why_none = EXERCISES / f"{recognise(path, EXERCISES)}.ipynb", ""
    except NotebookError as error:
        exercise, why_none = path, f"{error}; the exercises lie in {EXERCISES}"
    checks = line_up(checks_of(exercise), cells)
    if not checks:
        return Checked([], [], why_none)
    isolated = not own and isolation.decide(say, require_isolation)
    with Runner(isolated=isolated, own=own, hidden=[path.parent]) as runner:
        if own:
            outcome = runner.run(cells, checks, LIMITS, folder=path.parent)
        else:
            outcome = runner.run(cells, checks, Limits(), files=path.parent)
    results = [_result(check, outcome.verdicts.get(check.label) or missing(outcome)) for check in checks]
    troubles = outcome.troubles if outcome.ended == "ended" else [*outcome.troubles, outcome.words]
    return Checked(results, [plain(line, LONGEST) for line in troubles])


def _result(check: Check, verdict: Verdict) -> Result:
    words = "" if verdict.status in ("passed", "not done") else plain(verdict.symptom, LONGEST)
    hints = [plain(text, LONGEST) for text in (verdict.question, verdict.fix)[: check.hint - 1] if text]
    letter, _, name = check.label.rpartition(" ")
    return Result(f"{letter} {plain(verdict.title) or name}".strip(), verdict.status, words, hints)


def is_own(path: Path) -> bool:
    """Whether a notebook is the learner's own copy, or the course's."""
    path = path.resolve()
    return path.is_relative_to(WORK.resolve()) or path.is_relative_to(LESSONS)
