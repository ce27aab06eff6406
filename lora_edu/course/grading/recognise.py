"""Which exercise notebook a file is a copy of. Its cells say so, whatever its name has become; else its name does."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from lora_edu.course.grading.submissions import CALL, cells_of
from lora_edu.course.notebooks.stored import NotebookError, list_notebooks

# A check that is called, the text of a cell as it was handed out, its id: what each counts, and what is enough.
WEIGHTS, ENOUGH = {"check": 3, "text": 2, "id": 1}, 3

Mark = tuple[str, str]


def recognise(path: Path, exercises: Path) -> str:
    """The name of the exercise notebook that this file holds the answers to.

    Args:
        path: a notebook that was handed in, under any name.
        exercises: the course's exercise notebooks, in a folder beside the lessons.

    Raises:
        NotebookError: saying what it is instead.
    """
    problem = "no cell and no name in it is that of an exercise notebook"
    try:
        owners = _owners(exercises)
        seen = {mark for cell in cells_of(path) for mark in _marks(*cell)}
        found: Counter[str] = Counter()
        for mark in seen & owners.keys():
            found[owners[mark]] += WEIGHTS[mark[0]]
    except NotebookError as error:  # its name may still say whose row it costs
        found, problem = Counter(), str(error)
    names = {place.stem for place in list_notebooks(exercises)}
    answers = {name: weight for name, weight in found.items() if name in names and weight >= ENOUGH}
    best = [name for name, weight in answers.items() if weight == max(answers.values())]
    said = _said(path.stem, names)
    if len(best) == 1 or said in best:
        return said if said in best else best[0]
    if best:
        raise NotebookError(f"it holds as much of {' as of '.join(sorted(best))}: hand in one notebook for each")
    lesson = next((name for name, weight in found.most_common() if weight >= ENOUGH), "")
    if lesson:
        raise NotebookError(f"it is the lesson {Path(lesson).name} itself, without its exercises")
    if not said:
        raise NotebookError(problem)
    return said


def _said(stem: str, names: set[str]) -> str:
    """The longest name that stands in a file's name: "Copy of 03 LORA layer (1)" has "03_lora_layer"."""
    stem = _folded(stem)
    return max((name for name in names if _folded(name) in stem), key=len, default="")


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", name).casefold())


def _marks(kind: str, identity: str, source: str) -> Iterator[Mark]:
    yield "id", identity
    yield "text", source.strip()
    if kind == "code":
        yield from (("check", name) for name in CALL.findall(source))


@lru_cache
def _owners(exercises: Path) -> dict[Mark, str]:
    """Each mark that one notebook of the course has and no other: of an exercise by its name, of a lesson by a path."""
    places: dict[Mark, set[str]] = {}
    for folder, prefix in ((exercises, ""), (exercises.parent, "lessons/")):
        for path in list_notebooks(folder):
            for cell in cells_of(path):
                for mark in _marks(*cell):
                    places.setdefault(mark, set()).add(prefix + path.stem)
    return {mark: next(iter(owners)) for mark, owners in places.items() if len(owners) == 1 and mark[1]}
