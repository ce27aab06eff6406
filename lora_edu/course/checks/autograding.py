"""Where nbgrader executes a notebook: what a check finds becomes points, and what is written to stderr costs none.

nbgrader reads the points of a test cell from the cell's outputs, the first that says something: an error, or anything
on stderr, is worth 0; a number that the cell shows as its result is worth that many points; without either the cell is
worth all of its points. A check prints and returns in any other notebook; here it also shows such a number.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def is_on() -> bool:
    """Whether nbgrader executes this notebook, in order to grade or to validate it; it says so in the environment."""
    return "NBGRADER_EXECUTION" in os.environ


FOLDER = Path.cwd() if is_on() else Path()  # the notebook lies where its kernel starts; later cells may go elsewhere


class NotPassed(Exception):
    """A check found a mistake in a cell that nbgrader grades. IPython shows its words and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def route_stderr() -> None:
    """Have the kernel send as stdout what is written to stderr, so that a warning is seen and costs nothing.

    The kernel's own stream is changed: loggers that were made before, and code in C, write to it too.
    """
    with suppress(AttributeError):  # outside of a kernel the name cannot be changed, and nobody grades by it
        sys.stderr.name = "stdout"  # type: ignore[misc]


def settle(title: str, right: int, steps: int, mistake: str) -> None:
    """Show the points of the test cell that is running: its share of right steps. In any other cell do nothing.

    The number stands among the outputs before anything that the cell may do after its check. The points that the cell
    has are read from the notebook, where a teacher may have changed them.

    Args:
        title: what was checked.
        right: how many steps were right.
        steps: how many there are.
        mistake: what is wrong, if not all are right.

    Raises:
        NotPassed: if not all steps are right. Where the points are unknown, this makes it 0 of them.
    """
    cells, running = _test_cells(), _running_cell()
    if cells and running not in cells:
        return  # a cell of the learner's own
    if running in cells:
        points = cells[running]
        sys.displayhook(points if right == steps else round(points * right / steps, 2))
    if right < steps:
        raise NotPassed(f"{title}: {right} of {steps} steps right\n{mistake}")


def _test_cells() -> dict[str, float]:
    """The sources of the test cells in the folder's notebooks, and their points."""
    found = {}
    for path in sorted(FOLDER.glob("*.ipynb")):
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            for cell in cells:
                mark = cell["metadata"].get("nbgrader", {})
                if mark.get("grade") and not mark.get("solution"):
                    found["".join(cell["source"]).strip()] = float(mark["points"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # another notebook of the learner's, which is none
    return found


def _running_cell() -> str:
    """The source of the cell that is running; nothing outside of a notebook."""
    from IPython import get_ipython

    shell: Any = get_ipython()
    return shell.history_manager.input_hist_raw[-1].strip() if shell else ""
