"""Exercises are generated from solutions: cut what the learner is to write, keep everything else.

A code cell tagged ``solution`` loses what stands between its two markers; a markdown cell tagged ``solution`` loses
its text. ``lessons/exercises/`` is never edited by hand, and a test proves that it is current.
"""

from pathlib import Path

from nbformat import NotebookNode

from lora_edu.course.notebooks.gradable import mark_cells
from lora_edu.course.notebooks.stored import (
    EXERCISES,
    SOLUTIONS,
    NotebookError,
    clear_outputs,
    dumps,
    list_notebooks,
    normalise,
    read,
    write,
)

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = 'raise NotImplementedError("your code here")'
ANSWER = "*Write your answer here.*"


def cut_solution(source: str, where: str = "") -> str:
    """Replace each marked region of a code cell by a line that raises NotImplementedError, at the same indentation.

    Raises:
        NotebookError: if a marker has no partner, there is none, or the code outside a function would raise.
    """
    lines: list[str] = []
    inside, regions = False, 0
    for line in source.split("\n"):
        mark = line.strip()
        if mark == BEGIN:
            if inside:
                raise NotebookError(f"{where}: {BEGIN!r} twice without {END!r} between them")
            indent = line[: len(line) - len(line.lstrip())]
            if not indent:
                raise NotebookError(f"{where}: {BEGIN!r} stands outside a function, so that the exercise would not run")
            inside, regions = True, regions + 1
            lines.append(indent + STUB)
        elif mark == END:
            if not inside:
                raise NotebookError(f"{where}: {END!r} without {BEGIN!r} before it")
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise NotebookError(f"{where}: {BEGIN!r} without {END!r} after it")
    if not regions:
        raise NotebookError(f"{where}: the cell is tagged 'solution' and has no {BEGIN!r}")
    return "\n".join(lines)


def source_from(solution: NotebookNode, name: str = "") -> NotebookNode:
    """What nbgrader calls the source of an assignment: the exercise notebook with nothing cut yet.

    That is a copy of the solutions notebook under the exercise's title, with nbgrader's metadata for its tags.
    """
    cells = [NotebookNode(cell, metadata=NotebookNode(cell.metadata)) for cell in solution.cells]
    source = NotebookNode(cells=cells, metadata=dict(solution.metadata), nbformat=4)
    mark_cells(source, name)
    for cell in source.cells:
        tags = [tag for tag in cell.metadata.pop("tags", []) if tag != "solution"]
        if tags:
            cell.metadata.tags = tags
    title = source.cells[0]
    title.source = "\n".join(
        line.replace("Solutions", "Exercises") if line.startswith("# ") else line for line in title.source.split("\n")
    )
    return normalise(clear_outputs(source))


def exercise_from(solution: NotebookNode, name: str = "") -> NotebookNode:
    """The exercise notebook of a solutions notebook (which is left as it was)."""
    exercise = source_from(solution, name)
    for index, cell in enumerate(exercise.cells):
        if cell.metadata.get("nbgrader", {}).get("solution"):
            where = f"solutions/{name}, cell {index}"
            cell.source = cut_solution(cell.source, where) if cell.cell_type == "code" else ANSWER
    return normalise(exercise)


def outdated(solutions: Path = SOLUTIONS, exercises: Path = EXERCISES) -> list[str]:
    """What differs between the exercises on disk and those that the solutions give: one line each, none if current."""
    wrong = []
    sources = list_notebooks(solutions)
    for source in sources:
        target = exercises / source.name
        if not target.exists():
            wrong.append(f"exercises/{source.name} is missing")
        elif target.read_text(encoding="utf-8") != dumps(exercise_from(read(source), source.name)):
            wrong.append(f"exercises/{source.name} is not what solutions/{source.name} gives")
    names = {source.name for source in sources}
    wrong += [f"exercises/{path.name} has no solution" for path in list_notebooks(exercises) if path.name not in names]
    return wrong


def generate(source: Path, exercises: Path = EXERCISES) -> bool:
    """Write the exercise of one solutions notebook; False if it was current already."""
    target = exercises / source.name
    exercise = exercise_from(read(source), source.name)
    if target.exists() and target.read_text(encoding="utf-8") == dumps(exercise):
        return False
    write(exercise, target)
    return True
