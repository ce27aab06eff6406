"""Notebooks to hand in, and a class that hands them in."""

from nbformat.v4 import new_code_cell

from lora_edu.course.notebooks.stored import EXERCISES, SOLUTIONS, read, write

NAME = "00_start_here"


def solved(*, first="", softmax="", check="", before_second=""):
    """The solutions notebook, with a cell before the first exercise, another first answer or check of it, and a cell
    before the second."""
    notebook = read(SOLUTIONS / f"{NAME}.ipynb")
    checks = [index for index, cell in enumerate(notebook.cells) if "check" in cell.metadata.get("tags", [])]
    if before_second:
        notebook.cells.insert(checks[0] + 1, new_code_cell(before_second))
    if softmax:
        notebook.cells[checks[0] - 1].source = f"def softmax(logits):\n{softmax}"
    if check:
        notebook.cells[checks[0]].source = check
    notebook.cells.insert(2, new_code_cell(first))
    return notebook


def untouched(first="", later=""):
    """The exercise as it was handed out, with a cell at its beginning and one before the first check."""
    notebook = read(EXERCISES / f"{NAME}.ipynb")
    notebook.cells.insert(4, new_code_cell(later))
    notebook.cells.insert(2, new_code_cell(first))
    return notebook


def hand_in(folder, notebooks, name=NAME):
    for student, notebook in notebooks.items():
        path = folder / student / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(notebook, str | bytes):
            path.write_bytes(notebook.encode() if isinstance(notebook, str) else notebook)
        else:
            write(notebook, path)
    return folder
