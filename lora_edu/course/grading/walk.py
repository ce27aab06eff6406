"""What lies in a class's folder: every file, also those in zips, and what is none; and the files beside a notebook."""

import os
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_edu.course.grading.texts import plain
from lora_edu.course.grading.unpack import unpack
from lora_edu.course.notebooks.stored import NotebookError

# What programs leave behind: nobody handed it in.
LITTER = {".ipynb_checkpoints", "__MACOSX", "__pycache__", ".git", ".DS_Store", "Thumbs.db", "desktop.ini"}
MOST_FILES, MOST_BYTES = 200, 16 * 1024**2  # of the files beside a notebook
ZIPS = 2  # a zip, and a zip in it


@dataclass(frozen=True)
class Found:
    """One thing that was handed in.

    Attributes:
        path: where it is; for a file of a zip, where it was unpacked.
        place: where it lies in the class's folder, in which a zip counts as a folder.
        owner: the student, or nothing.
        problem: why it is not even looked at; nothing for a file.
    """

    path: Path
    place: str
    owner: str
    problem: str = ""

    @property
    def is_notebook(self) -> bool:
        """Whether it is a file with a notebook's ending, in any case."""
        return not self.problem and self.path.suffix.lower() == ".ipynb"


def walk(folder: Path, unpacked: Path, skipped: set[Path]) -> tuple[list[Found], list[str]]:
    """Everything in a class's folder but litter, and everybody who has a place in it, also an empty one.

    Args:
        folder: holds a folder or a zip for each student, or files named STUDENT__….
        unpacked: a folder for what is in zips.
        skipped: what in the folder is not a student's.
    """
    found: list[Found] = []
    owners: list[str] = []
    for entry in _entries(folder):
        path = Path(entry.path)
        if path in skipped:
            continue
        student, underscores, _ = path.stem.partition("__")
        in_a_folder = entry.is_dir() or (_is_zip(path) and not underscores)
        owner = path.name if entry.is_dir() else student if underscores or in_a_folder else ""
        owner = plain(unicodedata.normalize("NFC", owner))  # macOS spells é in two letters
        found += _look(entry, entry.name, owner, unpacked, 0)
        owners.append(owner)
    return found, sorted({owner for owner in owners if owner})


def beside(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The plain files of a notebook's folder: those that go with it when it runs, and why each of the others does not.

    Notebooks are not among them, since each is a matter of its own.
    """
    kept: list[Path] = []
    dropped: dict[Path, str] = {}
    left = MOST_BYTES
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_litter(name))
        for path in (Path(place, name) for name in sorted(names) if not _is_litter(name)):
            try:
                about = path.lstat()
            except OSError:  # it is gone already
                continue
            if not stat.S_ISREG(about.st_mode) or path.suffix.lower() == ".ipynb":
                continue
            if len(kept) == MOST_FILES:
                dropped[path] = f"more than {MOST_FILES} files lie beside the notebook: it ran without this one"
            elif about.st_size > left:
                dropped[path] = f"more than {MOST_BYTES // 1024**2} MB lie beside the notebook: it ran without this one"
            else:
                kept.append(path)
                left -= about.st_size
    return kept, dropped


def _look(entry: os.DirEntry, place: str, owner: str, unpacked: Path, zips: int) -> Iterator[Found]:
    """What a file, a folder, a link or a zip is or holds. Folders wait in a list: they may be deep."""
    waiting = [(entry, place)]
    while waiting:
        entry, place = waiting.pop()
        path = Path(entry.path)
        if entry.is_symlink():
            problem = "a link to a folder, which is not followed" if entry.is_dir() else "a link, not a file"
            yield Found(path, place, owner, problem)
        elif entry.is_dir():
            try:
                waiting += reversed([(each, f"{place}/{each.name}") for each in _entries(path)])
            except OSError as error:
                yield Found(path, place, owner, f"cannot be read ({error.strerror})")
        elif not entry.is_file():
            yield Found(path, place, owner, "not a file")
        elif _is_zip(path):
            yield from _unzip(Found(path, place, owner), unpacked, zips)
        else:
            yield Found(path, place, owner)


def _unzip(archive: Found, unpacked: Path, zips: int) -> Iterator[Found]:
    """What a zip holds, or the zip itself if that is no notebook: then it may be data that a notebook reads."""
    path, place, owner = archive.path, archive.place, archive.owner
    if zips == ZIPS:
        yield Found(path, place, owner, "a zip in a zip in a zip, which is not unpacked")
        return
    target = Path(tempfile.mkdtemp(dir=unpacked))
    try:
        refused = unpack(path, target)
    except NotebookError as error:
        yield Found(path, place, owner, str(error))
        return
    inside = [
        one for each in _entries(target) for one in _look(each, f"{place}/{each.name}", owner, unpacked, zips + 1)
    ]
    inside += [Found(path, f"{place}/{name}".rstrip("/"), owner, reason) for name, reason in refused]
    yield from inside if any(one.is_notebook or one.problem for one in inside) else [archive]


def _entries(folder: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not _is_litter(entry.name)), key=lambda entry: entry.name)


def _is_litter(name: str) -> bool:
    return name in LITTER or name.startswith("._")


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"
