"""``lora-edu grade``: every notebook of a class through the sandbox, and one table of what came out."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lora_edu.course.grading.sandbox import Limits, Outcome, Sandbox
from lora_edu.course.grading.submissions import Submission, checks_of, code_cells, collect, line_up, reaching
from lora_edu.course.notebooks.stored import EXERCISES, NotebookError
from lora_edu.files import ROOT, write_atomically

LONGEST = 200  # characters of a symptom in the table


@dataclass(frozen=True)
class Row:
    """One exercise of one student. ``status`` is passed, failed, not done, error, timeout or memory."""

    student: str
    notebook: str
    exercise: str
    status: str
    symptom: str
    seconds: float


@dataclass(frozen=True)
class Class:
    """What grading a class gave: the rows, the notebooks left out with the reason, and why there was no jail, if so."""

    rows: list[Row]
    left: list[tuple[Path, str]]
    weakness: str


def grade_class(
    folder: Path,
    limits: Limits,
    jobs: int,
    done: Callable[[Submission, list[Row], int], None],
    exercises: Path = EXERCISES,
    protection: str = "jail",
) -> Class:
    """Grade every recognised notebook in a folder; whatever one of them does, the others are graded.

    Args:
        folder: see ``submissions.collect``.
        limits: what each notebook may take.
        jobs: how many run at once.
        done: called after each with the submission, its rows and how many there are in all.
        exercises: the course's exercise notebooks.
        protection: see ``sandbox.Sandbox``.

    Raises:
        NotebookError: if nothing was handed in there, or the folder holds the course itself.
    """
    folder = folder.resolve()
    if ROOT.is_relative_to(folder):
        raise NotebookError(f"{folder} holds the course itself: put the submissions into a folder of their own")
    submissions, left = collect(folder, exercises)
    if not submissions:
        reasons = f" ({left[0][0]}: {left[0][1]})" if left else ""
        raise NotebookError(f"{folder} holds no notebook that is recognised{reasons}")
    rows: dict[Submission, list[Row]] = {}
    with Sandbox([folder], protection) as sandbox:
        pool = ThreadPoolExecutor(jobs)
        try:
            running = {pool.submit(grade_one, one, sandbox, limits, exercises): one for one in submissions}
            for future in as_completed(running):
                one = running[future]
                rows[one] = future.result()
                done(one, rows[one], len(submissions))
        finally:  # after Ctrl-C nothing waits: the sandbox ends, and its submissions with it
            pool.shutdown(wait=False, cancel_futures=True)
    return Class([row for one in submissions for row in rows[one]], left, sandbox.weakness)


def grade_one(one: Submission, sandbox: Sandbox, limits: Limits, exercises: Path = EXERCISES) -> list[Row]:
    """The rows of one submission: one for each check of its exercise notebook, whatever the submission is or does."""
    exercise = exercises / f"{one.exercise}.ipynb"
    checks = checks_of(exercise)
    note = ""
    try:
        cells = code_cells(one.path)
        outcome = sandbox.run(cells, line_up(checks, cells), limits, one.files)
        if reached := reaching(cells, exercise):
            note = f"read this notebook: it names {', '.join(reached)[:80]}"
    except Exception as error:  # whatever a file holds, it is this row's matter and no other's
        outcome = Outcome(words=str(error) if isinstance(error, OSError | NotebookError) else repr(error))
    rows = []
    for check in checks:
        status, symptom, seconds = outcome.reports.get(check.label, missing(outcome))
        if note and status == "passed":
            symptom = f"{symptom}; {note}" if symptom else note
        rows.append(Row(plain(one.student), one.exercise, check.label, status, plain(symptom), seconds))
    return rows


def missing(outcome: Outcome) -> tuple[str, str, float]:
    """What is said of a check that gave no report: how the submission ended."""
    if outcome.ended == "ended":
        return "error", "the check did not report", 0.0
    return outcome.ended, outcome.words, 0.0


def plain(text: str) -> str:
    """One line of printable characters: a symptom may quote what a student wrote."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write the table whole or not at all. A text that a spreadsheet would take for a formula gets an apostrophe."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([field.name for field in fields(Row)])
    table.writerows([[_harmless(value) for value in astuple(row)] for row in rows])
    write_atomically(path, text.getvalue().encode())


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def by_notebook(rows: Iterable[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """The rows grouped by student and notebook, in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.student, row.notebook), []).append(row)
    for (student, notebook), group in groups.items():
        yield student, notebook, group
