"""Which cells of an exercise notebook nbgrader grades, for how many points, and which are the learner's to write.

nbgrader reads this from the cells' metadata. Here it follows from what the solutions notebook says in any case (its
tags, the headings of its tasks, its rubrics), so that it is written down nowhere else. The exercises that we generate
and those that nbgrader makes itself carry the same metadata, so that either can be handed in.
"""

import re
from typing import Any

from nbformat import NotebookNode

from lora_edu.course.notebooks.stored import NotebookError

# About one point for each five minutes of work; in tier C most of the time goes into the written answer.
POINTS = {"A": 1, "B": 4, "C": 3}
SENTENCE = 1  # a written answer without a rubric
ROW = 2  # a written answer with one: for each of its rows 0, 1 or 2, level by level
TASK = re.compile(r"^### ([A-C])(\d+)\b", re.M)
CHECK = re.compile(r"\bchecks\.(\w+)\(")
RUBRIC = re.compile(r"^\| +\| not yet \| good \|[^\n]*\n\|[-| :]+\n((?:\|[^\n]*(?:\n|$))+)", re.M)


def mark_cells(notebook: NotebookNode, name: str = "") -> None:
    """Write nbgrader's metadata into the cells of a solutions notebook, in place.

    A code cell tagged ``check`` is an autograded test, a code cell tagged ``solution`` is the learner's to write, and a
    Markdown cell tagged ``solution`` is written by the learner and graded by a person.

    Args:
        notebook: the solutions notebook, its tags still there.
        name: its file name, for messages.

    Raises:
        NotebookError: if such a cell stands before the first task, or a check's cell does not call exactly one check.
    """
    tasks = _tasks(notebook)
    known: dict[str, int] = {}
    for index, (cell, task) in enumerate(zip(notebook.cells, tasks, strict=True)):
        cell.metadata.pop("nbgrader", None)
        tags = cell.metadata.get("tags", [])
        if "check" not in tags and "solution" not in tags:
            continue
        where = f"solutions/{name}, cell {index}"
        if not task:
            raise NotebookError(f"{where}: the cell belongs to no task, whose heading begins with '### A1', B1, C1 …")
        if "check" in tags:
            called = CHECK.findall(cell.source)
            if len(called) != 1:
                raise NotebookError(
                    f"{where}: {len(called)} checks are called; expected one, which has the cell's points"
                )
            mark = _mark(f"{task}_{called[0]}", POINTS[task[0]])
        elif cell.cell_type == "code":
            mark = _mark(f"{task}_solution", solution=True)
        else:
            mark = _mark(f"{task}_answer", _points_of_answer(notebook, tasks, task), solution=True)
        known[mark["grade_id"]] = times = known.get(mark["grade_id"], 0) + 1
        if times > 1:
            mark["grade_id"] += f"_{times}"
        cell.metadata["nbgrader"] = NotebookNode(mark)


def _tasks(notebook: NotebookNode) -> list[str]:
    """The task that each cell belongs to, "A1", by the last heading; nothing before the first."""
    tasks, task = [], ""
    for cell in notebook.cells:
        heading = TASK.search(cell.source) if cell.cell_type == "markdown" else None
        task = heading[1] + heading[2] if heading else task
        tasks.append(task)
    return tasks


def _points_of_answer(notebook: NotebookNode, tasks: list[str], task: str) -> int:
    """The points of a task's written answer: by its rubric, which stands somewhere in the task's text."""
    text = "\n\n".join(cell.source for cell, own in zip(notebook.cells, tasks, strict=True) if own == task)
    rubric = RUBRIC.search(text)
    return ROW * len(rubric[1].strip().split("\n")) if rubric else SENTENCE


def _mark(grade_id: str, points: int | None = None, solution: bool = False) -> dict[str, Any]:
    """nbgrader's metadata of a cell, in the third version of its schema; graded if it has points."""
    mark = {"grade_id": grade_id, "grade": points is not None, "solution": solution, "schema_version": 3}
    mark["locked"] = points is not None and not solution  # nbgrader puts the checks back as they were
    return mark if points is None else {**mark, "points": points}
