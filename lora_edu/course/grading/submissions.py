"""Read a notebook that was handed in, and line its cells up with the course's checks."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat

from lora_edu.course.grading.texts import rounded
from lora_edu.course.notebooks.stored import NotebookError, read

LARGEST = 20 * 1024**2
WORTH = 1  # points of a check whose cell says nothing of them, as it does for nbgrader
CALL = re.compile(r"\bchecks\s*\.\s*(\w+)\s*\(")
HEADING = re.compile(r"^### ([A-Z]\d+)\b *(.*)$", re.M)
HINT = re.compile(r"\bhint\s*=\s*([123])\b")
REACHES = re.compile(  # names that no exercise asks for, and that code needs to meddle with its grader
    r"\b_getframe\b|\bcurrentframe\b|\binspect\.stack\b|\bgc\.get_\w+|\bctypes\b|__code__|__globals__|__closure__"
    r"|__builtins__|\bsettrace\b|\bsetprofile\b|\baddaudithook\b|\bcourse\.checks\.report\b|\brun_steps\b|LORA_EDU_\w+"
    r"|\bchecks\.\w+\s*=(?!=)|\bsetattr\(\s*checks\b|\bsolutions/|\bSOLUTIONS\b|/proc\b|\bos\._exit\b|\bos\.fork\b"
)


@dataclass(frozen=True)
class Check:
    """A check of an exercise notebook, and where a submission calls it.

    Attributes:
        label: the task's letter and the name, "B1 lora_layer".
        name: its name.
        arguments: as they are written.
        after: the place of the last cell that calls it; None if no cell does.
        hint: how much help that cell asks for.
        worth: points for a right answer.
    """

    label: str
    name: str
    arguments: tuple[str, ...]
    after: int | None = None
    hint: int = 1
    worth: float = WORTH


def checks_of(exercise: Path) -> list[Check]:
    """The checks that an exercise notebook calls, in their order, each under the task's letter."""
    found, letter = [], ""
    for cell in read(exercise).cells:
        if cell.cell_type == "markdown":
            heading = HEADING.search(cell.source)
            letter = heading[1] if heading else letter
        elif "check" in cell.metadata.get("tags", []):
            for node in _calls(cell.source):
                name = called_check(node)
                worth = rounded(cell.metadata.get("nbgrader", {}).get("points", WORTH))
                found.append(Check(f"{letter} {name}".strip(), name, tuple(map(ast.unparse, node.args)), worth=worth))
    return found


def written_tasks(exercise: Path) -> list[str]:
    """The tasks of an exercise notebook that have no check, and that somebody has to read: "C1 What do you want"."""
    checked = {check.label.split()[0] for check in checks_of(exercise)}
    texts = [cell.source for cell in read(exercise).cells if cell.cell_type == "markdown"]
    headings = [heading for text in texts for heading in HEADING.findall(text)]
    return [f"{letter} {title.partition(' (')[0]}" for letter, title in headings if letter not in checked]


def _calls(source: str) -> Iterator[ast.Call]:
    """The calls of checks in a cell; none if it is not plain Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call) and called_check(node))


def called_check(node: ast.Call) -> str:
    """The name in a call ``checks.name(…)``, or nothing."""
    function = node.func
    if not isinstance(function, ast.Attribute):
        return ""
    owner = function.value
    return function.attr if "checks" in (getattr(owner, "id", ""), getattr(owner, "attr", "")) else ""


def cells_of(path: Path) -> list[tuple[str, str, str]]:
    """The cells of a notebook that nobody vouches for: the kind, the id and the source of each.

    It may have a byte-order mark, and an older format than ours, as long as Jupyter opens it.

    Raises:
        NotebookError: if it cannot be read, is too large, or is no notebook.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise NotebookError(f"larger than {LARGEST // 1024**2} MB: clear its outputs")
        notebook = json.loads(path.read_text(encoding="utf-8-sig"))
        if "cells" not in notebook and "nbformat" in notebook:
            notebook = nbformat.convert(nbformat.reader.reads(json.dumps(notebook)), 4)
        return [(cell["cell_type"], str(cell.get("id", "")), "".join(cell["source"])) for cell in notebook["cells"]]
    except NotebookError:
        raise
    except OSError as error:
        raise NotebookError(f"cannot be read ({error.strerror or type(error).__name__})") from None
    except RecursionError:
        raise NotebookError("not a notebook (nested too deeply)") from None
    except Exception as error:  # whatever such a file makes of the code that reads it
        reason = " ".join(str(error).split())[:80]
        raise NotebookError(f"not a notebook ({type(error).__name__}: {reason})") from None


def code_cells(path: Path) -> list[tuple[int, str]]:
    """The code cells among them, each with its place.

    Raises:
        NotebookError: as ``cells_of``.
    """
    return [(index, source) for index, (kind, _, source) in enumerate(cells_of(path)) if kind == "code"]


def line_up(checks: list[Check], cells: list[tuple[int, str]]) -> list[Check]:
    """Each check with the place of the last cell that calls it, and the hint that this cell asks for."""
    places = {name: (index, source) for index, source in cells for name in CALL.findall(source)}
    lined = []
    for check in checks:
        place, source = places.get(check.name, (None, ""))
        hint = HINT.search(source)
        lined.append(replace(check, after=place, hint=int(hint[1]) if hint else 1))
    return lined


def reaching(cells: list[tuple[int, str]], exercise: Path) -> list[str]:
    """What a submission names, and the exercise as handed out does not, that only meddling with the grader needs."""
    given = {cell.source.strip() for cell in read(exercise).cells}
    found = [match[0] for _, source in cells if source.strip() not in given for match in REACHES.finditer(source)]
    return sorted(set(found))
