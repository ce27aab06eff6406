"""``lora-edu grade``: every notebook of a class through the runner, and a row for each exercise of what came out."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from lora_edu.course.grading.client import Outcome, Verdict
from lora_edu.course.grading.handed_in import Submission
from lora_edu.course.grading.runner import Runner
from lora_edu.course.grading.submissions import checks_of, code_cells, line_up, reaching
from lora_edu.course.grading.texts import plain
from lora_edu.course.grading.watch import Limits
from lora_edu.course.notebooks.stored import EXERCISES, NotebookError


@dataclass(frozen=True)
class Row:
    """One exercise of one student.

    Attributes:
        student: as in the class's folder, or on the roster.
        notebook: the exercise notebook.
        exercise: the task's letter and the check, "B1 lora_layer".
        status: passed, failed, not done, error, timeout or memory.
        symptom: what is wrong, and what went wrong in the cells before.
        seconds: that it took.
        points: for the steps that are right, ``of`` so many.
        file: where the notebook lies in the class's folder, and the beginning of its SHA-256.
        seed: what the check drew from.
        verdict: all that the check said.
    """

    student: str
    notebook: str
    exercise: str
    status: str
    symptom: str = ""
    seconds: float = 0.0
    points: float = 0
    of: float = 0
    file: str = ""
    file_hash: str = ""
    seed: int = 0
    verdict: Verdict = field(default_factory=lambda: Verdict("error"))


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
    rows, file_hash = [], short_hash(one.path)
    for check in checks:
        verdict = outcome.verdicts.get(check.label, missing(outcome))
        words = [verdict.symptom, *verdict.notes, note if verdict.status == "passed" else ""]
        rows.append(
            Row(
                student=plain(one.student),
                notebook=one.exercise,
                exercise=check.label,
                status=verdict.status,
                symptom=plain("; ".join(filter(None, words))),
                seconds=verdict.seconds,
                points=verdict.points(check.worth),
                of=check.worth,
                file=one.place,
                file_hash=file_hash,
                seed=runner.seed,
                verdict=verdict,
            )
        )
    return rows


def short_hash(path: Path | None) -> str:
    """The beginning of a file's SHA-256, "sha256:3fa29c0d12ab"; nothing if it is no file that can be read.

    The name before it keeps spreadsheets from reading a hash like 12e45 as a number.
    """
    if path is None or path.is_symlink() or not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"
    except OSError:
        return ""


def missing(outcome: Outcome) -> Verdict:
    """What is said of a check that gave no report: how the submission ended."""
    return (
        Verdict("error", "the check did not report")
        if outcome.ended == "ended"
        else Verdict(outcome.ended, outcome.words)
    )


def by_notebook(rows: Iterable[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """The rows grouped by student and notebook, in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.student, row.notebook), []).append(row)
    for (student, notebook), group in groups.items():
        yield student, notebook, group


def score(statuses: Iterable[str], words: str = "passed") -> str:
    """How many exercises pass, of how many: what ``check``, ``grade`` and ``progress`` all say."""
    statuses = list(statuses)
    reason = "" if statuses else ", because nothing here has a check"
    return f"{statuses.count('passed')} of {len(statuses)} {words}{reason}"
