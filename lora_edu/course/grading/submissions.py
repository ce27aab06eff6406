"""Find the notebooks that a class handed in, tell whose is which, and line their cells up with the course's checks."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lora_edu.course.notebooks.stored import EXERCISES, NotebookError, list_notebooks, read

RULE = "STUDENT/NN_name.ipynb (folders inside are fine) or STUDENT__NN_name.ipynb"
SKIPPED = {".ipynb_checkpoints", "__MACOSX", ".git"}
LARGEST = 20 * 1024**2
CALL = re.compile(r"\bchecks\s*\.\s*(\w+)\s*\(")
HINT = re.compile(r"\bhint\s*=\s*([123])\b")
REACHES = re.compile(  # names that no exercise asks for, and that code needs to meddle with its grader
    r"\b_getframe\b|\bcurrentframe\b|\binspect\.stack\b|\bgc\.get_\w+|\bctypes\b|__code__|__globals__|__closure__"
    r"|__builtins__|\bsettrace\b|\bsetprofile\b|\baddaudithook\b|\bcourse\.checks\.report\b|\brun_steps\b|LORA_EDU_\w+"
    r"|\bchecks\.\w+\s*=(?!=)|\bsetattr\(\s*checks\b|\bsolutions/|\bSOLUTIONS\b|/proc\b|\bos\._exit\b|\bos\.fork\b"
)


@dataclass(frozen=True)
class Submission:
    """One notebook that was handed in: whose, for which exercise notebook, and the folder whose files go with it."""

    student: str
    exercise: str
    path: Path
    files: Path | None = None


@dataclass(frozen=True)
class Check:
    """A check of an exercise notebook, and where a submission calls it.

    Attributes:
        label: the task's letter and the name, "A1 lora_forward".
        name: its name.
        arguments: as they are written.
        after: the place of the last cell that calls it; None if no cell does.
        hint: how much help that cell asks for.
    """

    label: str
    name: str
    arguments: tuple[str, ...]
    after: int | None = None
    hint: int = 1


def collect(folder: Path, exercises: Path = EXERCISES) -> tuple[list[Submission], list[tuple[Path, str]]]:
    """What was handed in, and each notebook that was left out with the reason.

    Args:
        folder: holds STUDENT/…/NN_name.ipynb, or STUDENT__NN_name.ipynb.
        exercises: the course's exercise notebooks, whose names count.

    Raises:
        NotebookError: if there is no such folder.
    """
    if not folder.is_dir():
        raise NotebookError(f"{folder}: there is no such folder; expected one that holds {RULE}")
    names = {path.stem for path in list_notebooks(exercises)}
    found: dict[tuple[str, str], Submission] = {}
    left: list[tuple[Path, str]] = []
    paths = [path for path in folder.rglob("*") if path.suffix == ".ipynb" and not SKIPPED & set(path.parts)]
    for path in sorted(paths, key=lambda path: (path.parent.name != "exercises", path)):
        place = path.relative_to(folder)
        student, _, name = path.stem.partition("__") if len(place.parts) == 1 else (place.parts[0], "", path.stem)
        if path.is_symlink() or any((folder / parent).is_symlink() for parent in list(place.parents)[:-1]):
            left.append((place, "a link, not a file"))
        elif not path.is_file():
            left.append((place, "not a file"))
        elif not name or not student:
            left.append((place, f"no student in the name: expected {RULE}"))
        elif name not in names:
            left.append((place, "no exercise notebook has this name: it must stay as it was handed out"))
        elif (student, name) in found:
            other = found[student, name].path.relative_to(folder)
            left.append((place, f"{student} also handed in {other.as_posix()}, which was graded"))
        else:
            found[student, name] = Submission(student, name, path, path.parent if len(place.parts) > 1 else None)
    return sorted(found.values(), key=lambda one: (one.student.lower(), one.student, one.exercise)), sorted(left)


def checks_of(exercise: Path) -> list[Check]:
    """The checks that an exercise notebook calls, in their order, each under the task's letter."""
    found, letter = [], ""
    for cell in read(exercise).cells:
        if cell.cell_type == "markdown":
            heading = re.search(r"^### ([A-Z]\d+)\b", cell.source, re.M)
            letter = heading[1] if heading else letter
        elif "check" in cell.metadata.get("tags", []):
            for node in _calls(cell.source):
                name = called_check(node)
                found.append(Check(f"{letter} {name}".strip(), name, tuple(map(ast.unparse, node.args))))
    return found


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


def code_cells(path: Path) -> list[tuple[int, str]]:
    """The code cells of a notebook that nobody vouches for, each with its place.

    Raises:
        NotebookError: if it is too large, or is no notebook.
    """
    if path.stat().st_size > LARGEST:
        raise NotebookError(f"larger than {LARGEST // 1024**2} MB: clear its outputs")
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [(index, cell["cell_type"], cell["source"]) for index, cell in enumerate(cells)]
        texts = [(index, "".join(source)) for index, kind, source in sources if kind == "code"]
    except RecursionError:
        raise NotebookError("not a notebook (nested too deeply)") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise NotebookError(f"not a notebook ({type(error).__name__}: {reason})") from None
    return texts


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
