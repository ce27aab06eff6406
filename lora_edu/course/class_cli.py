"""``lora-edu handout``, ``grade`` and ``progress``: the tools for a class, and for a learner alone."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_edu.course.console import console, fail, friendly

if TYPE_CHECKING:
    from lora_edu.course.grading.classroom import Row
    from lora_edu.course.grading.feedback import Feedback
    from lora_edu.course.grading.gradebook import Gradebook
    from lora_edu.course.grading.handed_in import HandedIn
    from lora_edu.course.grading.runner import Runner
    from lora_edu.course.grading.watch import Limits

STYLES = {
    "passed": "green",
    "failed": "red",
    "not done": "default",
    "error": "red",
    "timeout": "yellow",
    "memory": "yellow",
}
MARKS = {"passed": "✓", "failed": "✗", "not done": "○"}


@friendly
def handout(
    lessons: Annotated[
        list[str] | None, typer.Argument(help="Numbers, names or ranges: 03 05_counting_parameters 00-05; default all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The zip; by default build/lora-edu-handout.zip.")
    ] = None,
    library: Annotated[
        bool, typer.Option("--library", help="Add what is needed to install and run it: lora_edu/, data/, book/.")
    ] = False,
    nbgrader: Annotated[
        Path | None,
        typer.Option("--nbgrader", metavar="COURSE", help="Make no zip, but lay out this folder for nbgrader."),
    ] = None,
) -> None:
    """Make a zip of lessons (outputs cleared) and their exercises to give to a class. It holds no solution.

    Inside are also a page that says how to set up, work and hand in, and the licences. With --library the zip is all
    that a class needs; the library's checks then are in it too, and they know the right answers.

    With --nbgrader COURSE it is for you: COURSE/source holds the exercises with their solutions, from which
    nbgrader generate_assignment makes what you give to the class. Files that are there already stay as they are.
    """
    if nbgrader:
        if output or library:
            fail("--nbgrader lays out a folder; -o and --library belong to the zip, which is made without --nbgrader")
        return _lay_out(nbgrader, lessons or [])
    from lora_edu.course.notebooks.stored import BUILD
    from lora_edu.course.publish.handout import chosen, contents, write_zip

    output = output or BUILD / "lora-edu-handout.zip"
    files = contents(chosen(lessons or []), library=library)
    write_zip(files, output)
    notebooks = [name for name in files if name.endswith(".ipynb")]
    exercises = sum("exercises/" in name for name in notebooks)
    size = output.stat().st_size / 1e6
    console.print(
        f"wrote {output}: {len(notebooks) - exercises} lessons, {exercises} exercises, {size:.1f} MB", markup=False
    )


def _lay_out(course: Path, lessons: list[str]) -> None:
    from lora_edu.course.publish.handout import chosen
    from lora_edu.course.publish.nbgrader import lay_out

    paths = chosen(lessons)
    written, left = lay_out(course, paths)
    assignments = sum(name.startswith("source/") for name in written)
    console.print(f"wrote {assignments} of {len(paths)} assignments to {course / 'source'}", markup=False)
    for name in left:
        console.print(f"{course / name} is there already and differs: it stays as it is", markup=False)
    console.print(f"Next, in {course}: nbgrader generate_assignment {paths[0].stem}", markup=False)
    console.print('The page "Teaching with it" in the book says what that needs, and how it goes on.')


@friendly
def grade(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder or zip with what students handed in.")],
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write a table of exercises here, and beside it one of students."),
    ] = None,
    roster: Annotated[
        Path | None, typer.Option("--roster", metavar="FILE", help="Who takes part: a CSV file with a column student.")
    ] = None,
    feedback: Annotated[
        Path | None,
        typer.Option("--feedback", metavar="FOLDER", help="Write a page for each student in here."),
    ] = None,
    time: Annotated[float, typer.Option("--time", min=1, help="Seconds that one notebook may take.")] = 180,
    memory: Annotated[float, typer.Option("--memory", min=0.1, help="GiB that one notebook may take.")] = 4,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="How many notebooks run at once.")] = os.cpu_count() or 1,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="What the checks draw from, to have a result again.")
    ] = None,
    require_isolation: Annotated[
        bool, typer.Option("--require-isolation", help="Run nothing where bubblewrap is missing or does not work.")
    ] = False,
) -> None:
    """Grade the notebooks of a class: run each by itself, and the course's own checks on what it defines.

    Handed-in notebooks lie either in a folder for each student, DIR/STUDENT/03_lora_layer.ipynb (folders and zips
    inside are fine), or flat, with two underscores after the student, DIR/STUDENT__03_lora_layer.ipynb. A notebook is
    recognised by its cells, also under another name, and of several versions the newest is graded. Files beside a
    notebook in a student's folder are there when it runs. Whatever is not graded is listed with the reason.

    FILE gets a row for each exercise. The table beside it, with -students in its name, has a row for each student, and
    for everybody on the roster. When the same command runs again, what you wrote into them stays.

    A status is passed, failed, not done, error (the code crashed), timeout or memory. On Linux with bubblewrap (bwrap)
    each notebook is isolated. The checks run in the student's own process, so a result can be forged: good for feedback
    and homework. The page "Teaching with it" in the book says more.
    """
    import tempfile

    from lora_edu.course.grading import isolation
    from lora_edu.course.grading.feedback import Feedback
    from lora_edu.course.grading.gradebook import Gradebook, course_version, table_of_students
    from lora_edu.course.grading.handed_in import RULE, handed_in
    from lora_edu.course.grading.roster import read_roster
    from lora_edu.course.grading.runner import Runner
    from lora_edu.course.grading.watch import Limits
    from lora_edu.files import locked

    names = read_roster(roster) if roster else []
    tables = [csv, table_of_students(csv)] if csv else []
    with contextlib.ExitStack() as stack:
        unpacked = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-edu-")))
        skipped = [path for path in (*tables, roster, feedback) if path]
        found = handed_in(folder, unpacked, names, skipped=skipped)
        isolated = isolation.decide(lambda line: console.print(line, markup=False), require_isolation)
        hidden = [unpacked, *([folder] if folder.is_dir() else [])]
        runner = stack.enter_context(Runner(jobs, isolated, hidden=hidden, seed=seed))
        books: list[Gradebook | Feedback] = []
        if csv:
            stack.enter_context(locked(csv))
            books.append(Gradebook(csv, found, names, runner.seed))
        if feedback:
            books.append(Feedback(feedback, found, names, course_version()))
        rows = _grade_all(found, books, runner, Limits(seconds=time, memory=int(memory * 1024**3)))
    _print_table(rows)
    _print_the_others(found, names)
    console.print(f"seed {runner.seed} (with --seed the checks draw the same again)", markup=False)
    if csv:
        console.print(f"wrote {tables[1]} (a row for each student) and {csv} (a row for each exercise)", markup=False)
    if feedback:
        console.print(f"wrote a page for each student: {feedback}/STUDENT/feedback.html", markup=False)
    if not found.submissions:
        fail(f"{folder} holds no notebook that is recognised; expected {RULE}")


@friendly
def progress(
    folder: Annotated[Path | None, typer.Argument(help="Your folder of lessons; by default work/.")] = None,
) -> None:
    """Say which of your exercises pass, which do not yet, and what is next. Your files are not changed.

    Notebooks that changed since the last time are run; the others are remembered.
    """
    from lora_edu.course.grading.classroom import score
    from lora_edu.course.grading.progress import following, standings
    from lora_edu.course.notebooks.work import WORK

    found = standings(folder or WORK, say=lambda line: console.print(line, markup=False))
    for one in found:
        marks = "  ".join(f"{MARKS.get(status, '✗')} {label.split()[0]}" for label, status in one.exercises)
        passed = sum(status == "passed" for _, status in one.exercises)
        reason = marks or "there is no exercise notebook of this lesson here"
        console.print(f"{one.name:32} {passed} of {len(one.exercises)}   {reason}", markup=False)
    statuses = [status for one in found for _, status in one.exercises]
    console.print(score(statuses, "checked exercises pass"), markup=False)
    after = following(found)
    if after is None:
        console.print("Nothing is left to do here.")
    else:
        one, label = after
        place, name = f"exercises/{one.name}.ipynb", one.name[:2]
        if folder:  # the number would mean the notebook in work/
            place, name = str(one.path), shlex.quote(str(one.path))
        console.print(f"Next: {label.split()[0]} in {place} (lora-edu check {name} says more)", markup=False)


def _grade_all(
    found: "HandedIn", books: Sequence["Gradebook | Feedback"], runner: "Runner", limits: "Limits"
) -> list["Row"]:
    """Grade every notebook, each into all books at once. After Ctrl-C one line says what there is."""
    from lora_edu.course.grading.classroom import grade_class, score

    graded = 0
    with _bar() as advance:

        def done(rows: list["Row"]) -> None:
            nonlocal graded
            for book in books:
                book.add(rows)
            graded += 1
            passed = score(row.status for row in rows)
            advance(f"{rows[0].student}, {rows[0].notebook}: {passed}", len(found.submissions))

        try:
            return grade_class(found.submissions, runner, limits, done)
        except KeyboardInterrupt:
            kept = "; what came out is written, and stays until the same command has graded it again" if books else ""
            fail(f"stopped: {graded} of {len(found.submissions)} notebooks are graded{kept}", code=130)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int], None]]:
    """A bar over all notebooks of the class in a terminal; one line for each in a log."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not sys.stdout.isatty():
        yield lambda line, total: console.print(line, markup=False)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("the class", total=None)
        yield lambda line, total: bar.update(task, advance=1, total=total, description=line[:60])


def _print_the_others(found: "HandedIn", roster: list[str]) -> None:
    """What is not graded, and who is missing."""
    from lora_edu.course.grading.texts import plain

    for one in found.left:
        console.print(f"not graded: {plain(one.place)} ({plain(one.reason)})", markup=False)
    seen = {one.student for one in found.submissions} | {one.student for one in found.left}
    missing = sorted({*found.students, *roster} - seen)
    unknown = sorted(set(found.students) - set(roster)) if roster else []
    for words, names in (("nothing was handed in", missing), ("not on the roster", unknown)):
        if names:
            console.print(f"{words}: {', '.join(names)}", markup=False)


def _print_table(rows: list["Row"]) -> None:
    from rich.table import Table
    from rich.text import Text

    from lora_edu.course.grading.classroom import by_notebook

    table = Table("student", "notebook", "passed", "what is open, and why", show_lines=True)
    for student, notebook, group in by_notebook(rows):
        words = Text()
        for row in group:
            if row.status != "passed" or row.symptom:
                words.append("\n" if words else "")
                words.append(f"{row.exercise.split()[0]} {row.status}", style=STYLES[row.status])
                words.append(f": {row.symptom}" if row.symptom else "")
        passed = sum(row.status == "passed" for row in group)
        table.add_row(Text(student), Text(notebook), f"{passed} of {len(group)}", words)
    console.print(table)
