"""A page for each student: what is right, what is not yet, what waits. It opens in any browser.

It holds nothing of anybody else, and no solution: of what a check says, the symptom and the question that leads on.
"""

import html
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_edu.course.grading.classroom import Row, by_notebook, score
from lora_edu.course.grading.handed_in import HandedIn, Left
from lora_edu.course.grading.submissions import written_tasks
from lora_edu.course.grading.texts import file_name, plain, rounded
from lora_edu.course.notebooks.stored import EXERCISES
from lora_edu.files import write_atomically

LONGEST = 1000
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Feedback for {student}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}
ul {{ list-style: none; padding-left: 1rem }}
</style>
<h1>Feedback for {student}</h1>
<p>This is what the checks of the course found. A point with ✓ is right, one with ✗ is not right yet, and one with ○ is
checked once the point above it is right.</p>
{body}
"""
OPENINGS = {
    "passed": "All of it is right.",
    "not done": "This is not done yet: the code still raises NotImplementedError.",
    "timeout": "There was no answer in time.",
    "memory": "It asked for more memory than there was.",
    "error": "The check could not finish.",
}


class Feedback:
    """The pages. Making one writes those of whom nothing is graded; the others follow when all of theirs is.

    Args:
        folder: gets STUDENT/feedback.html, where STUDENT is named as in the class's folder: so Moodle takes it back.
        found: what the class handed in.
        roster: everybody who takes part, if that is known.
        version: the course's.
    """

    def __init__(self, folder: Path, found: HandedIn, roster: list[str], version: str):
        self.found, self.version = found, version
        self.rows: dict[str, list[Row]] = {}
        self.waiting = {plain(one.student): 0 for one in found.submissions}
        for one in found.submissions:
            self.waiting[plain(one.student)] += 1
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # can it be written?
            self.paths: dict[str, Path] = {}
        taken: set[str] = set()
        for student in sorted({*found.students, *roster}):
            name = file_name(found.students.get(student, student))
            while name.casefold() in taken:
                name += "-2"
            taken.add(name.casefold())
            self.paths[student] = folder / name / "feedback.html"
            if student not in self.waiting:
                self._write(student)

    def add(self, rows: list[Row]) -> None:
        """Take the rows of one notebook, and write its student's page if it was the last one."""
        student = rows[0].student
        self.rows.setdefault(student, []).extend(rows)
        self.waiting[student] -= 1
        if not self.waiting[student]:
            self._write(student)

    def _write(self, student: str) -> None:
        left = [one for one in self.found.left if one.student == student]
        rows = sorted(self.rows.get(student, []), key=lambda row: row.notebook)
        body = "\n".join(_body(rows, left, self.version))
        page = PAGE.format(student=_text(student), body=body)
        write_atomically(self.paths[student], page.encode())


def _body(rows: list[Row], left: list[Left], version: str) -> Iterator[str]:
    if not rows and not left:
        yield "<p>Nothing was handed in under this name.</p>"
    for _, notebook, group in by_notebook(rows):
        yield f"<h2>{_text(notebook)}</h2>"
        points = f"{rounded(sum(row.points for row in group))} of {rounded(sum(row.of for row in group))} points"
        yield f"<p>{_text(score(row.status for row in group))}; {points}. This is {_text(group[0].file)}.</p>"
        for row in group:
            yield from _exercise(row)
        for task in written_tasks(EXERCISES / f"{notebook}.ipynb"):
            yield f"<h3>{_text(task)}</h3>\n<p>This task has no check. A person reads it.</p>"
    if left:
        yield "<h2>Not graded</h2>\n<ul>"
        yield from (f"<li>{_text(one.place)}: {_text(one.reason)}</li>" for one in left)
        yield "</ul>"
    if rows:
        yield f"<p><small>Checked with lora-edu {_text(version)}, seed {rows[0].seed}.</small></p>"


def _exercise(row: Row) -> Iterator[str]:
    said = row.verdict
    letter, _, name = row.exercise.partition(" ")
    yield f"<h3>{_text(f'{letter} {said.title or name}')}: {_text(row.status)}, {row.points} of {row.of} points</h3>"
    steps = len(said.right) + 1 + len(said.waiting)
    yield f"<p>{OPENINGS.get(row.status) or f'{len(said.right)} of its {steps} steps are right.'}</p>\n<ul>"
    yield from (f"<li>✓ {_text(name)}</li>" for name in said.right)
    if row.status != "passed" and said.symptom:
        yield f"<li>✗ {_text(said.symptom)}</li>"
        if row.status == "failed" and said.question:
            yield f"<li>&nbsp;&nbsp; {_text(said.question)}</li>"
    yield from (f"<li>○ {_text(name)}</li>" for name in said.waiting)
    yield from (f"<li>Before this check, {_text(note)}</li>" for note in said.notes)
    yield "</ul>"


def _text(text: str) -> str:
    return html.escape(plain(text, LONGEST))
