"""``lora-edu grade``: every notebook of a class through the runner, and one table of what came out."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lora_edu.course.grading.client import Outcome, Verdict
from lora_edu.course.grading.runner import Runner
from lora_edu.course.grading.submissions import Submission, checks_of, code_cells, collect, line_up, reaching
from lora_edu.course.grading.watch import Limits
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


def grade_class(
    submissions: Iterable[Submission],
    runner: Runner,
    limits: Limits,
    done: Callable[[list[Row]], None],
    exercises: Path = EXERCISES,
) -> list[Row]:
    """Grade every notebook that was handed in; whatever one of them does, the others are graded.

    Args:
        submissions: see ``handed_in``.
        runner: runs them, as many at once as it has jobs.
        limits: what each notebook may take.
        done: called with the rows of each when it is graded.
        exercises: the course's exercise notebooks.
    """
    rows: dict[Submission, list[Row]] = {}
    pool = ThreadPoolExecutor(runner.jobs)
    try:
        running = {pool.submit(grade_one, one, runner, limits, exercises): one for one in submissions}
        for future in as_completed(running):
            rows[running[future]] = future.result()
            done(future.result())
    finally:  # after Ctrl-C nothing waits: the runner ends, and its notebooks with it
        pool.shutdown(wait=False, cancel_futures=True)
    return [row for one in running.values() for row in rows[one]]


def handed_in(folder: Path, exercises: Path = EXERCISES) -> tuple[list[Submission], list[tuple[Path, str]]]:
    """What ``submissions.collect`` finds, which must be something.

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
    return submissions, left


def grade_one(one: Submission, runner: Runner, limits: Limits, exercises: Path = EXERCISES) -> list[Row]:
    """The rows of one submission: one for each check of its exercise notebook, whatever the submission is or does."""
    exercise = exercises / f"{one.exercise}.ipynb"
    checks = checks_of(exercise)
    note = ""
    try:
        cells = code_cells(one.path)
        outcome = runner.run(cells, line_up(checks, cells), limits, one.files)
        if reached := reaching(cells, exercise):
            note = f"read this notebook: it names {', '.join(reached)[:80]}"
    except Exception as error:  # whatever a file holds, it is this row's matter and no other's
        outcome = Outcome(words=str(error) if isinstance(error, OSError | NotebookError) else repr(error))
    rows = []
    for check in checks:
        verdict = outcome.verdicts.get(check.label, missing(outcome))
        words = [verdict.symptom, *verdict.notes, note if verdict.status == "passed" else ""]
        symptom = plain("; ".join(filter(None, words)))
        rows.append(Row(plain(one.student), one.exercise, check.label, verdict.status, symptom, verdict.seconds))
    return rows


def missing(outcome: Outcome) -> Verdict:
    """What is said of a check that gave no report: how the submission ended."""
    return (
        Verdict("error", "the check did not report")
        if outcome.ended == "ended"
        else Verdict(outcome.ended, outcome.words)
    )


def plain(text: str, longest: int = LONGEST) -> str:
    """One line of printable characters: a symptom may quote what a student wrote."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


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
