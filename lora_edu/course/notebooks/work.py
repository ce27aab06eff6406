"""The learner's folder ``work/``: a copy of lessons and exercises with outputs cleared, never overwritten."""

import hashlib
import json
import os
import re
from pathlib import Path

from nbformat import NotebookNode

from lora_edu.course.notebooks.stored import (
    BUILD,
    EXERCISES,
    LESSONS,
    MINE,
    NotebookError,
    dumps,
    find_notebook,
    list_notebooks,
    normalise,
    read,
    write,
)
from lora_edu.course.notebooks.your_turn import learners_copy
from lora_edu.files import ROOT, write_atomically

WORK = ROOT / "work"
LAB = BUILD / "lab"
TEACHERS = ("@jupyter/nbgrader", "@jupyter-notebook/lab-extension")  # menus and buttons that come with nbgrader
BOOK = ROOT / "book"
PAGES = ("claims.md", "methods.md")  # other pages have blanks that are filled when the book is built
COPIES = ".copies.json"  # what was copied, by checksum: a file that still has it was not touched by the learner


def refresh(work: Path = WORK, lessons: Path = LESSONS, book: Path = BOOK) -> tuple[list[str], list[str]]:
    """Copy what is new, update what the learner has not touched, leave everything else.

    The pages of the book that lessons link to most lie beside the copies: JupyterLab opens nothing outside ``work``.

    Returns:
        the names written, and the names left alone although the course has a newer version.
    """
    known = _known(work)
    written, left = [], []
    form = [path for path in [lessons / MINE.name] if path.exists()]
    for source in [*list_notebooks(lessons), *form, *list_notebooks(lessons / "exercises")]:
        name = source.relative_to(lessons).as_posix()
        target, fresh = work / name, _fresh(source)
        if target.exists() and _sum(target.read_text(encoding="utf-8")) != known.get(name):
            if known.get(name) != _sum(fresh):
                left.append(name)
            continue
        if not target.exists() or target.read_text(encoding="utf-8") != fresh:
            _copy(source, target)
            written.append(name)
        known[name] = _sum(fresh)
    _remember(work, known)
    for page in filter(Path.exists, (book / name for name in PAGES)):
        text = page.read_text(encoding="utf-8").replace("](../lessons/", "](../")
        write_atomically(work / "book" / page.name, text.encode())
    return written, left


def reset(name: str, work: Path = WORK, lessons: Path = LESSONS) -> tuple[Path | None, Path]:
    """Put one notebook back as it was; the learner's version stays beside it.

    Args:
        name: "03" or "03_lora_layer" for a lesson, "exercises/03" for an exercise notebook.
        work: the learner's folder.
        lessons: the course's folder.

    Returns:
        the path of the learner's version (None if there was none), and of the fresh copy.
    """
    folder = lessons / "exercises" if Path(name).parent.name == "exercises" else lessons
    source = find_notebook(Path(name).name, folder)
    relative = source.relative_to(lessons)
    target, kept = work / relative, None
    if target.exists():
        kept = _free_name(target)
        target.rename(kept)
    _copy(source, target)
    _remember(work, {**_known(work), relative.as_posix(): _sum(_fresh(source))})
    return kept, target


def exercise_to_check(name: str, work: Path = WORK) -> Path:
    """The exercise notebook meant by a path, a number or a name: the learner's in ``work/`` if it is there."""
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name).resolve()
    try:
        course = find_notebook(name, EXERCISES)
    except NotebookError:  # a name of the learner's own
        return find_notebook(name, work / "exercises")
    mine = work / "exercises" / course.name
    return mine if mine.is_file() else course


def lab_settings() -> dict[str, str]:
    """The environment in which JupyterLab leaves out what is for teachers; without it, it is all there."""
    page = json.dumps({"disabledExtensions": dict.fromkeys(TEACHERS, True)})
    write_atomically(LAB / "labconfig" / "page_config.json", page.encode())
    others = filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])
    return {"JUPYTER_CONFIG_PATH": os.pathsep.join([str(LAB), *others])}


def _learners(source: Path) -> NotebookNode:
    """The copy, with links to the book's pages that lead into ``work``."""
    notebook = learners_copy(read(source))
    links = re.compile(rf"\]\(\.\./((?:\.\./)*book/(?:{'|'.join(map(re.escape, PAGES))})[)#])")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = links.sub(r"](\1", cell.source)
    return normalise(notebook)


def _fresh(source: Path) -> str:
    return dumps(_learners(source))


def _copy(source: Path, target: Path) -> None:
    write(_learners(source), target)


def _free_name(target: Path) -> Path:
    names = [target.with_name(f"{target.stem}.before-reset{n or ''}.ipynb") for n in ["", *range(2, 1000)]]
    return next(path for path in names if not path.exists())


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _known(work: Path) -> dict[str, str]:
    path = work / COPIES
    return json.loads(path.read_text()) if path.exists() else {}


def _remember(work: Path, known: dict[str, str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / COPIES).write_text(json.dumps(known, indent=1, sort_keys=True))
