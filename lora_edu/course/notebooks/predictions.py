"""Predictions: a question with options, a cell whose output is folded, an answer that is folded whole.

The answer is a Markdown cell of its own, closed in JupyterLab, in the learner's copy and in the book alike.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbformat import NotebookNode

OPTION = re.compile(r"^> - \(([a-d])\) ", re.M)
LETTER = re.compile(r"\(([a-d])\)")
# Without the blank lines, JupyterLab, MyST-NB and nbconvert show what stands inside as raw Markdown.
FOLDED = re.compile(r"<details><summary>Answer</summary>\n\n(?P<text>.*\S)\n\n</details>", re.S)
OPENS_WELL = re.compile(r"<details><summary>[^\n]*</summary>\n\n")


@dataclass
class Prediction:
    """One question of a lesson and what follows it.

    Attributes:
        index: of the question's cell.
        options: its letters; empty where the reader writes something else.
        between: the code cells from the question to the answer.
        answer: the next Markdown cell, None if there is none.
    """

    index: int
    options: list[str]
    between: list[NotebookNode]
    answer: NotebookNode | None

    @property
    def right(self) -> str:
        """The letter that the answer names first; "" if it names none."""
        found = LETTER.search(self.answer.source) if self.answer is not None else None
        return found[1] if found else ""


def predictions(notebook: NotebookNode) -> list[Prediction]:
    """The questions of a lesson, in order."""
    found = []
    for index, cell in enumerate(notebook.cells):
        if "prediction" in cell.metadata.get("tags", []):
            later = notebook.cells[index + 1 :]
            place = next((i for i, each in enumerate(later) if each.cell_type == "markdown"), len(later))
            answer = later[place] if place < len(later) else None
            found.append(Prediction(index, OPTION.findall(cell.source), later[:place], answer))
    return found


def problems_of_predictions(notebook: NotebookNode) -> Iterator[str]:
    """One sentence for each question whose answer could be seen too early, or not be found."""
    answers = []
    for each in predictions(notebook):
        where = f"cell {each.index}: the prediction"
        if each.options and each.options not in (["a", "b", "c"], ["a", "b", "c", "d"]):
            yield f"{where} has the options {', '.join(each.options)}: expected (a) to (c) or (a) to (d), in this order"
        if not each.between:
            yield f"{where} is followed by no code cell"
        if any("hide-output" not in cell.metadata.get("tags", []) for cell in each.between):
            yield f"{where} is followed by a code cell that does not fold its output (tag hide-output)"
        if each.answer is None or "answer" not in each.answer.metadata.get("tags", []):
            yield f"{where} has no cell with its answer after the code (tag answer)"
            continue
        answers.append(each.answer)
        if each.options and each.right not in each.options:
            yield f"{where} has an answer that names none of its options"
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        if "answer" in cell.metadata.get("tags", []):
            if not any(cell is answer for answer in answers):
                yield f"cell {index}: an answer without a prediction"
            folded = FOLDED.fullmatch(cell.source)
            if folded is None or "<details" in folded["text"]:
                yield f"cell {index}: the answer is not folded whole, with a blank line at both ends"
        opened, closed = cell.source.count("<details"), cell.source.count("\n\n</details>")
        if not opened == closed == len(OPENS_WELL.findall(cell.source)):
            yield f"cell {index}: <details> wants <summary>…</summary> and a blank line, and a blank line at its end"
        if "**Predict.**" in cell.source and "prediction" not in cell.metadata.get("tags", []):
            yield f"cell {index}: a prediction without the tag prediction"


def shares(notebooks: list[NotebookNode]) -> dict[str, float]:
    """How often each letter is right, of the questions that offer it."""
    questions = [each for notebook in notebooks for each in predictions(notebook) if each.options]
    letters = sorted({letter for each in questions for letter in each.options})
    return {
        letter: sum(each.right == letter for each in questions) / sum(letter in each.options for each in questions)
        for letter in letters
    }
