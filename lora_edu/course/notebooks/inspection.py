"""What a stored notebook must look like: each rule gives one sentence for each place where it is broken."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

from lora_edu.course.notebooks.predictions import problems_of_predictions
from lora_edu.course.notebooks.stored import dumps, normalise, read
from lora_edu.course.notebooks.your_turn import problems_of_your_turn

TAGS = {
    "hide-output",
    "hide-input",
    "remove-cell",
    "nbval-ignore-output",
    "prediction",
    "answer",
    "your-turn",
    "bug",
    "check",
    "solution",
}
SLIDE_TYPES = {"slide", "subslide", "fragment", "skip", "notes", "-"}
SLIDES = range(8, 16)
LONGEST_CELL = 30
MOST_CELLS, MOST_WORDS, MOST_LINES = 60, 2000, 250
MOST_WORDS_OF_AN_ELECTIVE = 1400
ELECTIVES = {"16", "17", "18", "19", "20", "21", "22", "23", "24", "25"}
LARGEST_FILE = 1_500_000
IGNORED_SHARE = 0.10
IGNORED_SHARE_TIMING = 0.30  # lessons whose subject is time and memory
TIMING_LESSONS = {"06", "07", "09", "12", "13", "20", "21", "24", "25"}
BOX = ["You will", "You need", "Time", "Hardware"]
HEADINGS = [
    "Two questions first",
    "Spot the bug",
    "What we saw",
    "Test yourself",
    "Claims checked here",
    "Exercises",
    "Go further",
]
ABSOLUTE_PATH = re.compile(
    r"(?<![\w./:])/(?:home|root|Users|tmp|work|usr|opt|mnt|private|var)/[\w.-]+|\b[A-Z]:\\\\?\w+"
)
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def problems_of_any(path: Path) -> Iterator[str]:
    """The rules for every stored notebook: canonical, no absolute paths, known tags, links that lead somewhere."""
    text = path.read_text(encoding="utf-8")
    notebook = read(path)
    if len(text.encode()) > LARGEST_FILE:
        yield f"{len(text.encode()):,} bytes: expected at most {LARGEST_FILE:,}"
    ids = [cell.get("id") for cell in json.loads(text)["cells"]]  # reading with nbformat would mend them
    if None in ids or len(set(ids)) != len(ids):
        yield "a cell has no id, or two cells have the same"
    if text != dumps(normalise(read(path))):
        yield "not in canonical form: write it with lora-edu lessons run NN --update"
    for index, cell in enumerate(notebook.cells):
        tags = set(cell.metadata.get("tags", []))
        if tags - TAGS:
            yield f"cell {index}: unknown tag {sorted(tags - TAGS)[0]!r}"
        if "nbval-ignore-output" in tags and not str(cell.metadata.get("reason", "")).strip():
            yield f"cell {index}: nbval-ignore-output without a reason in the cell's metadata"
        if cell.metadata.get("slideshow", {}).get("slide_type", "-") not in SLIDE_TYPES:
            yield f"cell {index}: unknown slide type {cell.metadata['slideshow']['slide_type']!r}"
        for words in [cell.source, *_texts(cell)]:
            for found in [*ABSOLUTE_PATH.findall(words), *ADDRESS.findall(words)]:
                yield f"cell {index}: {found!r} is different on another machine"
        if cell.cell_type == "markdown":
            yield from _dead_links(cell.source, path, index)


def problems_of_executed(notebook: NotebookNode) -> Iterator[str]:
    """The rules for lessons and solutions, whose outputs are stored: all cells ran, in order, quietly."""
    code = [(index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    if [cell.execution_count for _, cell in code] != list(range(1, len(code) + 1)):
        yield "the code cells were not all executed from top to bottom, or one of them is empty"
    for index, cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {index}: stores the error {output.ename}"
            if output.get("name") == "stderr":
                yield f"cell {index}: wrote to stderr: {output.text.splitlines()[0]}"
            if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt"):
                yield f"cell {index}: a figure without alternative text (use plots.show)"
            if "image/svg+xml" in output.get("data", {}):
                yield f"cell {index}: an SVG figure, which nbval would compare letter by letter"


def problems_of_lesson(notebook: NotebookNode, number: str) -> Iterator[str]:
    """The rules of the template. In lesson 00 the diagnostic stands for the recall questions."""
    markdown = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = [line[3:].strip() for line in markdown.split("\n") if line.startswith("## ")]
    if not notebook.cells[0].source.startswith("# "):
        yield "the first cell does not begin with the title"
    for label in BOX:
        if not re.search(rf"^> .*\*\*{label}", markdown, re.M):
            yield f"the box at the top has no **{label}**"
    wanted = HEADINGS[1:] if number == "00" else HEADINGS
    places = [next((i for i, text in enumerate(headings) if text.startswith(name)), None) for name in wanted]
    for name, place in zip(wanted, places, strict=True):
        if place is None:
            yield f"the heading {name!r} is missing"
    present = [place for place in places if place is not None]
    if present != sorted(present):
        yield f"the template's headings stand in another order: {headings}"
    if "In your own words:" not in markdown:
        yield "no place to explain it in one's own words"
    if not LINK.search(notebook.cells[-1].source):
        yield "the last cell has no link to the next or previous lesson"
    slides = sum(
        cell.metadata.get("slideshow", {}).get("slide_type") in ("slide", "subslide") for cell in notebook.cells
    )
    if slides not in SLIDES:
        yield f"{slides} slides: expected {SLIDES.start} to {SLIDES.stop - 1}"
    if not any("prediction" in cell.metadata.get("tags", []) for cell in notebook.cells):
        yield "no cell is tagged as a prediction"
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and len(cell.source.split("\n")) > LONGEST_CELL:
            yield f"cell {index}: {len(cell.source.split(chr(10)))} lines of code: expected at most {LONGEST_CELL}"
    yield from problems_of_predictions(notebook)
    yield from problems_of_your_turn(notebook)


def over_budget(notebook: NotebookNode, number: str) -> Iterator[str]:
    """The upper limits of a lesson: cells, words of Markdown (whatever white space parts), lines of unfolded code."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    visible = [cell for cell in code if "hide-input" not in cell.metadata.get("tags", [])]
    counts = {
        "cells": (len(notebook.cells), MOST_CELLS),
        "words of Markdown": (
            sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown"),
            MOST_WORDS_OF_AN_ELECTIVE if number in ELECTIVES else MOST_WORDS,
        ),
        "lines of code in cells that are not folded": (
            sum(bool(line.strip()) for cell in visible for line in cell.source.split("\n")),
            MOST_LINES,
        ),
    }
    for what, (count, most) in counts.items():
        if count > most:
            yield f"{count:,} {what}: expected at most {most:,}"


def problems_of_solution(notebook: NotebookNode, number: str) -> Iterator[str]:
    """The rules of the exercises: all three tiers (electives: B and C), something to write, and a check for it."""
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for tier in "BC" if number in ELECTIVES else "ABC":
        if not re.search(rf"^### {tier}\d", markdown, re.M):
            yield f"no exercise of tier {tier} (a heading like '### {tier}1 …')"
    for tag in ("solution", "check"):
        if not any(tag in cell.metadata.get("tags", []) for cell in notebook.cells):
            yield f"no cell is tagged {tag!r}"


def ignored_cells(notebook: NotebookNode) -> tuple[int, int]:
    """How many code cells are exempt from comparison, and how many there are."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return sum("nbval-ignore-output" in cell.metadata.get("tags", []) for cell in code), len(code)


def _texts(cell: NotebookNode) -> Iterator[str]:
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def _dead_links(source: str, path: Path, index: int) -> Iterator[str]:
    for target in LINK.findall(re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$", "", source, flags=re.S)):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        if not (path.parent / target.split("#")[0]).exists():
            yield f"cell {index}: the link {target!r} leads nowhere"
