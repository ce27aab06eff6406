"""``lora-edu handout``, ``grade`` and ``progress``: the tools for a class, and for a learner alone."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_edu.course.console import console, fail, friendly

if TYPE_CHECKING:
    from lora_edu.course.grading.classroom import Row

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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder with what the students handed in.")],
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the table with all symptoms to this file.")] = None,
    time: Annotated[float, typer.Option("--time", min=1, help="Seconds that one notebook may take.")] = 180,
    memory: Annotated[float, typer.Option("--memory", min=0.1, help="GiB that one notebook may take.")] = 4,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="How many notebooks run at once.")] = os.cpu_count() or 1,
    require_isolation: Annotated[
        bool, typer.Option("--require-isolation", help="Run nothing where bubblewrap is missing or does not work.")
    ] = False,
) -> None:
    """Grade the notebooks of a class: run each by itself, and the course's own checks on what it defines.

    Handed-in notebooks keep the name of their exercise and lie either in a folder for each student,
    DIR/STUDENT/03_lora_layer.ipynb (folders inside are fine), or flat, with two underscores after the student,
    DIR/STUDENT__03_lora_layer.ipynb. Files beside a notebook in a student's folder are there when it runs. Every other
    notebook is listed as not recognised.

    A status is passed, failed, not done, error (the code crashed), timeout or memory. On Linux with bubblewrap (bwrap)
    each notebook is isolated. The checks run in the student's own process, so a result can be forged: good for feedback
    and homework. The page "Teaching with it" in the book says more.
    """
    from lora_edu.course.grading import isolation
    from lora_edu.course.grading.classroom import grade_class, handed_in, plain, write_csv
    from lora_edu.course.grading.runner import Runner
    from lora_edu.course.grading.watch import Limits

    submissions, left = handed_in(folder)
    limits = Limits(seconds=time, memory=int(memory * 1024**3))
    isolated = isolation.decide(lambda line: console.print(line, markup=False), require_isolation)
    with _bar() as advance, Runner(jobs, isolated, hidden=[folder]) as runner:
        rows = grade_class(submissions, runner, limits, lambda done: advance(_line(done), len(submissions)))
    _print_table(rows)
    for path, reason in left:
        console.print(f"not recognised: {plain(path.as_posix())} ({plain(reason)})", markup=False)
    if csv:
        write_csv(rows, csv)
        console.print(f"wrote {csv}", markup=False)


@friendly
def progress(
    folder: Annotated[Path | None, typer.Argument(help="Your folder of lessons; by default work/.")] = None,
) -> None:
    """Say which of your exercises pass, which do not yet, and what is next. Your files are not changed.

    Notebooks that changed since the last time are run; the others are remembered.
    """
    from lora_edu.course.grading.progress import following, standings
    from lora_edu.course.notebooks.work import WORK

    found = standings(folder or WORK, say=lambda name: console.print(f"running {name} …", markup=False))
    for one in found:
        marks = "  ".join(f"{MARKS.get(status, '✗')} {label.split()[0]}" for label, status in one.exercises)
        console.print(f"{one.name:32} {one.passed} of {len(one.exercises)}   {marks}", markup=False)
    total = sum(len(one.exercises) for one in found)
    console.print(f"{sum(one.passed for one in found)} of {total} checked exercises pass")
    after = following(found)
    if after is None:
        console.print("Nothing is left to do here.")
    else:
        console.print(
            f"Next: {after[1].split()[0]} in exercises/{after[0]}.ipynb (lora-edu check {after[0][:2]} says more)"
        )


def _line(rows: list["Row"]) -> str:
    passed = sum(row.status == "passed" for row in rows)
    return f"{rows[0].student}, {rows[0].notebook}: {passed} of {len(rows)} passed" if rows else "nothing to check"


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
