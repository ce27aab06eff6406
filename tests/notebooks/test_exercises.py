"""An exercise notebook runs from top to bottom before anything was written, and every check says "not done yet"."""

import pytest

from lora_edu.course.grading.check import LIMITS
from lora_edu.course.grading.runner import Runner
from lora_edu.course.grading.submissions import checks_of, code_cells, line_up
from lora_edu.course.notebooks.stored import EXERCISES, list_notebooks, read


@pytest.fixture(scope="module")
def runner():
    with Runner(own=True) as runner:
        yield runner


@pytest.mark.parametrize("path", list_notebooks(EXERCISES), ids=lambda path: path.stem)
def test_untouched_exercise(path, runner):
    cells = code_cells(path)
    checks = line_up(checks_of(path), cells)
    outcome = runner.run(cells, checks, LIMITS, folder=path.parent)
    assert (outcome.ended, outcome.troubles) == ("ended", [])
    assert {label: verdict.status for label, verdict in outcome.verdicts.items()} == {
        check.label: "not done" for check in checks
    }
    tagged = [cell for cell in read(path).cells if "check" in cell.metadata.get("tags", [])]
    assert len(checks) >= len(tagged) > 0
