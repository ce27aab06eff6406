"""``lora-edu progress``: which exercises of a learner's own copy pass their checks, without touching the copy.

A notebook that is as it was handed out is not run. The others run in a folder of their own, as ``lora-edu grade`` runs
them but not isolated, and what came out is kept in ``.progress.json`` under a hash of all that it depends on.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_edu.course.grading.check import LIMITS
from lora_edu.course.grading.classroom import grade_one
from lora_edu.course.grading.runner import Runner
from lora_edu.course.grading.submissions import Submission, checks_of, code_cells
from lora_edu.course.notebooks.runs import fingerprint
from lora_edu.course.notebooks.stored import EXERCISES, NotebookError, list_notebooks, read, title
from lora_edu.course.notebooks.work import WORK
from lora_edu.files import ROOT, write_atomically

RECORD = ".progress.json"


@dataclass(frozen=True)
class Standing:
    """How a learner stands with one lesson: the title, and (exercise, status) of each of its checks."""

    name: str
    title: str
    exercises: list[tuple[str, str]]

    @property
    def passed(self) -> int:
        """How many checks pass."""
        return sum(status == "passed" for _, status in self.exercises)


def standings(
    work: Path = WORK, exercises: Path = EXERCISES, say: Callable[[str], None] = lambda name: None
) -> list[Standing]:
    """Where the learner stands with every lesson that has exercises.

    Args:
        work: the learner's folder: ``work/``, or one that holds ``exercises/`` or exercise notebooks.
        exercises: the course's exercise notebooks.
        say: called with the name of each notebook that has to be run.

    Raises:
        NotebookError: if there is no such folder yet, or no exercise notebook in it.
    """
    if not work.is_dir():
        place = "no work/ yet" if work == WORK else f"no folder {work}"
        raise NotebookError(f"there is {place}: lora-edu lab makes your own copy of the lessons there, and opens it")
    folder = work / "exercises" if (work / "exercises").is_dir() else work
    sources = list_notebooks(exercises)
    if not any((folder / source.name).exists() for source in sources):
        raise NotebookError(f"{folder} holds no exercise notebook: lora-edu lab puts copies into work/exercises/")
    known = _known(work)
    around = fingerprint((ROOT / "lora_edu").rglob("*.py"))
    found, kept = [], {}
    with Runner(own=True) as runner:
        for source in sources:
            own, labels = folder / source.name, [check.label for check in checks_of(source)]
            statuses = ["not done"] * len(labels)
            if own.exists() and _code(own) != _code(source):
                key = hashlib.sha256(json.dumps([_code(own), _code(source), around]).encode()).hexdigest()
                old = known.get(source.stem, {})
                if old.get("key") != key or len(old.get("statuses", [])) != len(labels):
                    say(source.stem)
                    one = Submission("", source.stem, own, own.parent)
                    rows = grade_one(one, runner, LIMITS, source.parent)
                    old = {"key": key, "statuses": [row.status for row in rows]}
                kept[source.stem], statuses = old, old["statuses"]
            found.append(Standing(source.stem, title(read(source)), list(zip(labels, statuses, strict=True))))
    _remember(work, kept)
    return found


def following(found: list[Standing]) -> tuple[str, str] | None:
    """The first exercise that does not pass yet, as (lesson, exercise); None when all do."""
    return next(((one.name, label) for one in found for label, status in one.exercises if status != "passed"), None)


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
