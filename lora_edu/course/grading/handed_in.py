"""What a class handed in: whose each file is, which notebooks are graded, and why each of the other files is not."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_edu.course.grading.recognise import recognise
from lora_edu.course.grading.roster import on_roster
from lora_edu.course.grading.submissions import cells_of
from lora_edu.course.grading.unpack import unpack
from lora_edu.course.grading.walk import Found, beside, walk
from lora_edu.course.notebooks.stored import EXERCISES, NotebookError
from lora_edu.files import ROOT

RULE = "STUDENT/03_lora_layer.ipynb (folders and zips inside are fine) or STUDENT__03_lora_layer.ipynb"
NAMED = 20  # files of one student that are left out for one reason; more are counted


@dataclass(frozen=True)
class Submission:
    """One notebook that is graded: whose, for which exercise notebook, and the folder whose files go with it.

    ``place`` is where it lies in the class's folder; a zip counts as a folder.
    """

    student: str
    exercise: str
    path: Path
    files: Path | None = None
    place: str = ""


@dataclass(frozen=True)
class Left:
    """Something that is not graded: whose, where it lies in the class's folder, why, and the file if it is one."""

    student: str
    place: str
    reason: str
    path: Path | None = None


@dataclass
class HandedIn:
    """What is graded, all that is not, and everybody who has a place in the folder, with that place's own name."""

    submissions: list[Submission]
    left: list[Left]
    students: dict[str, str]


def handed_in(
    folder: Path,
    unpacked: Path,
    roster: Iterable[str] = (),
    exercises: Path = EXERCISES,
    skipped: Iterable[Path] = (),
) -> HandedIn:
    """Sort what a class handed in. Whatever lies in the folder is graded, goes with what is, or is left with a reason.

    Args:
        folder: holds STUDENT/…/NN_name.ipynb, STUDENT__NN_name.ipynb, or zips of the same; or a zip of all that.
        unpacked: an empty folder, for what is in zips.
        roster: how the students' names are spelt.
        exercises: the course's exercise notebooks.
        skipped: files and folders in it that are not the students'.

    Raises:
        NotebookError: if there is no such folder, or it holds the course itself.
    """
    folder = folder.resolve()
    left: list[Left] = []
    if folder.is_file() and folder.suffix.lower() == ".zip":
        left = [Left("", name or folder.name, reason) for name, reason in unpack(folder, unpacked / "class")]
        folder = unpacked / "class"
    if not folder.is_dir():
        raise NotebookError(f"{folder}: there is no such folder; expected one that holds {RULE}")
    if ROOT.is_relative_to(folder):
        raise NotebookError(f"{folder} holds the course itself: put the submissions into a folder of their own")
    found, owners = walk(folder, unpacked, {path.resolve() for path in skipped})
    names = on_roster(owners, roster) | {"": ""}
    versions: dict[tuple[str, str], list[Found]] = {}
    for one in found:
        student = names[one.owner]
        if one.problem:
            left.append(Left(student, one.place, one.problem))
        elif one.is_notebook:
            try:
                if not student:
                    raise NotebookError(f"no student in the name: expected {RULE}")
                versions.setdefault((student, recognise(one.path, exercises)), []).append(one)
            except NotebookError as error:
                left.append(Left(student, one.place, str(error), one.path))
    submissions = []
    for (student, exercise), group in versions.items():
        newest, *older = sorted(group, key=lambda one: age(one.path, exercise))
        files = None if newest.path.parent == folder else newest.path.parent
        submissions.append(Submission(student, exercise, newest.path, files, newest.place))
        left += [Left(student, one.place, _instead(one, newest), one.path) for one in older]
    others = [one for one in found if not one.problem and not one.is_notebook]
    left += _without_a_notebook(others, {one.files for one in submissions if one.files}, names)
    submissions.sort(key=lambda one: (one.student.lower(), one.student, one.exercise))
    left.sort(key=lambda one: (one.student.lower(), one.place))
    return HandedIn(submissions, left, {name: owner for owner, name in sorted(names.items()) if owner})


def age(path: Path, exercise: str) -> tuple:
    """Sorts versions of a notebook: the newest first, and last what cannot be read.

    Of two that are as old, the one that lies and is named as handed out comes first.
    """
    try:
        cells_of(path)
        readable = True
    except NotebookError:
        readable = False
    name = path.stem.partition("__")[2] or path.stem
    return not readable, -path.stat().st_mtime, path.parent.name != "exercises", name != exercise, path


def _instead(one: Found, graded: Found) -> str:
    """Why another version was graded and not this one."""
    try:
        cells_of(one.path)
    except NotebookError as error:
        return f"{error}; {graded.place} was graded in its place"
    newer = "is newer and " if graded.path.stat().st_mtime > one.path.stat().st_mtime else ""
    return f"{one.owner} also handed in {graded.place}, which {newer}was graded"


def _without_a_notebook(others: list[Found], folders: set[Path], names: dict[str, str]) -> list[Left]:
    """The files that do not go with any notebook. Of very many for one reason, all but a few are counted."""
    kept: set[Path] = set()
    dropped: dict[Path, str] = {}
    for folder in folders:
        fits, more = beside(folder)
        kept, dropped = kept | set(fits), dropped | more
    groups: dict[tuple[str, str], list[Found]] = {}
    for one in others:
        if one.path not in kept:
            reason = dropped.get(one.path, "it is no notebook, and lies beside none that is graded")
            groups.setdefault((names[one.owner], reason), []).append(one)
    left = []
    for (student, reason), group in groups.items():
        left += [Left(student, one.place, reason, one.path) for one in group[:NAMED]]
        if len(group) > NAMED:
            left.append(Left(student, f"{len(group) - NAMED} more files", reason))
    return left
