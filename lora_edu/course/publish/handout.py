"""``lora-edu handout``: a zip of lessons and exercises to give to a class. It holds no solution."""

import io
import re
import zipfile
from pathlib import Path

from lora_edu.course.notebooks.stored import (
    EXERCISES,
    LESSONS,
    MINE,
    NotebookError,
    dumps,
    find_notebook,
    list_notebooks,
    normalise,
    read,
    title,
)
from lora_edu.course.notebooks.your_turn import learners_copy
from lora_edu.files import ROOT, write_atomically

TOP = "lora-edu-handout"
LICENCES = ("LICENSE", "LICENSE-lessons")
LIBRARY = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "pyproject.toml")
FOLDERS = ("lora_edu", "data", "book")
DATE = (1980, 1, 1, 0, 0, 0)  # the same notebooks give the same bytes, whenever the zip is made

GUIDE = """# Lessons and exercises of lora-edu

{contents}

## Set up, once

{setup}

## Work

1. Open JupyterLab on this folder: `COURSE/.venv/bin/jupyter lab` (Windows: `COURSE\\.venv\\Scripts\\jupyter lab`).
2. Read a lesson from top to bottom and run its cells. Where it says **Predict**, write your answer down before you
   run the next cell: the outputs were removed so that your predictions are your own.
3. Then do its exercises in `{exercises}/`. Replace each `raise NotImplementedError("your code here")`, and run the
   cell with the check below it. It answers in sentences; `hint=2` and `hint=3` say more.
4. `COURSE/.venv/bin/lora-edu check {exercises}/{example}` sums up what the checks of a notebook say, and
   `COURSE/.venv/bin/lora-edu progress .` how far you are with all of them.

## Hand in

Save the notebook and hand it in in a folder with your name (`ada/{example}`), in a zip with your name (`ada.zip`), or
with your name and two underscores before its own (`ada__{example}`). Hand in the notebooks of the exercises, not those
of the lessons. Files that your code reads belong beside the notebook, in your folder (16 MB at most). If you hand in a
notebook twice, the newer one counts.

When your work is graded, the course's own checks run on the functions and classes that your notebook defines, without
a network and with limits on time and memory. What the notebook prints does not count. Try it with "Restart the kernel
and run all cells" before you hand it in.

## Licences

Code: Apache-2.0 (`LICENSE`). Prose and figures of the lessons: CC BY 4.0 (`LICENSE-lessons`).
"""
SETUP_ELSEWHERE = """The notebooks need the course's library and data, in a folder that your teacher names; it is
called COURSE below. In that folder run `make setup` (a few minutes), or, without make, the commands in its README."""
SETUP_HERE = """The library and the data are in this folder, which is called COURSE below. Run `make setup` here (a few
minutes, with internet), or, without make, the commands that `README.md` lists."""


def chosen(names: list[str], lessons: Path = LESSONS) -> list[Path]:
    """The lessons meant by numbers, names and ranges ("00-05"); all if none is named.

    Raises:
        NotebookError: if a name or a range means no lesson.
    """
    if not names:
        return list_notebooks(lessons)
    found: set[Path] = set()
    for name in names:
        span = re.fullmatch(r"(\d+)-(\d+)", name)
        if span is None:
            found.add(find_notebook(name, lessons))
            continue
        inside = [path for path in list_notebooks(lessons) if int(span[1]) <= int(path.name[:2]) <= int(span[2])]
        if not inside:
            raise NotebookError(f"{name}: no lesson has a number from {span[1]} to {span[2]}")
        found.update(inside)
    return sorted(found)


def contents(lessons: list[Path], exercises: Path = EXERCISES, library: bool = False) -> dict[str, bytes]:
    """Everything that a handout holds, by its name in the zip.

    Args:
        lessons: paths of the lessons.
        exercises: where their exercise notebooks lie.
        library: also what the notebooks need to run: ``lora_edu/``, ``data/`` and the files to install them.
    """
    folder = "lessons/" if library else ""
    files: dict[str, bytes] = {}
    lines, example = [], ""
    for path in lessons:
        files[f"{folder}{path.name}"] = _cleared(path)
        lines.append(f"- `{folder}{path.name}`: {title(read(path))}")
        if (exercises / path.name).exists():
            example = example or path.name
            files[f"{folder}exercises/{path.name}"] = _cleared(exercises / path.name)
            lines[-1] += f"; exercises in `{folder}exercises/{path.name}`"
    for name in LICENCES:
        files[name] = (ROOT / name).read_bytes()
    if library or any(MINE.name in path.read_text(encoding="utf-8") for path in lessons):
        files[f"{folder}{MINE.name}"] = _cleared(MINE)  # lessons link it, and lora-edu lessons mine copies it
    if library:
        for name in LIBRARY:
            files[name] = (ROOT / name).read_bytes()
        for path in (path for name in FOLDERS for path in (ROOT / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    guide = GUIDE.format(
        contents="\n".join(lines),
        setup=SETUP_HERE if library else SETUP_ELSEWHERE,
        exercises=f"{folder}exercises",
        example=example or lessons[0].name,
    )
    files["HANDOUT.md" if library else "README.md"] = guide.encode()
    return files


def write_zip(files: dict[str, bytes], output: Path) -> None:
    """Write the zip whole or not at all; the same files give the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{TOP}/{name}", DATE)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])
    write_atomically(output, content.getvalue())


def _cleared(path: Path) -> bytes:
    return dumps(normalise(learners_copy(read(path)))).encode()
