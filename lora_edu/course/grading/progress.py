"""``lora-edu progress``: which exercises of a learner's own copy pass their checks, without touching the copy.

A notebook that is as it was handed out is not run. The others run in a folder of their own, as ``lora-edu grade`` runs
them but not isolated, and what came out is kept in ``.progress.json`` under a hash of all that it depends on.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_edu.course.grading.check import LIMITS
from lora_edu.course.grading.classroom import grade_one
from lora_edu.course.grading.handed_in import Submission, age
from lora_edu.course.grading.recognise import recognise
from lora_edu.course.grading.runner import Runner
from lora_edu.course.grading.submissions import checks_of, code_cells
from lora_edu.course.notebooks.runs import fingerprint
from lora_edu.course.notebooks.stored import EXERCISES, NotebookError, list_notebooks, read, title
from lora_edu.course.notebooks.work import WORK
from lora_edu.files import ROOT, write_atomically

RECORD = ".progress.json"


@dataclass(frozen=True)
class Standing:
    """How a learner stands with one lesson.

    Attributes:
        name: of its notebooks.
        title: its own.
        exercises: (exercise, status) of each of its checks.
        path: the learner's exercise notebook, if there is one.
    """

    name: str
    title: str
    exercises: list[tuple[str, str]]
    path: Path | None = None


def standings(
    work: Path = WORK, exercises: Path = EXERCISES, say: Callable[[str], None] = lambda line: None
) -> list[Standing]:
    """Where the learner stands with every lesson: of the course in ``work/``, of those in it in any other folder.

    Args:
        work: the learner's folder: ``work/``, a hand-out, or one that holds exercise notebooks.
        exercises: the course's exercise notebooks.
        say: called with a line about each notebook that has to be run, and if nothing can be remembered.

    Raises:
        NotebookError: if there is no such folder yet, or no exercise notebook in it.
    """
    if not work.is_dir():
        place = "no work/ yet" if work == WORK else f"no folder {work}"
        raise NotebookError(f"there is {place}: lora-edu lab makes your own copy of the lessons there, and opens it")
    all_of_them = work.resolve() == WORK.resolve()
    places = work / "exercises", work / "lessons" / "exercises", work
    folder = next(place for place in places if place.is_dir())
    mine = _recognised(folder, exercises)
    if not mine:
        raise NotebookError(f"{folder} holds no exercise notebook: lora-edu lab puts copies into work/exercises/")
    sources = {path.stem: path for path in list_notebooks(exercises)}
    lessons = {path.stem: path for path in list_notebooks(folder.parent if folder != work else work)}
    known, kept = _known(work), {}
    around = fingerprint((ROOT / "lora_edu").rglob("*.py"))
    found = []
    with Runner(own=True) as runner:
        for name in sorted({*mine, *lessons, *(sources if all_of_them else ())}):
            source, own = sources.get(name), mine.get(name)
            labels = [check.label for check in checks_of(source)] if source and (own or all_of_them) else []
            statuses = ["not done"] * len(labels)
            if source and own and _code(own) != _code(source):
                key = hashlib.sha256(json.dumps([_code(own), _code(source), around]).encode()).hexdigest()
                old = known.get(name, {})
                if old.get("key") != key or len(old.get("statuses", [])) != len(labels):
                    say(f"running {name} …")
                    rows = grade_one(Submission("", name, own, own.parent), runner, LIMITS, source.parent)
                    old = {"key": key, "statuses": [row.status for row in rows]}
                kept[name], statuses = old, old["statuses"]
            heading = title(read(source or lessons[name]))
            found.append(Standing(name, heading, list(zip(labels, statuses, strict=True)), own))
    try:
        _remember(work, kept)
    except OSError as error:
        say(f"{work} cannot be written ({error.strerror}): next time the same notebooks are run again")
    return found


def _recognised(folder: Path, exercises: Path) -> dict[str, Path]:
    """The learner's exercise notebooks by the names of the course's; of several versions the newest, as in a class."""
    versions: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if path.suffix.lower() == ".ipynb" and path.is_file():
            with suppress(NotebookError):
                versions.setdefault(recognise(path, exercises), []).append(path)
    return {name: min(paths, key=lambda path: age(path, name)) for name, paths in versions.items()}


def following(found: list[Standing]) -> tuple[Standing, str] | None:
    """The first exercise that does not pass yet, and its lesson; None when all do."""
    return next(((one, label) for one in found for label, status in one.exercises if status != "passed"), None)


def _code(path: Path) -> list[str]:
    try:
        return [source.strip() for _, source in code_cells(path)]
    except NotebookError as error:
        return [str(error)]


def _known(work: Path) -> dict[str, dict]:
    try:
        return dict(json.loads((work / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _remember(work: Path, kept: dict[str, dict]) -> None:
    write_atomically(work / RECORD, json.dumps(kept, indent=1, sort_keys=True).encode())
