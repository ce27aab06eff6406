"""``lora-edu handout --nbgrader``: the folder of a course that nbgrader makes assignments from, and grades."""

import re
from pathlib import Path

from lora_edu.course.notebooks.exercises import ANSWER, STUB, source_from
from lora_edu.course.notebooks.stored import SOLUTIONS, NotebookError, dumps, read
from lora_edu.files import write_atomically

# A link to another notebook of the course: an assignment holds one notebook only.
LINK = re.compile(r"\[([^\]]+)\]\([^():\s]+\.ipynb\)")

CONFIG = f"""c = get_config()
c.CourseDirectory.course_id = "lora-edu"
# What stands in place of a solution: as in the course's own exercises, so that these can be handed in too.
c.ClearSolutions.code_stub = {{"python": {STUB!r}}}
c.ClearSolutions.text_stub = "{ANSWER}"
# Seconds that one cell may take. nbgrader's own 30 are few on a busy machine: some cells train a small model.
c.Execute.timeout = 180
"""

README = """# The exercises of lora-edu, for nbgrader

`source/` holds a folder for each assignment, **with its solutions**: keep it from the class.

nbgrader and lora-edu have to be in one Python environment, and it has to be active: `make setup` in lora-edu's folder
installs both into `.venv`, and `source .venv/bin/activate` there activates it. For one assignment, in this folder:

```sh
nbgrader generate_assignment {example}
```

writes `release/{example}/`, the exercises without solutions. Give this folder to the class. What comes back belongs
into `submitted/STUDENT/{example}/{example}.ipynb`, a folder for each student.

```sh
nbgrader autograde {example}
```

runs each notebook and counts the points of its checks. It runs them with your rights: use a container, or a machine
that holds nothing else. Written answers are graded by you: start `jupyter lab` here and open Formgrader in the menu
Nbgrader. An answer that was left empty has its 0 points already.

```sh
nbgrader generate_feedback {example}
nbgrader export
```

write a page for each student into `feedback/`, and everybody's points into `grades.csv`.

The page "Teaching with it" in lora-edu's book says how points are counted, and what they are worth.
"""


def lay_out(course: Path, lessons: list[Path], solutions: Path = SOLUTIONS) -> tuple[list[str], list[str]]:
    """Write the folder of a course, or into one. Files that are there already are a teacher's, and stay as they are.

    Args:
        course: the folder.
        lessons: paths of the lessons whose exercises become assignments, each under the lesson's name.
        solutions: where the solutions notebooks lie.

    Returns:
        The files written, and those left alone although they differ from what would have been written.

    Raises:
        NotebookError: if a lesson's solutions are not there; nothing is written then.
    """
    if not solutions.is_dir():
        raise NotebookError(f"{solutions}: there is no such folder; a hand-out has no solutions, the repository has")
    names = [path.stem for path in lessons]
    contents = {f"source/{name}/{name}.ipynb": _source(solutions / f"{name}.ipynb") for name in names}
    if not (course / "nbgrader_config.py").exists():  # else it is a course already, with its own README
        contents["README.md"] = README.format(example=names[0])
    contents["nbgrader_config.py"] = CONFIG
    written, left = [], []
    for name, text in contents.items():
        if not (course / name).exists():
            write_atomically(course / name, text.encode())
            written.append(name)
        elif (course / name).read_text(encoding="utf-8") != text:
            left.append(name)
    return written, left


def _source(path: Path) -> str:
    """What nbgrader makes one assignment from. Its links to other notebooks would lead nowhere, and become words."""
    notebook = source_from(read(path), path.name)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(r"\1", cell.source)
    return dumps(notebook)
